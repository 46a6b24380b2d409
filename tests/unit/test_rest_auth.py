"""Who may do what: the Unix socket, tokens, and node certificates over real TLS."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rest_fakes import FakeLeader, fake_leader, ident, served

from atoll.api.rest import auth
from atoll.api.rest.app import create_app
from atoll.operations.all import OPERATIONS
from atoll.runtime import certs

REPORT = {"node": ident("node", 1), "term": 1}


class Tls:
    """The served leader, and clients with and without certificates."""

    def __init__(self, leader: FakeLeader, port: int, socket_path: str, ca: certs.KeyPair, directory: Path) -> None:
        self.leader, self.port, self.socket_path, self.ca, self.directory = leader, port, socket_path, ca, directory

    def context(self, pair: certs.KeyPair | None = None, ca: certs.KeyPair | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca.cert_pem)
        if pair:
            certs.save(self.directory / "client", (ca or self.ca).cert_pem, pair.cert_pem, pair.key_pem)
            context.load_cert_chain(self.directory / "client" / "cert.pem", self.directory / "client" / "key.pem")
        return context

    async def __call__(
        self, method: str, path: str, body: Any = None, *, pair: certs.KeyPair | None = None, token: str | None = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connector = aiohttp.TCPConnector(ssl=self.context(pair))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"https://127.0.0.1:{self.port}{path}", json=body, headers=headers) as answer,
        ):
            return answer.status, await answer.json(content_type=None)


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[Tls]:
    ca = certs.create_ca("lagoon")
    server = certs.issue(ca, "master", ident("node", 1), "node1", ["127.0.0.1"])
    certs.save(tmp_path / "tls", ca.cert_pem, server.cert_pem, server.key_pem)
    leader = await fake_leader()
    async with served(leader, tmp_path, host="127.0.0.1", port=0, tls_dir=tmp_path / "tls") as (path, port):
        assert port
        yield Tls(leader, port, path, ca, tmp_path)


@pytest.mark.parametrize(
    ("token", "read", "operate", "administer"),
    [("read", 200, 403, 403), ("operate", 200, 202, 403), ("admin", 200, 202, 202), ("bad", 401, 401, 401)],
)
async def test_roles(tls: Tls, token: str, read: int, operate: int, administer: int) -> None:
    assert (await tls("GET", "/v1/instances", token=token))[0] == read
    assert (await tls("POST", "/v1/instances/web1/stop", {}, token=token))[0] == operate
    assert (await tls("POST", "/v1/groups", {"name": "g"}, token=token))[0] == administer
    assert (await tls("POST", "/v1/tokens", {"name": "g"}, token=token))[0] == (201 if administer == 202 else administer)


async def test_images_of_anywhere_are_for_admins(tls: Tls) -> None:
    """Else an operator could have the node's disks, or its keys, as a disk of a guest."""

    def body(path: str) -> dict[str, Any]:
        return {"name": "v", "pool": "images", "image": {"node": "node1", "path": path}}

    for path, expected in (("/etc/atoll/master.key", 403), ("/var/lib/atoll/images", 403), ("/var/lib/atoll/images/a.raw", 202)):
        assert (await tls("POST", "/v1/volumes", body(path), token="operate"))[0] == expected
        assert (await tls("POST", "/v1/volumes", body(path), token="admin"))[0] == 202
    disk = {"image": body("/dev/sda")["image"]}
    assert (await tls("POST", "/v1/instances", {"name": "i", "disks": [{"size": 512}, disk]}, token="operate"))[0] == 403
    assert (await tls("POST", "/v1/instances/web1/add-disk", {"disk": disk}, token="operate"))[0] == 403
    status, found = await tls("POST", "/v1/volumes", body("/var/lib/atoll/images/../../../etc/shadow"), token="operate")
    assert (status, found["code"]) == (422, "invalid_input")


