"""A master whose store has no room: it answers reads, refuses changes and says why, harms no guest, and goes on by itself."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from real_master import Served, real_master

from atoll.master import leader

#: Of the file system ``small``.
DISK = "96m"
PAGE = 4096
GIB, MIB = 1 << 30, 1 << 20
INSTANCE = {"template": "shared", "disks": [{"size": GIB}], "memory": 128 * MIB, "append": "x" * 40_000}


def fill(path: Path, pages: int) -> None:
    with (path / "filler").open("ab") as file:
        while (free := os.statvfs(path).f_bavail) > pages:
            try:
                os.write(file.fileno(), bytes(PAGE * (free - pages)))
            except OSError:
                continue  # the master was faster


def done(served: Served, method: str, path: str, body: object, seconds: float = 60.0) -> str:
    """The state in which the job of a request ends."""
    told = served.json(method, path, body)
    assert "job" in told, told
    return ended(served, told["job"], seconds)


def ended(served: Served, job: int, seconds: float = 60.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        row = served.json("GET", f"/v1/jobs/{job}?wait=2")
        if row.get("code") == "not_found":
            return "done"  # and cleaned up: only what is done or undone goes
        if row["state"] not in ("waiting", "running"):
            return str(row["state"])
    raise AssertionError(f"job {job} does not end: {row}")


def runs(served: Served, name: str, seconds: float = 60.0) -> None:
    """Until a node has reported it."""
    end = time.monotonic() + seconds
    while (row := served.json("GET", f"/v1/instances/{name}"))["state"] != "running":
        assert time.monotonic() < end, row
        time.sleep(0.1)


@pytest.mark.root
def test_no_room_for_the_store(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It also cleans up, all the time.
    monkeypatch.setattr(leader, "CLEAN_PERIOD", 0.05)
    monkeypatch.setattr(leader, "KEEP_JOBS", 4)
    with real_master(small, 2) as served:
        pool = {"name": "shared", "driver": "sharedfile", "options": {"path": "/box/shared", "mount": "none"}}
        assert done(served, "POST", "/v1/pools", pool) == "done"
        assert done(served, "POST", "/v1/instances", {"name": "before", **INSTANCE}) == "done"
        accepted = []
        for pages in (40, 25, 15, 8, 4, 2, 1, 0):
            # The disk is full in the middle of a job: after some of its writes.
            fill(small, pages)
            # The store's files have room of their own for a while, where jobs were that are cleaned up. Instances stay: more of them than
            # the whole disk has room for are not taken.
            for number in range(220):
                more = {"append": "x" * 900_000} if number >= 60 else {}
                if number % 20 == 19:
                    # What the store gives back when it folds its log in is taken, too.
                    fill(small, pages)
                status, kind, answer = served.ask("POST", "/v1/instances", {"name": f"web-{pages}-{number}", **INSTANCE, **more})
                told = json.loads(answer)
                if status == 202:
                    accepted.append((told["job"], f"web-{pages}-{number}"))
                    continue
                assert (status, kind, told["code"]) == (507, "application/problem+json", "store_full")
                assert "nothing was written" in told["detail"]
                assert "df" in told["hint"]
                break
            else:
                jobs = [(row["id"], row["state"], row["summary"], row["error"]) for row in served.json("GET", "/v1/jobs")["items"][:5]]
                files = {entry.name: entry.stat().st_size for entry in small.rglob("*") if entry.is_file()}
                pytest.fail(f"it was never full: {pages}, {os.statvfs(small).f_bavail}, {files}, {jobs}")
            # Everything can be looked at, and what runs runs.
            for path in ("/v1/cluster", "/v1/instances", "/v1/jobs", "/v1/nodes", "/v1/cluster/verify", "/metrics"):
                assert served.ask("GET", path)[0] == 200, path
            runs(served, "before")
            (small / "filler").unlink()
            assert done(served, "POST", "/v1/instances", {"name": f"again-{pages}", **INSTANCE}) == "done"
        # Jobs that were accepted go to their end, without a restart and without a word of anybody; those refused are not there.
        for job, name in accepted:
            assert ended(served, job) == "done", name
        names = {row["name"] for row in served.json("GET", "/v1/instances")["items"]}
        assert names == {"before", *(name for _, name in accepted), *(f"again-{pages}" for pages in (40, 25, 15, 8, 4, 2, 1, 0))}
        over = [task.get_coro().__qualname__ for task in served.box.master._tasks if task.done()]
        assert over == ["MasterLeader._take_up"], "a loop of the master has ended"
        for name in names:
            runs(served, name)
        assert served.json("GET", "/v1/cluster/verify") == {"findings": []}
