"""A pool whose storage gives no answer: it is said so, calls are refused at once, others are not disturbed, and it comes back by itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from atoll.model.errors import DeadlineExceeded, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.runtime import worker as workers
from atoll.storage import host as module
from atoll.storage.host import StorageHost

HERE = str(Path(__file__).parent)


@pytest_asyncio.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StorageHost]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))
    monkeypatch.setattr(module, "_MODULE", "stall_calls")
    monkeypatch.setattr(module, "SILENT", 0.5)
    monkeypatch.setattr(module, "PROBE", 0.2)
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    made = StorageHost()
    yield made
    await made.close()


def ref(path: Path, name: str = "nas") -> PoolRef:
    path.mkdir(exist_ok=True)
    return PoolRef(id=f"pool-{name}", name=name, driver="file", options={"path": str(path)}, node="n", cluster="c")


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if true():
                return
            await asyncio.sleep(0.02)


async def silent(host: StorageHost, pool: PoolRef) -> None:
    """Until it is stalled."""
    await host.pool(pool, "stat", 20)
    (Path(pool.options["path"]) / "hangs").touch()
    with pytest.raises(DeadlineExceeded):
        await host.pool(pool, "stat", 0.6)


async def test_without_an_answer_it_is_stalled_and_others_are_not(host: StorageHost, tmp_path: Path) -> None:
    nas, local = ref(tmp_path / "nas"), ref(tmp_path / "local", "local")
    await silent(host, nas)
    assert host.stalled() == {"pool-nas": "no answer to stat"}
    assert host.stalled_for()["pool-nas"] >= 0.5
    begin = time.monotonic()
    for _ in range(20):
        with pytest.raises(PoolUnavailable, match="pool nas is stalled: no answer to stat") as refused:
            await host.pool(nas, "volumes", 30)
    assert time.monotonic() - begin < 1, "nobody waits for it, each for a deadline of its own"
    assert "recovers by itself" in refused.value.hint
    assert await host.pool(local, "stat", 20)


async def test_it_comes_back_though_an_answer_takes_longer_than_the_first_question_may(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    await silent(host, nas)
    (tmp_path / "nas" / "slow").touch()
    (tmp_path / "nas" / "hangs").unlink()
    await until(lambda: not host.stalled())


async def test_that_the_driver_had_no_answer_is_none(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    await silent(host, nas)
    asked = (tmp_path / "nas" / "asked").read_text().count("space")
    (tmp_path / "nas" / "silent").touch()
    (tmp_path / "nas" / "hangs").unlink()
    await until(lambda: (tmp_path / "nas" / "asked").read_text().count("space") > asked + 2)
    assert host.stalled()
    (tmp_path / "nas" / "silent").unlink()
    await until(lambda: not host.stalled())


async def test_it_comes_back_when_the_storage_answers(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    await silent(host, nas)
    await asyncio.sleep(1.5)
    assert host.stalled(), "it is asked again and again, and does not answer"
    (tmp_path / "nas" / "hangs").unlink()
    await until(lambda: not host.stalled())
    assert host.stalled_for() == {}
    assert await host.pool(nas, "stat", 20)
    assert "space" in (tmp_path / "nas" / "asked").read_text()


async def test_who_gives_up_is_a_sign_too(host: StorageHost, tmp_path: Path) -> None:
    """A master waits less long than a call may take."""
    nas = ref(tmp_path / "nas")
    await host.pool(nas, "stat", 20)
    (tmp_path / "nas" / "hangs").touch()
    asking = asyncio.ensure_future(host.pool(nas, "space", 30))
    await asyncio.sleep(0.7)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert host.stalled() == {"pool-nas": "no answer to space"}


async def test_a_call_that_writes_for_long_is_no_stall(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    making = [asyncio.ensure_future(host.pool(nas, "create", 3600)) for _ in range(4)]
    await until(lambda: (tmp_path / "nas" / "asked").exists())
    await asyncio.sleep(0.7)
    making[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await making[0]
    assert host.stalled() == {}
    # However many write, one lane is left for quick calls.
    assert await host.pool(nas, "stat", 10)
    (tmp_path / "nas" / "made").touch()
    assert len(await asyncio.gather(*making[1:])) == 3


async def test_a_place_in_the_queue_is_no_stall(host: StorageHost, tmp_path: Path) -> None:
    """What waits for a free process has not been asked: a thousand calls at once say nothing of the storage."""
    nas = ref(tmp_path / "nas")
    # The one process for these calls is taken, by one that may take its time.
    first = asyncio.ensure_future(host.pool(nas, "probe_writers", 3600))
    await until(lambda: (tmp_path / "nas" / "asked").exists())
    waiting = [asyncio.ensure_future(host.pool(nas, "probe_writers", 50)) for _ in range(5)]
    await asyncio.sleep(1)
    assert host.stalled() == {}
    (tmp_path / "nas" / "made").touch()
    assert len(await asyncio.gather(first, *waiting)) == 6
    assert "space" not in (tmp_path / "nas" / "asked").read_text(), "nobody had to ask whether it answers again"


async def test_what_was_begun_behind_others_stalls_all_the_same(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    first = asyncio.ensure_future(host.pool(nas, "probe_writers", 3600))
    await until(lambda: (tmp_path / "nas" / "asked").exists())
    behind = asyncio.ensure_future(host.pool(nas, "probe_writers", 50))
    await asyncio.sleep(0)  # it is in the queue
    (tmp_path / "nas" / "hangs").touch()
    first.cancel()
    await until(lambda: host.stalled() == {"pool-nas": "no answer to probe_writers"})
    (tmp_path / "nas" / "made").touch()
    (tmp_path / "nas" / "hangs").unlink()
    assert await behind
    await until(lambda: not host.stalled())


async def test_a_connector_alone_stalls_and_comes_back(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    (tmp_path / "nas" / "hangs").touch()
    connection = {"data": nas.options}
    with pytest.raises(DeadlineExceeded):
        await host.connector(nas.id, "file", "attach", 2, connection=connection)
    (tmp_path / "nas" / "hangs").unlink()
    await until(lambda: not host.stalled())
    assert await host.connector(nas.id, "file", "attach", 20, connection=connection)


async def test_what_an_earlier_agent_left_hanging_counts(host: StorageHost, tmp_path: Path) -> None:
    nas = ref(tmp_path / "nas")
    line = [workers._MAIN, "3", "stall_calls"]
    code = "import sys, time; print(flush=True); time.sleep(60)"
    left = []
    for parent, key in (("999999999", nas.id), ("999999999", nas.id), ("999999999", "pool-other"), (str(os.getpid()), nas.id)):
        left.append(subprocess.Popen([sys.executable, "-c", code, *line, parent, key], stdout=subprocess.PIPE))
    try:
        for process in left:
            assert process.stdout
            process.stdout.readline()
        await host.pool(nas, "stat", 20)
        worker = host._pools[nas.id].worker
        assert worker.abandoned == 2
        # One lane is left: a second call at a time has to wait.
        (tmp_path / "nas" / "hangs").touch()
        first = asyncio.ensure_future(host.pool(nas, "stat", 20))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="was not begun"):
            await host.pool(nas, "stat", 0.3)
        (tmp_path / "nas" / "hangs").unlink()
        await first
        for process in left:
            process.kill()
            process.wait()
        await until(lambda: worker.abandoned == 0)
        pids = await asyncio.gather(*(host.pool(nas, "stat", 20) for _ in range(12)))
        assert len(set(pids)) <= 3
    finally:
        for process in left:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


async def test_never_more_than_three_processes_hang_probes_included(
    host: StorageHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nas = ref(tmp_path / "nas")
    kept = []

    async def unkillable(child: workers._Child) -> bool:
        kept.append(child.process)
        return False

    real = workers._Child.kill
    monkeypatch.setattr(workers._Child, "kill", unkillable)
    (tmp_path / "nas" / "hangs").touch()
    calls = [host.pool(nas, method, 0.6) for method in ("stat", "probe_writers", "stat", "probe_writers", "volumes", "stat")]
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(answer, (DeadlineExceeded, PoolUnavailable))
    await asyncio.sleep(1.5)
    assert len(kept) == 3
    assert "hang" in host.stalled()[nas.id]
    monkeypatch.setattr(workers._Child, "kill", real)
    (tmp_path / "nas" / "hangs").unlink()
    for process in kept:
        process.kill()
    await until(lambda: not host.stalled())
    assert await host.pool(nas, "stat", 20)
