"""The REST API over a real Unix socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rest_fakes import FakeLeader, Script, fake_leader, ident, served

from atoll.api.leader import Finding
from atoll.api.rest.submit import address
from atoll.model.errors import NotLeader, PoolFull, all_errors
from atoll.model.messages import Progress, Space
from atoll.operations.all import OPERATIONS

FIELDS = {"type", "title", "status", "detail", "code", "hint", "instance", "details"}


class Api:
    """The served leader and a client."""

    def __init__(self, leader: FakeLeader, session: aiohttp.ClientSession, path: str) -> None:
        self.leader, self.session, self.path = leader, session, path

    async def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any, Any]:
        data = json.dumps(body) if body is not None else more.pop("raw", None)
        async with self.session.request(method, f"http://localhost{path}", data=data, **more) as answer:
            found = await answer.json(content_type=None)
            if answer.status >= 400:
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert set(found) == FIELDS
                assert found["status"] == answer.status
                assert found["hint"]
                assert found["detail"]
                assert found["title"]
            return answer.status, found, answer.headers


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    leader = await fake_leader()
    async with served(leader, tmp_path) as (path, _), aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=path)) as session:
        yield Api(leader, session, path)


async def test_every_public_operation_has_a_route_that_submits_it(api: Api) -> None:
    example = {
        "name": "x1",
        "driver": "file",
        "pool": "images",
        "new_name": "x2",
        "node": "node2",
        "nodes": ["node1"],
        "group": "default",
        "state": "ready",
        "volume": "spare",
        "disk": {"size": 1024},
        "path": "/srv/x1.atoll",
        "type": "ceph",
        "disks": ["/dev/sdd"],
    }
    for name, operation in OPERATIONS.items():
        method, path = address(operation)
        needed = {field: example[field] for field, info in operation.request.model_fields.items() if info.is_required()}
        status, found, headers = await api(method, path.replace("{target}", "thing"), needed)
        if not operation.public:
            assert status == 404, name
            continue
        assert status == 202, (name, found)
        assert headers["Location"] == f"/v1/jobs/{found['job']}"
        assert found["repeated"] is False
        asked, target, request, who, _ = api.leader.asked[-1]
        assert (asked, target) == (name, "thing" if "{target}" in path else "")
        assert who.name == "root"
        assert request == operation.request.model_validate(needed).model_dump(mode="json")


async def test_an_idempotency_key_gives_the_same_job_again(api: Api) -> None:
    body = {"name": "web2", "template": "sharedfile"}
    _, first, _ = await api("POST", "/v1/instances", body, headers={"Idempotency-Key": "k1"})
    status, second, _ = await api("POST", "/v1/instances", body, headers={"Idempotency-Key": "k1"})
    assert (status, second["job"], second["repeated"]) == (202, first["job"], True)
    status, found, _ = await api("POST", "/v1/instances", {"name": "web3"}, headers={"Idempotency-Key": "k1"})
    assert (status, found["code"]) == (409, "idempotency_key_reused")
    status, found, _ = await api("POST", "/v1/instances", body, headers={"Idempotency-Key": "k" * 256})
    assert (status, found["code"]) == (422, "invalid_input")


async def test_a_dry_run_makes_no_job(api: Api) -> None:
    status, found, _ = await api("POST", "/v1/instances?dry_run=true", {"name": "web2"})
    assert status == 200
    assert found == {"job": None, "summary": "instance add web2", "repeated": False, "shared": ["node:x"], "exclusive": ["instance:y"]}
    assert (await api("GET", "/v1/jobs"))[1]["items"] == []


@pytest.mark.parametrize(
    ("raw", "status", "code", "words"),
    [
        (b"{", 400, "malformed_request", "not JSON"),
        (b"[1]", 400, "malformed_request", "array"),
        (b'"x"', 400, "malformed_request", "string"),
        (b"\xff\xfe", 400, "malformed_request", "UTF-8"),
        (b'{"name": NaN}', 400, "malformed_request", "NaN"),
        (b"[" * 100_000, 400, "malformed_request", ""),
        (b"{}", 422, "invalid_input", "name: field required"),
        (b'{"name": 5}', 422, "invalid_input", "name: input should be a valid string"),
        (b'{"name": "x", "nonsense": 1}', 422, "invalid_input", "nonsense: extra inputs are not permitted"),
        (b'{"name": "x", "disks": [{"size": 0}]}', 422, "invalid_input", "disks.0.size: input should be greater than 0"),
        (b'{"name": "x", "disks": [{"size": 1152921504606846977}]}', 422, "invalid_input", "disks.0.size"),
        (b'{"name": "x", "pad": "' + b"x" * (1 << 20) + b'"}', 413, "request_too_large", "1048576"),
    ],
)
async def test_bad_bodies_are_problems_and_change_nothing(api: Api, raw: bytes, status: int, code: str, words: str) -> None:
    got, found, _ = await api("POST", "/v1/instances", raw=raw)
    assert (got, found["code"]) == (status, code)
    assert words in found["detail"]
    assert api.leader.asked == []


async def test_an_endless_body_is_refused_before_it_ends(api: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    status, found, _ = await api("POST", "/v1/instances", raw=chunks())
    assert (status, found["code"]) == (413, "request_too_large")


async def test_unknown_addresses_and_methods_are_problems(api: Api) -> None:
    assert (await api("GET", "/v1/nonsense"))[1]["code"] == "not_found"
    assert (await api("GET", "/"))[1]["code"] == "not_found"
    status, found, headers = await api("PUT", "/v1/instances")
    assert (status, found["code"]) == (405, "method_not_allowed")
    assert "POST" in headers["Allow"] or "GET" in headers["Allow"]
    status, found, _ = await api("GET", "/v1/instances/nothing")
    assert (status, found["code"], found["detail"]) == (404, "not_found", "there is no instance 'nothing'")
    assert (await api("GET", "/v1/jobs/abc"))[0] == 404
    assert (await api("GET", "/v1/nodes?limit=0"))[1]["detail"] == "limit: input should be greater than or equal to 1"


async def test_what_the_leader_refuses_keeps_code_hint_and_details(api: Api) -> None:
    api.leader.refuse = PoolFull("pool images has 1G free, 10G are needed", hint="atoll pool info images", free=1, needed=10)
    status, found, _ = await api("POST", "/v1/instances", {"name": "web2"})
    assert (status, found["code"], found["hint"]) == (507, "pool_full", "atoll pool info images")
    assert found["details"] == {"free": 1, "needed": 10}
    assert found["instance"] == "/v1/instances"
    api.leader.refuse_state = NotLeader("this master was deposed")
    status, found, headers = await api("GET", "/v1/nodes")
    assert (status, found["code"], headers["Retry-After"]) == (503, "not_leader", "1")


async def test_a_bug_is_a_problem_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> list[Finding]:
        raise ZeroDivisionError("secret inner words")

    monkeypatch.setattr(api.leader, "verify", broken)
    status, found, _ = await api("GET", "/v1/cluster/verify")
    assert (status, found["code"]) == (500, "error")
    assert "secret inner words" not in json.dumps(found)


async def test_lists_come_in_pages_and_with_chosen_fields(api: Api) -> None:
    status, page, _ = await api("GET", "/v1/nodes?limit=2&fields=name,state,alive")
    assert status == 200
    assert page == {
        "items": [{"name": "node1", "state": "ok", "alive": True}, {"name": "node2", "state": "ok", "alive": True}],
        "after": "node2",
    }
    _, page, _ = await api("GET", "/v1/nodes?limit=2&fields=name&after=node2")
    assert page == {"items": [{"name": "node3"}], "after": None}
    status, found, _ = await api("GET", "/v1/nodes?fields=name,colour")
    assert (status, found["code"]) == (422, "invalid_input")
    assert "colour" in found["detail"]
    assert "memory_free" in found["hint"]


async def test_objects_are_found_by_name_and_by_id(api: Api) -> None:
    for noun, name, number in (
        ("node", "node1", ident("node", 1)),
        ("volume", "spare", ident("vol", 3)),
        ("instance", "web1", ident("i", 1)),
    ):
        _, by_name, _ = await api("GET", f"/v1/{noun}s/{name}")
        _, by_id, _ = await api("GET", f"/v1/{noun}s/{number}")
        assert by_name == by_id
        assert by_name["id"] == number
    api.leader.space = {(ident("pool", 1), ""): Space(total=100, free=40)}
    _, pool, _ = await api("GET", "/v1/pools/images")
    assert (pool["total"], pool["free"], pool["volumes"]) == (100, 40, 2)
    assert (await api("GET", "/v1/cluster"))[1]["instances"] == 2
    assert (await api("GET", "/v1/groups/default"))[1]["nodes"] == ["node1", "node2", "node3"]


async def test_waiting_for_a_job_answers_when_it_changes(api: Api) -> None:
    api.leader.script = Script(progress=[Progress(percent=10, text="copies")], result={"x": 1})
    _, made, _ = await api("POST", "/v1/instances/web1/stop", {})
    seen = []
    for _ in range(20):
        _, job, _ = await api("GET", f"/v1/jobs/{made['job']}?wait=10")
        seen.append(job)
        if job["state"] == "done":
            break
    assert seen[0]["progress"] == {"percent": 10.0, "text": "copies"}
    assert seen[-1]["result"] == {"x": 1}
    assert seen[-1]["steps"][0]["key"] == "start guest"
    assert seen[-1]["steps"][0]["node"] == "node1"
    assert seen[-1]["locks"]["exclusive"] == ["instance:web1"]
    assert (await api("GET", f"/v1/jobs/{made['job']}?wait=61"))[0] == 422


async def test_jobs_are_steered(api: Api) -> None:
    api.leader.script = Script(state=api.leader.script.state.NEEDS_ATTENTION, reason="node1 is dead?")
    _, made, _ = await api("POST", "/v1/instances/web1/stop", {})
    number = made["job"]
    while (await api("GET", f"/v1/jobs/{number}?wait=5"))[1]["state"] == "running":
        pass
    status, _, _ = await api("POST", f"/v1/jobs/{number}/resume", {"node_is_dead": "node1"})
    assert status == 200
    assert (await api("POST", f"/v1/jobs/{number}/undo"))[0] == 200
    status, found, _ = await api("POST", f"/v1/jobs/{number}/cancel")
    assert (status, found["code"]) == (409, "wrong_state")
    assert api.leader.steered == [("resume", number, "node1"), ("undo", number, None), ("cancel", number, None)]
    assert (await api("POST", "/v1/jobs/99/cancel"))[0] == 404


async def test_tokens_are_made(api: Api) -> None:
    status, found, headers = await api("POST", "/v1/nodes/token", {"name": "node4", "group": "default"})
    assert (status, found["token"]) == (201, "fingerprint.secret-for-node4-in-default")
    assert headers["Cache-Control"] == "no-store"
    status, found, _ = await api("POST", "/v1/tokens", {"name": "ci", "role": "operator"})
    assert (status, found["token"]) == (201, "token-of-ci-operator")
    assert (await api("POST", "/v1/tokens", {"name": "ci", "role": "node"}))[1]["code"] == "invalid_input"


async def test_the_description_names_every_route_and_problem(api: Api) -> None:
    _, found, _ = await api("GET", "/v1/openapi.json")
    schemas = found["components"]["schemas"]
    assert set(schemas["Problem"]["required"]) == FIELDS
    for operation in OPERATIONS.values():
        method, path = address(operation)
        if not operation.public:
            assert path not in found["paths"] or operation.name.replace(".", "_") not in json.dumps(found["paths"][path])
            continue
        described = found["paths"][path][method.lower()]
        reference = described["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.removeprefix("#/components/schemas/") in schemas
        assert ("{target}" in path) == any(p["name"] == "target" for p in described["parameters"])
    text = json.dumps(found)
    for reference in set(part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]):
        assert reference in schemas
    assert "/agent/v1/join" not in found["paths"]


def test_every_code_belongs_to_one_error() -> None:
    ours = [error for error in all_errors() if error.__module__ == "atoll.model.errors"]
    assert len({error.code for error in ours}) == len(ours)


async def test_garbage_instead_of_http_harms_nobody(api: Api) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(api.path)
        sock.sendall(b"\x16\x03\x01\x02\x00garbage\r\n\r\n")
    assert (await api("GET", "/v1/cluster"))[0] == 200


def test_the_problem_statuses_are_http() -> None:
    assert all(error.status in http.client.responses for error in all_errors())


async def test_a_request_may_wait_for_the_end_of_its_job(api: Api) -> None:
    status, made, _ = await api("POST", "/v1/instances/web1/stop?wait=60", {})
    assert (status, made["ended"]["state"]) == (202, "done")
    assert made["ended"] == (await api("GET", f"/v1/jobs/{made['job']}"))[1]
    api.leader.script = Script(gate=asyncio.Event())
    status, made, _ = await api("POST", "/v1/instances/web1/start?wait=0.05", {})
    assert (status, made["ended"]) == (202, None)
    api.leader.script.gate.set()
    assert "ended" not in (await api("POST", "/v1/instances/web1/stop", {}))[1]
    assert (await api("POST", "/v1/instances/web1/stop?wait=61", {}))[0] == 422
