"""Other people's scripts as root: each in a process and mount namespace of its own, so that the kernel ends all of it, daemons and
mounts included, when the script ends, when it is killed, and when this process dies."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.model.errors import HostError, InUse

#: Bytes of output that a log keeps at most, and of stderr that an error tells.
LOG_LIMIT, TAIL = 1 << 20, 1000
#: Seconds for what was killed to be gone.
GRACE = 20.0
#: unshare is killed with us, the namespace's first process with unshare, and then the kernel kills the rest. The first process is a
#: shell that only waits: a script would not notice signals there.
_CONFINED = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_INIT = ("/bin/sh", "-c", '"$@"; code=$?; exit $code', "script")


class Log:
    """What a script says, in a file that stays below ``LOG_LIMIT``: the newest part is kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self.path = path
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed in close()
        os.fchmod(self._file.fileno(), 0o640)

    def add(self, data: bytes) -> None:
        """Append. A full disk loses the log, and not the script."""
        with contextlib.suppress(OSError):
            if self._file.tell() + len(data) > LOG_LIMIT:
                self._shorten()
            self._file.write(data[-(LOG_LIMIT // 2) :])

    def _shorten(self) -> None:
        end = self._file.tell()
        kept = os.pread(self._file.fileno(), LOG_LIMIT // 4, max(0, end - LOG_LIMIT // 4))
        self._file.seek(0)
        self._file.truncate()
        self._file.write(b"[... the beginning was left out ...]\n" + kept.partition(b"\n")[2])

    def close(self) -> None:
        """Done."""
        self._file.close()


@dataclass(frozen=True)
class Ended:
    """How a script ended; ``stderr`` is the end of what it said there."""

    code: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        raise InUse(f"an earlier script still runs ({path} is locked)", hint=f"fuser -v {path}") from None
    finally:
        # Closed only: what inherited it keeps the lock.
        os.close(handle)


async def gone(lock: Path, patience: float = GRACE) -> None:
    """Wait until no process of the scripts that ran with this lock is left; none is success. Errors: InUse after ``patience`` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    while lock.exists():
        try:
            with _locked(lock):
                return
        except InUse:
            if loop.time() >= end:
                raise
        await asyncio.sleep(0.1)


async def run(
    argv: Sequence[str],
    *,
    deadline: float,
    env: Mapping[str, str],
    cwd: Path,
    lock: Path,
    log: Log,
    said: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Run a script with this environment alone, closed stdin, and ``lock`` held by every process of it. ``said`` gets its lines.

    Errors: InUse (one with the same lock still runs), HostError (it cannot be started, or was killed at the deadline). If the
    caller is cancelled, the script is killed and gone before the cancellation goes on.
    """
    await gone(lock)
    with _locked(lock) as handle:
        try:
            process = await asyncio.create_subprocess_exec(
                *_CONFINED,
                *_INIT,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=dict(env),
                cwd=cwd,
                pass_fds=(handle,),
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"cannot run {argv[0]}: {error.strerror}") from None
    tails = (bytearray(), bytearray())
    readers = [
        asyncio.create_task(_read(stream, tail, log, said))
        for stream, tail in zip((process.stdout, process.stderr), tails, strict=True)
        if stream is not None
    ]
    try:
        async with asyncio.timeout(deadline):
            # All of the namespace has ended with the script: nobody keeps the pipes open.
            await asyncio.gather(process.wait(), *readers)
    except TimeoutError:
        await _kill(process, lock)
        # Not DeadlineExceeded: the outcome is known, and nobody shall try again.
        raise HostError(
            f"{argv[0]} did not end within {deadline:g} s and was killed{_end(tails)}", hint=f"give it more time, or see {log.path}"
        ) from None
    finally:
        await _kill(process, lock)
        for reader in readers:
            reader.cancel()
    out, err = (tail.decode(errors="replace").strip() for tail in tails)
    return Ended(process.returncode if process.returncode is not None else -1, out, err)


def _end(tails: tuple[bytearray, bytearray]) -> str:
    words = (tails[1] or tails[0]).decode(errors="replace").strip()
    return f"; the end of its words: {words}" if words else ""


async def _read(stream: asyncio.StreamReader, tail: bytearray, log: Log, said: Callable[[str], None]) -> None:
    while part := await stream.read(1 << 16):
        log.add(part)
        tail += part
        del tail[:-TAIL]
        if lines := [line for line in part.decode(errors="replace").splitlines() if line.strip()]:
            said("".join(c if c.isprintable() else " " for c in lines[-1])[:200])


async def _kill(process: asyncio.subprocess.Process, lock: Path) -> None:
    """Kill all of it, and wait until it is gone. Errors: InUse (something hangs in the kernel)."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await process.wait()
    await gone(lock)
