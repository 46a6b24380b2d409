"""The audit log: what is written, what never is, and what happens when it cannot be."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rest_fakes import FakeLeader, Script, fake_leader

from atoll.api.rest.app import create_app
from atoll.master import auditing
from atoll.model.errors import PoolFull
from atoll.model.objects import Job, JobState
from atoll.runtime import audit
from atoll.runtime.audit import AuditLog
from atoll.runtime.httpserver import listening


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    made = AuditLog(tmp_path / "log" / "audit.jsonl", lambda: 1_800_000_000.5, size=2000, keep=3)
    yield made
    made.close()


# --- the file ---


def test_entries_are_appended_with_their_time_and_without_secrets(log: AuditLog, tmp_path: Path) -> None:
    log.add({"who": "ada", "request": {"name": "x", "token": "s3cret", "options": {"user_password": "s3cret", "path": "/a"}}})
    log.close()
    again = AuditLog(tmp_path / "log" / "audit.jsonl", lambda: 1_800_000_001.0)
    again.add({"who": "bob\nforged"})
    assert again.flush()
    again.close()
    path = tmp_path / "log" / "audit.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "s3cret" not in path.read_text()
    first, second = lines(path)
    assert (first["at"], first["request"]["options"]["path"]) == ("2027-01-15T08:00:00.500Z", "/a")
    assert second["who"] == "bob\nforged"


def test_files_are_turned_and_the_oldest_goes(log: AuditLog, tmp_path: Path) -> None:
    for number in range(100):
        log.add({"n": number, "pad": "x" * 100})
        assert log.flush()
    names = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3"]
    assert [entry["n"] for entry in log.newest(20)] == list(range(80, 100))
    found = [entry["n"] for entry in log.newest(1000)]
    assert found == list(range(found[0], 100))
    assert [entry["n"] for entry in log.newest(2, lambda entry: entry["n"] % 10 == 0)] == [80, 90]


def test_a_full_disk_stops_nobody_and_is_told(log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.add({"n": 0})
    assert log.flush()
    real, wrote = os.write, []

    def full(handle: int, data: bytes) -> int:
        if not wrote:
            wrote.append(real(handle, data[:7]))  # the last bytes of room
            return wrote[0]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(audit.os, "write", full)
    for number in (1, 2, 3):
        log.add({"n": number})
        assert log.flush()
    assert (log.lost, "No space left" in log.trouble) == (3, True)
    (found,) = auditing.findings(log)
    assert found.severity == "error"
    assert "3 entries are lost" in found.why
    assert [entry["n"] for entry in log.newest(10)] == [0]
    monkeypatch.setattr(audit.os, "write", real)
    log.add({"n": 4})
    assert log.flush()
    assert (log.lost, log.trouble, auditing.findings(log)) == (0, "", [])
    first, lost, last = log.newest(10)
    assert (first["n"], last["n"]) == (0, 4)
    assert (lost["event"], lost["entries"]) == ("lost", 3)


def test_a_device_that_is_full_for_real(tmp_path: Path) -> None:
    log = AuditLog(Path("/dev/full"), lambda: 0.0)
    log.add({"n": 1})
    assert log.flush()
    assert "No space left" in log.trouble
    log.close()


def test_a_disk_that_hangs_keeps_nobody_waiting(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go = threading.Event()
    real = os.write

    def hang(handle: int, data: bytes) -> int:
        go.wait(30)
        return real(handle, data)

    monkeypatch.setattr(audit.os, "write", hang)
    monkeypatch.setattr(audit, "WAITING", 50)
    for number in range(200):
        log.add({"n": number})
    assert not log.flush(0.1)
    assert log.lost >= 149
    go.set()
    assert log.flush()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    log = AuditLog(tmp_path / "audit.jsonl", lambda: 0.0)
    log.add({"n": 1})
    assert log.flush()
    assert log.trouble
    assert not (tmp_path / "elsewhere").exists()
    log.close()


def test_jobs_tell_how_they_end(log: AuditLog) -> None:
    listener = auditing.ends_of_jobs(log)
    queued = Job(id="0000000007", operation="instance.add", who="ada", summary="add web1")
    done = queued.model_copy(update={"state": JobState.DONE})
    failed = queued.model_copy(update={"state": JobState.UNDONE, "error": PoolFull("full").to_wire()})
    for before, after in ((None, queued), (queued, done), (done, done), (done, None), (queued, failed)):
        listener(before, after)
    assert log.flush()
    assert [(e["event"], e["job"], e["state"], e.get("code")) for e in log.newest(9)] == [
        ("job", 7, "done", None),
        ("job", 7, "undone", "pool_full"),
    ]


# --- requests ---


class Api:
    def __init__(self, leader: FakeLeader, log: AuditLog, path: str) -> None:
        self.leader, self.log, self.path = leader, log, path

    async def __call__(
        self, method: str, path: str, body: Any = None, token: str | None = None, raw: bytes | None = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=self.path)) as session,
            session.request(method, f"http://localhost{path}", json=body, data=raw, headers=headers) as answer,
        ):
            return answer.status, await answer.json(content_type=None)

    def entries(self) -> list[dict[str, Any]]:
        assert self.log.flush()
        return self.log.newest(1000)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    leader = await fake_leader()
    log = AuditLog(tmp_path / "audit.jsonl", lambda: 1_800_000_000.0)
    path = tmp_path / "api.sock"
    async with listening(create_app(leader, log=log), socket_path=path):
        yield Api(leader, log, str(path))
    log.close()


async def test_who_asked_what_and_what_came_of_it(api: Api) -> None:
    await api("POST", "/v1/instances", {"name": "web2", "template": "sharedfile"}, token="operate")
    await api("POST", "/v1/groups", {"name": "g"}, token="operate")
    await api("POST", "/v1/instances/web1/stop", {}, token="nobody")
    await api("POST", "/v1/instances/web1/stop", {"nonsense": 1})
    api.leader.script = Script()
    made, role, unknown, bad = api.entries()
    assert (made["who"], made["role"], made["method"], made["path"]) == ("olga", "operator", "POST", "/v1/instances")
    assert (made["status"], made["job"], made["request"]) == (202, 1, {"name": "web2", "template": "sharedfile"})
    assert made["from"].startswith("socket, uid ")
    assert (role["who"], role["status"], role["code"]) == ("olga", 403, "forbidden")
    assert (unknown["who"], unknown["status"], unknown["code"]) == ("", 401, "unauthenticated")
    assert (bad["status"], bad["code"]) == (422, "invalid_input")
    assert bad["who"]


async def test_plain_reads_are_not_written_but_refused_ones_are(api: Api) -> None:
    for path in ("/v1/cluster", "/v1/instances", "/v1/instances/nothing", "/v1/openapi.json"):
        await api("GET", path, token="read" if "openapi" not in path else None)
    assert api.entries() == []
    await api("GET", "/v1/cluster", token="nobody")
    await api("GET", "/v1/tokens", token="read")
    assert [(e["path"], e["status"]) for e in api.entries()] == [("/v1/cluster", 401), ("/v1/tokens", 403)]


async def test_secrets_that_are_given_or_shown_are_not_in_it(api: Api) -> None:
    status, made = await api("POST", "/v1/tokens", {"name": "ci", "role": "operator"}, token="admin")
    assert status == 201
    await api("POST", "/v1/nodes/token", {"name": "node9"}, token="admin")
    await api("POST", "/agent/v1/join", {"token": "fp.s3cret", "name": "node9", "address": "10.0.0.9", "csr": "PEM"})
    await api("POST", "/v1/pools", {"name": "p", "driver": "file", "options": {"password": "s3cret"}}, token="admin")
    await api("POST", "/v1/pools", raw=b'{"token": "s3cret"', token="admin")
    await api("POST", "/v1/pools", raw=b'["s3cret"]', token="admin")
    await api("POST", "/v1/pools", raw=b"{" + b" " * 9000 + b'"x": "s3cret"}', token="admin")
    text = api.log._path.read_text() if api.entries() else ""
    assert made["token"] not in text
    assert "s3cret" not in text
    assert "Bearer" not in text
    token, node, join, pool, *rest = api.entries()
    assert token["request"] == {"name": "ci", "role": "operator"}
    assert (node["path"], node["status"]) == ("/v1/nodes/token", 201)
    assert (join["path"], join["request"]["name"], join["request"]["token"]) == ("/agent/v1/join", "node9", "***")
    assert pool["request"]["options"] == {"password": "***"}
    assert [e["request"] for e in rest] == ["not JSON", "not an object", "more than 8192 bytes"]


async def test_looking_at_the_log_needs_an_admin_and_is_written_too(api: Api) -> None:
    await api("POST", "/v1/instances/web1/stop", {}, token="operate")
    assert (await api("GET", "/v1/cluster/audit", token="operate"))[0] == 403
    assert api.log.flush()
    status, found = await api("GET", "/v1/cluster/audit?who=olga&path=stop", token="admin")
    assert (status, [e["path"] for e in found["items"]]) == (200, ["/v1/instances/web1/stop"])
    assert (await api("GET", "/v1/cluster/audit?since=2099", token="admin"))[1]["items"] == []
    looked = [e for e in api.entries() if e["path"] == "/v1/cluster/audit"]
    assert [(e["who"], e["status"]) for e in looked] == [("olga", 403), ("ada", 200), ("ada", 200)]
    assert looked[1]["query"] == "who=olga&path=stop"
