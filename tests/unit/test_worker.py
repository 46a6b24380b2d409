"""Calls that may hang, in processes that can be killed."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atoll.model.errors import DeadlineExceeded, HostError, PoolFull, PoolUnavailable, Unreachable
from atoll.runtime import worker as module
from atoll.runtime.worker import Worker

HERE = str(Path(__file__).parent)


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))
    found = Worker("pool x", "worker_calls")
    yield found
    await found.close()


async def test_a_result_comes_back_and_the_child_is_kept(worker: Worker) -> None:
    first = await worker.call("echo", 20, value=[1, "a"])
    second = await worker.call("echo", 20, value=None)
    assert first["value"] == [1, "a"]
    assert first["pid"] == second["pid"] != os.getpid()


async def test_a_call_tells_how_far_it_is(worker: Worker) -> None:
    told: list[float] = []
    assert await worker.call("slow", 20, told.append) == "done"
    assert told == [10.0, 60.0]


async def test_errors_keep_their_kind(worker: Worker) -> None:
    with pytest.raises(PoolFull, match="no room") as caught:
        await worker.call("full", 20)
    assert caught.value.hint == "make room"
    with pytest.raises(HostError, match="ZeroDivisionError: oops"):
        await worker.call("bug", 20)


async def test_a_call_that_hangs_ends_at_its_deadline_and_the_next_one_works(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    with pytest.raises(DeadlineExceeded):
        await worker.call("hang", 0.3)
    assert not Path(f"/proc/{pid}").exists()
    assert (await worker.call("echo", 20, value=2))["value"] == 2
    assert worker.stalled() == ""


async def test_a_child_that_dies_leaves_the_outcome_unknown(worker: Worker) -> None:
    with pytest.raises(Unreachable):
        await worker.call("die", 20)
    assert (await worker.call("echo", 20, value=2))["value"] == 2


async def test_a_killed_child_leaves_the_outcome_unknown(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    task = asyncio.ensure_future(worker.call("nap", 20, seconds=10))
    await asyncio.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unreachable):
        await task


async def test_a_slow_call_does_not_hold_up_a_quick_one(worker: Worker) -> None:
    slow = asyncio.ensure_future(worker.call("nap", 30, seconds=1.5))
    await asyncio.sleep(0)
    await worker.call("echo", 20, value=1)
    assert not slow.done()
    await slow


async def test_waiting_for_a_free_child_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))
    narrow = Worker("pool x", "worker_calls", lanes=1)
    await narrow.call("echo", 20, value=1)
    slow = asyncio.ensure_future(narrow.call("nap", 30, seconds=4))
    await asyncio.sleep(0.1)
    with pytest.raises(DeadlineExceeded, match="other calls"):
        await narrow.call("echo", 0.2, value=1)
    await slow
    await narrow.close()


async def test_a_cancelled_call_ends_its_child(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    task = asyncio.ensure_future(worker.call("hang", 60))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()


async def test_too_many_abandoned_children_stall_the_pool(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    async def unkillable(child: module._Child) -> bool:
        kept.append(child.process)
        return False

    real = module._Child.kill
    monkeypatch.setattr(module._Child, "kill", unkillable)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            await worker.call("hang", 0.3)
    assert "hang in the kernel" in worker.stalled()
    with pytest.raises(PoolUnavailable, match="stalled"):
        await worker.call("echo", 5, value=1)
    monkeypatch.setattr(module._Child, "kill", real)
    kept[0].kill()
    kept[0].wait()
    assert worker.stalled() == ""
    assert (await worker.call("echo", 20, value=1))["value"] == 1
    for process in kept[1:]:
        process.kill()
        process.wait()


async def test_close_leaves_no_process(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    await worker.close()
    assert not Path(f"/proc/{pid}").exists()


async def test_an_idle_child_that_died_is_replaced_unnoticed(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    os.kill(pid, signal.SIGKILL)
    await _gone(pid)
    assert (await worker.call("echo", 20, value=2))["value"] == 2


async def _gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while True:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path(f"/proc/{pid}").exists() else "X"
            if state in "ZX":
                return
            await asyncio.sleep(0.02)


async def test_a_stopped_child_is_killed_at_the_deadline(worker: Worker) -> None:
    pid = (await worker.call("echo", 20, value=1))["pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        await worker.call("echo", 0.5, value=2)
    await _gone(pid)


async def test_what_a_call_started_ends_with_it(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        await worker.call("fork_and_hang", 2.0, path=str(tmp_path / "pid"))
    await _gone(int((tmp_path / "pid").read_text()))


async def test_waiting_and_working_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))
    narrow = Worker("pool x", "worker_calls", lanes=1)
    await narrow.call("echo", 20, value=1)
    slow = asyncio.ensure_future(narrow.call("nap", 30, seconds=2))
    await asyncio.sleep(0)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="took longer"):
        await narrow.call("hang", 5.0)
    # With a deadline for each it would be nine seconds; the rest is what a busy machine may need to kill a process.
    assert time.monotonic() - start < 8
    await slow
    await narrow.close()


async def test_there_are_never_more_processes_than_lanes(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    async def unkillable(child: module._Child) -> bool:
        kept.append(child.process)
        return False

    real = module._Child.kill
    monkeypatch.setattr(module._Child, "kill", unkillable)
    results = await asyncio.gather(*(worker.call("hang", 0.5) for _ in range(6)), return_exceptions=True)
    assert all(isinstance(result, (DeadlineExceeded, PoolUnavailable)) for result in results)
    assert len(kept) == 3
    monkeypatch.setattr(module._Child, "kill", real)
    # One that comes back after all gives its lane back at once: the call that waits for it goes on.
    for process in kept:
        process.kill()
    async with asyncio.timeout(10):
        while True:
            if not worker.stalled():
                break
            await asyncio.sleep(0.02)
    assert (await worker.call("echo", 20, value=1))["value"] == 1


async def test_a_closed_worker_starts_nothing(worker: Worker) -> None:
    under_way = asyncio.ensure_future(worker.call("nap", 30, seconds=20))
    await worker.call("echo", 20, value=1)
    await worker.close()
    with pytest.raises(Unreachable):
        await under_way
    with pytest.raises(Unreachable, match="closed"):
        await worker.call("echo", 20, value=1)


async def test_many_calls_share_the_lanes(worker: Worker) -> None:
    pids = {result["pid"] for result in await asyncio.gather(*(worker.call("echo", 30, value=n) for n in range(40)))}
    assert 1 <= len(pids) <= 3


def test_a_zombie_has_ended() -> None:
    """Whose parent is whoever inherits the orphans of an agent that was killed, and may not look after them for long."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{process.pid}")
    assert module._ended(process.pid) == 0
    process.wait()
    assert module._ended(process.pid) == 0
    assert module._ended(os.getpid()) is None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("space", ["ours", "another"])
def test_workers_of_other_nodes_on_this_kernel_are_not_left_behind(space: str) -> None:
    """There their parents have other numbers."""
    words = ["-c", "import time; print(flush=True); time.sleep(300)", "atoll.runtime.workermain", "3", "calls", "1", "the-key"]
    command = [sys.executable, *words]
    if space == "another":
        command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", f"exec {shlex.join(command)}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert module._left_behind("calls", "the-key") == ([process.pid] if space == "ours" else [])
        finally:
            process.kill()
