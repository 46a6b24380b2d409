"""Orders over real HTTPS with both certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.agent.server import create_app
from atoll.model.errors import AtollError, NotFound
from atoll.model.messages import Call, Progress
from atoll.model.objects import Node
from atoll.rpc.https import HttpsTransport
from atoll.runtime import certs
from atoll.runtime.httpserver import listening
from atoll.runtime.tls import fresh_client


class Service:
    """An agent that answers what the test wants."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def handle(self, call: Call, report: Any) -> Any:
        report(Progress(percent=50, text="half"))
        if isinstance(self.answer, AtollError):
            raise self.answer
        return self.answer


async def ask(tmp_path: Path, answer: Any) -> tuple[Any, list[Progress]]:
    authority = certs.create_ca("test")
    for role in ("node", "master"):
        pair = certs.issue(authority, role, f"{role}-1", "node1", ["127.0.0.1"])
        certs.save(tmp_path / role, authority.cert_pem, pair.cert_pem, pair.key_pem)
    seen: list[Progress] = []
    app = create_app(Service(answer))  # type: ignore[arg-type]
    async with listening(app, host="127.0.0.1", port=0, tls_dir=tmp_path / "node", need_certificate=True) as port:
        assert port is not None
        transport = HttpsTransport(fresh_client(tmp_path / "master"))
        try:
            node = Node(id="node-1", name="node1", group="g", address="127.0.0.1", port=port)
            return await transport.call(node, Call(term=1, method="m"), seen.append), seen
        finally:
            await transport.close()


async def test_a_result_of_several_megabytes_arrives(tmp_path: Path) -> None:
    """Such as the list of a pool with 10,000 images."""
    big = [{"logical_id": f"disk{n}", "size": n} for n in range(50_000)]
    result, seen = await ask(tmp_path, big)
    assert result == big
    assert [p.text for p in seen] == ["half"]


async def test_an_error_arrives_as_itself(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such thing"):
        await ask(tmp_path, NotFound("no such thing"))
