"""Commands of the host, with a deadline; and which processes live."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.model.errors import DeadlineExceeded, HostError

#: Bytes of output that are kept: the first of stdout, the last of stderr.
KEEP = 1 << 20
#: Seconds to wait for a killed process to go, and for the last output of one that has ended.
GRACE = 1.0


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended; a negative ``rc`` is the signal that killed it. ``truncated``: stdout was longer than what was kept."""

    rc: int
    stdout: str
    stderr: str
    truncated: bool = False


class _Watcher(asyncio.SubprocessProtocol):
    """Collects output, and tells of the exit itself: a daemon left behind may keep the pipes open for ever."""

    def __init__(self) -> None:
        self.exited, self.drained = asyncio.Event(), asyncio.Event()
        self.stdout, self.stderr = bytearray(), bytearray()
        self.truncated = False
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            room = KEEP - len(self.stdout)
            self.stdout += data[:room]
            self.truncated = self.truncated or len(data) > room
        else:
            self.stderr += data
            del self.stderr[:-KEEP]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self.drained.set()

    def process_exited(self) -> None:
        self.exited.set()


async def run(
    argv: Sequence[str],
    *,
    deadline: float,
    input: bytes | str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Completed:
    """Run a command in its own process group, in the C locale. ``input`` goes to its stdin: the place for secrets.

    ``env`` is added to this process' environment. Errors: DeadlineExceeded after ``deadline`` seconds, HostError when it cannot be
    started or (with ``check``) fails; the group is then dead, and also when the caller is cancelled. Processes that a command which
    ended in time leaves behind are left alone.
    """
    loop = asyncio.get_running_loop()
    try:
        transport, watcher = await loop.subprocess_exec(
            _Watcher,
            *argv,
            stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            cwd=cwd,
        )
    except FileNotFoundError:
        raise HostError(f"there is no command {argv[0]}", hint=f"install the package that has {argv[0]}") from None
    except (OSError, ValueError) as error:
        raise HostError(f"cannot run {argv[0]}: {error}") from None
    try:
        if input is not None:
            stdin = transport.get_pipe_transport(0)
            assert isinstance(stdin, asyncio.WriteTransport)
            stdin.write(input.encode() if isinstance(input, str) else input)
            stdin.close()
        try:
            async with asyncio.timeout(deadline):
                await watcher.exited.wait()
        except BaseException as error:
            await _kill_group(transport.get_pid(), watcher)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"{_shown(argv)} did not end within {deadline:g} s and was killed{_tail(watcher.stderr)}") from None
            raise
        await _within_grace(watcher.drained)
        rc = transport.get_returncode()
    finally:
        transport.close()
    done = Completed(
        -1 if rc is None else rc, watcher.stdout.decode(errors="replace"), watcher.stderr.decode(errors="replace"), watcher.truncated
    )
    if check and done.rc != 0:
        how = f"was killed by {signal.Signals(-done.rc).name}" if done.rc < 0 else f"failed with code {done.rc}"
        raise HostError(f"{_shown(argv)} {how}{_tail(watcher.stderr or watcher.stdout)}", rc=done.rc)
    return done


async def _kill_group(pid: int, watcher: _Watcher) -> None:
    # Only while its leader is not reaped is the group surely ours; asyncio reaps it just before it tells of the exit.
    if not watcher.exited.is_set():
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        # A process in D state does not die: it is left behind rather than waited for.
        await _within_grace(watcher.exited)


async def _within_grace(event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(GRACE):
            await event.wait()
    except TimeoutError:
        pass


def _shown(argv: Sequence[str]) -> str:
    text = shlex.join(argv)
    return text if len(text) <= 200 else text[:197] + "..."


def _tail(output: bytearray) -> str:
    text = output[-1000:].decode(errors="replace").strip()
    return f": {text}" if text else ""


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name: state, parent, ..."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name is in parentheses and may contain anything, parentheses too.
    return data[data.rindex(b")") + 2 :].decode().split()


def process_start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; with the pid it names a process until the next boot. None: there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def alive(pid: int, start_time: int) -> bool:
    """Whether the process with this pid and start time still runs; a zombie does not."""
    fields = _stat(pid)
    return fields is not None and int(fields[19]) == start_time and fields[0] not in "ZX"
