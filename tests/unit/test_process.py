from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atoll.model.errors import DeadlineExceeded, HostError
from atoll.runtime.process import KEEP, alive, process_start_time, run


async def _gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        start = process_start_time(pid)
        if start is None or not alive(pid, start):
            return True
        await asyncio.sleep(0.02)
    return False


async def test_output_code_and_input() -> None:
    done = await run(["sh", "-c", "cat; echo problem >&2; exit 3"], deadline=20, input="sécret\n", check=False)
    assert (done.rc, done.stdout, done.stderr, done.truncated) == (3, "sécret\n", "problem\n", False)
    assert (await run(["cat"], deadline=20, input=b"\0\1")).stdout == "\0\1"


async def test_without_input_a_command_does_not_read_ours() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"ours")
    os.close(writer)
    ours = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert (await run(["cat"], deadline=20)).stdout == ""
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reader)


async def test_environment_and_directory(tmp_path: Path) -> None:
    done = await run(["sh", "-c", 'echo "$LC_ALL $X $HOME"; pwd'], deadline=20, env={"X": "1"}, cwd=tmp_path)
    assert done.stdout == f"C 1 {os.environ.get('HOME', '')}\n{tmp_path}\n"


async def test_failure_tells_the_command_and_its_words_but_not_its_input() -> None:
    with pytest.raises(HostError, match=r"sh -c .*failed with code 7: no such pool") as failed:
        await run(["sh", "-c", "echo no such pool >&2; exit 7"], deadline=20, input="geheim")
    assert "geheim" not in str(failed.value.to_wire())
    assert failed.value.details["rc"] == 7
    with pytest.raises(HostError, match="was killed by SIGTERM"):
        await run(["sh", "-c", "kill -TERM $$"], deadline=20)
    with pytest.raises(HostError, match="no command no-such-thing"):
        await run(["no-such-thing"], deadline=20)
    with pytest.raises(HostError, match="cannot run /etc/passwd"):
        await run(["/etc/passwd"], deadline=20)


async def test_a_command_that_does_not_read_its_input_is_no_problem() -> None:
    assert (await run(["true"], deadline=20, input=b"x" * (1 << 22))).rc == 0


async def test_at_the_deadline_the_whole_group_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"within 0.5 s.*: halfway"):
        await run(["sh", "-c", f"sleep 1000 & echo $$ $! > {pids}; echo halfway >&2; wait"], deadline=0.5)
    assert time.monotonic() - start < 10
    for pid in pids.read_text().split():
        assert await _gone(int(pid))


async def test_a_cancelled_caller_leaves_nothing_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(run(["sh", "-c", f"sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait"], deadline=100))
    async with asyncio.timeout(20):
        while not pids.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in pids.read_text().split():
        assert await _gone(int(pid))


async def test_a_daemon_that_keeps_the_pipes_open_is_neither_waited_for_nor_killed() -> None:
    start = time.monotonic()
    done = await run(["sh", "-c", "sleep 1000 & echo $!"], deadline=60)
    assert time.monotonic() - start < 20
    pid = int(done.stdout)
    started = process_start_time(pid)
    assert started is not None
    assert alive(pid, started)
    os.kill(pid, signal.SIGKILL)


async def test_output_is_bounded() -> None:
    code = f"import sys; sys.stdout.write('a' * 10 + 'b' * {2 * KEEP}); sys.stderr.write('c' * {2 * KEEP} + 'd' * 10)"
    done = await run([sys.executable, "-c", code], deadline=60)
    assert done.truncated
    assert (len(done.stdout), done.stdout[:11]) == (KEEP, "a" * 10 + "b")
    assert (len(done.stderr), done.stderr[-11:]) == (KEEP, "c" + "d" * 10)


def test_start_time_tells_processes_apart(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "1000"]) as child:
        start = process_start_time(child.pid)
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        assert start is not None
        assert abs(start / os.sysconf("SC_CLK_TCK") - uptime) < 60
        assert alive(child.pid, start)
        assert not alive(child.pid, start - 1)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not alive(child.pid, start), "a zombie does not live"
    assert process_start_time(child.pid) is None
    assert not alive(child.pid, start)
