"""The drivers of a node behind their workers: real processes, a real directory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from atoll.model.errors import DeadlineExceeded, InvalidInput, NotFound, PoolUnavailable, Unreachable
from atoll.model.messages import Connection, PoolRef, VolumeStat
from atoll.storage.host import StorageHost

VOLUME = "vol-" + "1" * 17
MIB = 1 << 20


def children(parent: int | None = None) -> set[int]:
    """Worker processes of a process (this one)."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == (parent or os.getpid()) and fields[0] not in "ZX" and b"atoll.runtime.workermain" in command:
            found.add(int(process.name))
    return found


@pytest_asyncio.fixture
async def host() -> AsyncIterator[StorageHost]:
    made = StorageHost()
    yield made
    await made.close()
    assert children() == set()


@pytest.fixture
def ref(tmp_path: Path) -> PoolRef:
    return PoolRef(id="pool-a", name="a", driver="file", options={"path": str(tmp_path)}, node="n", cluster="c")


async def prepared(host: StorageHost, ref: PoolRef) -> None:
    await host.pool(ref, "prepare", 30, create=True)


async def test_the_life_of_a_volume(host: StorageHost, ref: PoolRef, tmp_path: Path) -> None:
    await prepared(host, ref)
    spec = {"volume": VOLUME, "name": "web", "size": MIB}
    logical_id = await host.pool(ref, "create", 30, spec=spec)
    stat = VolumeStat(**await host.pool(ref, "stat", 30, logical_id=logical_id))
    assert (stat.size, stat.volume) == (MIB, VOLUME)
    connection = Connection(**await host.pool(ref, "connection", 30, logical_id=logical_id, volume=VOLUME, size=MIB))
    attached = await host.connector(ref.id, "file", "attach", 30, connection=connection.model_dump(mode="json"), access="userspace")
    assert attached["path"] == str(tmp_path / logical_id)
    await host.pool(ref, "delete", 30, logical_id=logical_id)
    assert await host.pool(ref, "stat", 30, logical_id=logical_id) is None
    with pytest.raises(NotFound, match="no image"):
        await host.pool(ref, "grow", 30, logical_id=logical_id, size=2 * MIB)
    assert await host.pool(ref, "volumes", 30) == []


@pytest.mark.parametrize("method", ["_options", "__init__", "fly"])
async def test_only_the_contracts_methods_can_be_called(host: StorageHost, ref: PoolRef, method: str) -> None:
    with pytest.raises(InvalidInput, match="no method"):
        await host.pool(ref, method, 30)
    with pytest.raises(InvalidInput, match="no method"):
        await host.connector(ref.id, "file", method, 30)


async def test_a_pool_that_hangs_holds_up_no_other(host: StorageHost, ref: PoolRef, tmp_path: Path) -> None:
    await prepared(host, ref)
    for pid in children():
        os.kill(pid, signal.SIGSTOP)
    hanging = asyncio.create_task(host.pool(ref, "volumes", 1.0))
    (tmp_path / "other").mkdir()
    await prepared(host, PoolRef(id="pool-b", name="b", driver="file", options={"path": str(tmp_path / "other")}))
    with pytest.raises(DeadlineExceeded, match="volumes took longer than 1 s"):
        await hanging
    assert await host.pool(ref, "volumes", 30) == []
    assert host.stalled() == {}


async def test_a_stalled_pool_says_so(host: StorageHost, ref: PoolRef, monkeypatch: pytest.MonkeyPatch) -> None:
    await prepared(host, ref)
    worker = host._pools[ref.id].worker
    monkeypatch.setattr(worker, "stalled", lambda: "3 processes hang in the kernel")
    monkeypatch.setattr(worker, "hanging", lambda: ("3 processes hang in the kernel", 61.0))
    with pytest.raises(PoolUnavailable, match="hang in the kernel"):
        await host.pool(ref, "volumes", 30)
    assert host.stalled() == {"pool-a": "3 processes hang in the kernel"}
    assert host.stalled_for() == {"pool-a": 61.0}


async def test_the_probe_lock_is_kept_between_calls(host: StorageHost, ref: PoolRef) -> None:
    await prepared(host, ref)
    for action, answer in (("look", False), ("hold", True), ("look", True), ("drop", True), ("look", False)):
        assert await host.pool(ref, "probe_writers", 30, action=action) is answer
    assert await host.pool(ref, "probe_writers", 30, action="hold")
    # Another node's agent sees it, until the holder dies.
    other = StorageHost()
    try:
        assert await other.pool(ref, "probe_writers", 30, action="look")
        await host.close()
        assert not await other.pool(ref, "probe_writers", 30, action="look")
    finally:
        await other.close()


async def test_a_forgotten_pool_keeps_no_process(host: StorageHost, ref: PoolRef) -> None:
    await prepared(host, ref)
    await host.pool(ref, "probe_writers", 30, action="hold")
    assert len(children()) == 2
    await host.pool(ref, "forget", 30)
    assert children() == set()
    await prepared(host, ref)


async def test_a_closed_host_starts_nothing(host: StorageHost, ref: PoolRef) -> None:
    await prepared(host, ref)
    await host.close()
    with pytest.raises(Unreachable, match="closed"):
        await host.pool(ref, "volumes", 30)


AGENT = """
import asyncio, os, sys
sys.path.insert(0, {here!r})
from atoll.runtime.worker import Worker
async def main():
    worker = Worker("x", "worker_calls")
    print((await worker.call("echo", 30, value=1))["pid"], flush=True)
    await worker.call("hang", 600)
asyncio.run(main())
"""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_workers_end_with_their_agent_even_in_the_middle_of_a_call() -> None:
    here = str(Path(__file__).parent)
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    with subprocess.Popen([sys.executable, "-c", AGENT.format(here=here)], stdout=subprocess.PIPE, text=True, env=environment) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        # It has taken the call when it sleeps in it, and not in read() on its socket.
        until(lambda: "nanosleep" in Path(f"/proc/{pid}/wchan").read_text())
        agent.kill()
        agent.wait(20)
    until(lambda: not Path(f"/proc/{pid}").exists())
