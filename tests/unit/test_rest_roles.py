"""Every credential on every route. The routes are those of the app, so a new one that nobody has thought of fails here."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fastapi.routing import APIRoute
from real_master import real_master
from rest_fakes import FakeLeader, fake_leader, ident, served

from atoll.api.rest.app import create_app
from atoll.api.rest.submit import address
from atoll.operations.all import OPERATIONS
from atoll.operations.views import KINDS
from atoll.runtime import certs, tls

RANK = {"reader": 1, "operator": 2, "admin": 3}
TOKENS = {"read": "reader", "operate": "operator", "admin": "admin"}

#: What is needed for the routes that no operation stands for. ``agent`` is for nodes, ``anybody`` checks something else.
OTHERS: dict[tuple[str, str], str] = {
    ("GET", "/v1/cluster"): "reader",
    ("GET", "/v1/cluster/verify"): "reader",
    ("GET", "/v1/cluster/audit"): "admin",
    ("GET", "/v1/cluster/doctor"): "operator",
    ("GET", "/v1/nodes/{target}/logs"): "admin",
    ("GET", "/v1/events"): "reader",
    ("GET", "/v1/os"): "reader",
    ("GET", "/v1/groups/{target}/storage-plan"): "reader",
    ("GET", "/v1/storages/{target}/status"): "reader",
    ("GET", "/v1/pools/{target}/images"): "reader",
    ("GET", "/metrics"): "reader",
    **{("GET", f"/v1/{noun}s"): "reader" for noun in KINDS},
    **{("GET", f"/v1/{noun}s/{{target}}"): "reader" for noun in KINDS},
    ("POST", "/v1/jobs/{target}/cancel"): "operator",
    ("POST", "/v1/jobs/{target}/undo"): "operator",
    ("POST", "/v1/jobs/{target}/resume"): "operator",
    ("POST", "/v1/nodes/token"): "admin",
    ("POST", "/v1/tokens"): "admin",
    ("GET", "/v1/tokens"): "admin",
    ("DELETE", "/v1/tokens/{target}"): "admin",
    ("POST", "/agent/v1/join"): "anybody",
    ("POST", "/agent/v1/report"): "agent",
    ("GET", "/agent/v1/facts"): "agent",
    ("GET", "/v1/openapi.json"): "anybody",
    ("HEAD", "/v1/openapi.json"): "anybody",
}


def needed() -> dict[tuple[str, str], str]:
    return {**{address(o): o.role for o in OPERATIONS.values() if o.public}, **OTHERS}


def routes(leader: FakeLeader) -> set[tuple[str, str]]:
    """All of the app, whatever kind they are."""
    found = set()
    for route in _flat(create_app(leader).routes):
        found |= {(method, route.path) for method in route.methods or ()}
    return found


def _flat(routes: Any) -> list[Any]:
    found = []
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        found += _flat(inner) if inner else [route]
    return found


class Served:
    def __init__(self, leader: FakeLeader, port: int, ca: certs.KeyPair, place: Path) -> None:
        self.leader, self.port, self.ca, self.place = leader, port, ca, place

    def session(self, role: str = "", ident: str = "") -> aiohttp.ClientSession:
        """A client, with a certificate if a role is named."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem)
        if role:
            pair = certs.issue(self.ca, role, ident, "node2", ["10.0.0.2"])  # type: ignore[arg-type]
            certs.save(self.place / role, self.ca.cert_pem, pair.cert_pem, pair.key_pem)
            context = tls.client_context(self.place / role)
            if role == "node":
                self.leader.serials[certs.serial(pair.cert_pem)] = ident
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, limit=8))

    async def ask(self, session: aiohttp.ClientSession, method: str, path: str, token: str | None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"https://127.0.0.1:{self.port}{path.replace('{target}', 'web1')}"
        body = {} if method in ("POST", "DELETE") else None
        async with session.request(method, url, json=body, headers=headers) as answer:
            if answer.content_type == "text/event-stream":
                return answer.status, ""  # it has no end
            text = await answer.text()
            code = (await answer.json(content_type=None)).get("code", "") if text.startswith("{") else ""
            return answer.status, code


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    ca = certs.create_ca("lagoon")
    server = certs.issue(ca, "master", ident("node", 1), "node1", ["127.0.0.1"])
    certs.save(tmp_path / "tls", ca.cert_pem, server.cert_pem, server.key_pem)
    leader = await fake_leader()
    async with served(leader, tmp_path, host="127.0.0.1", port=0, tls_dir=tmp_path / "tls") as (_, port):
        assert port
        yield Served(leader, port, ca, tmp_path)


async def test_no_route_is_forgotten() -> None:
    leader = await fake_leader()
    assert routes(leader) == set(needed())
    assert any(isinstance(route, APIRoute) for route in _flat(create_app(leader).routes))


async def test_tokens_of_each_role_on_every_route(api: Served) -> None:
    wrong = []
    async with api.session() as session:
        for (method, path), role in sorted(needed().items()):
            answers = await asyncio.gather(*(api.ask(session, method, path, token) for token in (None, "unknown", *TOKENS)))
            for token, (status, code) in zip((None, "unknown", *TOKENS), answers, strict=True):
                has = TOKENS.get(token or "")
                if role in ("anybody", "agent"):
                    # A token is worth nothing there; joining checks the body first.
                    good = code == "unauthenticated" if role == "agent" else status in (200, 422)
                elif has is None:
                    good = (status, code) == (401, "unauthenticated")
                elif RANK[has] < RANK[role]:
                    good = (status, code) == (403, "forbidden")
                else:
                    good = status not in (401, 403) and status < 500
                if not good:
                    wrong.append((method, path, role, token, status, code))
    assert not wrong
    # Nothing was done for those who may not: every job is of a caller with the right.
    for operation, _, _, who, _ in api.leader.asked:
        assert RANK[who.role] >= RANK[OPERATIONS[operation].role]


async def test_certificates_on_every_route(api: Served) -> None:
    """A node's opens its heartbeat and nothing else; a master's nothing at all; with or without an administrator's token."""
    wrong = []
    for role, who in (("node", ident("node", 2)), ("master", ident("node", 1))):
        async with api.session(role, who) as session:
            for (method, path), needs in sorted(needed().items()):
                if needs == "anybody":
                    continue
                for token in (None, "admin"):
                    status, code = await api.ask(session, method, path, token)
                    # A node may report, but not this report.
                    reports = needs == "agent" and role == "node"
                    allowed = status == 200 if method == "GET" else code == "invalid_input"
                    good = allowed if reports else (status, code) == (403, "forbidden")
                    if not good:
                        wrong.append((role, method, path, token, status, code))
    assert not wrong
    assert api.leader.asked == []


def test_tokens_of_a_real_master_good_revoked_and_expired(tmp_path: Path) -> None:
    """Tokens that a master has made, on every route; the last word on each is the master's own records and clock."""
    wrong = []
    with real_master(tmp_path, nodes=1) as master:
        tokens: dict[str, str] = {}
        for role in RANK:
            for state in ("good", "revoked", "expired"):
                body = {"name": f"{role}-{state}", "role": role, **({"days": 1} if state == "expired" else {})}
                tokens[f"{role} {state}"] = master.json("POST", "/v1/tokens", body)["token"]
            assert master.ask("DELETE", f"/v1/tokens/{role}-revoked")[0] == 200
        master.box.clock.offset += 2 * 86400
        tokens["none unknown"] = "nobody-made-this"
        for (method, path), needs in sorted(needed().items()):
            if needs in ("anybody", "agent"):
                continue
            for label, token in tokens.items():
                role, state = label.split()
                address = path.replace("{target}", "web1") + ("?dry_run=true" if method in ("POST", "DELETE") else "")
                status, _, answer = master.ask(method, address, {} if method == "POST" else None, {"Authorization": f"Bearer {token}"})
                if state != "good":
                    good = status == 401
                elif RANK[role] < RANK[needs]:
                    good = status == 403
                else:
                    good = status not in (401, 403) and status < 500
                if not good:
                    wrong.append((method, path, needs, label, status, answer[:200]))
        assert not wrong
        # Nobody's token has done anything but what was dry.
        assert master.json("GET", "/v1/jobs")["items"] == []