async def test_every_route_under_v1_wants_a_credential(tls: Tls) -> None:
    app = create_app(tls.leader)
    paths = app.openapi()["paths"]
    assert len(paths) > 40
    for path, methods in paths.items():
        for method in methods:
            status, found = await tls(method.upper(), path.replace("{target}", "web1"), {} if method != "get" else None)
            assert (status, found["code"]) == (401, "unauthenticated"), (method, path)
    assert tls.leader.asked == []


async def test_a_node_certificate_is_good_for_agents_addresses_only(tls: Tls) -> None:
    node = certs.issue(tls.ca, "node", ident("node", 2), "node2", ["10.0.0.2"])
    tls.leader.serials[certs.serial(node.cert_pem)] = ident("node", 2)
    status, found = await tls("POST", "/agent/v1/report", REPORT, pair=node)
    assert (status, found) == (200, {"term": 7})
    assert tls.leader.reported[0][0] == ident("node", 2)
    # Not even with an administrator's token: a node's key must never open the REST API.
    for token in (None, "admin"):
        status, found = await tls("GET", "/v1/instances", pair=node, token=token)
        assert (status, found["code"]) == (403, "forbidden")


async def test_a_removed_node_and_one_without_certificate_cannot_report(tls: Tls) -> None:
    node = certs.issue(tls.ca, "node", ident("node", 2), "node2", ["10.0.0.2"])
    assert (await tls("POST", "/agent/v1/report", REPORT, pair=node))[1]["code"] == "forbidden"
    assert (await tls("POST", "/agent/v1/report", REPORT))[1]["code"] == "unauthenticated"
    assert (await tls("POST", "/agent/v1/report", REPORT, token="admin"))[1]["code"] == "unauthenticated"
    assert tls.leader.reported == []


async def test_another_ca_is_refused_by_tls(tls: Tls) -> None:
    other = certs.create_ca("other")
    pair = certs.issue(other, "node", ident("node", 2), "node2")
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await tls("POST", "/agent/v1/report", REPORT, pair=pair)
    assert tls.leader.reported == []


async def test_joining_needs_a_token_and_no_certificate(tls: Tls) -> None:
    wish = {"token": "good", "name": "node9", "address": "10.0.0.9", "csr": "PEM"}
    status, found = await tls("POST", "/agent/v1/join", wish)
    assert (status, found["certificate"], found["masters"]) == (201, "CERT", ["https://m:7770"])
    status, found = await tls("POST", "/agent/v1/join", {**wish, "token": "used"})
    assert (status, found["code"]) == (403, "token_invalid")
    assert (await tls("POST", "/agent/v1/join", {**wish, "name": "../x"}))[1]["code"] == "invalid_input"
    assert (await tls("POST", "/agent/v1/join", {**wish, "port": 0}))[1]["code"] == "invalid_input"


async def test_the_socket_is_for_root(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(tls.socket_path).stat().st_mode & 0o777 == 0o600

    async def ask(**headers: str) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=tls.socket_path)) as session,
            session.post("http://localhost/v1/instances/web1/stop", headers=headers) as answer,
        ):
            return answer.status, await answer.json(content_type=None)

    assert (await ask())[0] == 202
    assert tls.leader.asked[0][3].name in ("root",) or tls.leader.asked[0][3].name.startswith("uid ")
    # A token that is given counts, also for root.
    assert (await ask(Authorization="Bearer read"))[0] == 403
    for wrong in ("Basic cm9vdA==", "Bearer", "nonsense"):
        assert (await ask(Authorization=wrong))[1]["code"] == "unauthenticated"
    # A peer with another uid: the kernel's word is replaced, as this test cannot rely on a second user.
    monkeypatch.setattr("atoll.runtime.httpserver._peer_uid", lambda transport: 65534)
    monkeypatch.setattr(auth.os, "geteuid", lambda: 0)
    status, found = await ask()
    assert (status, found["code"]) == (403, "forbidden")


def test_operations_that_change_the_cluster_itself_are_for_administrators() -> None:
    for operation in OPERATIONS.values():
        if (operation.public and operation.noun in ("cluster", "group")) or operation.name in (
            "pool.add",
            "node.remove",
            "node.declare-dead",
        ):
            assert operation.role == "admin", operation.name
