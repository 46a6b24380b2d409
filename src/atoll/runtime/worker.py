"""Calls that may hang for ever, in child processes that can be killed (PROTOCOLS 4)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, HostError, PoolUnavailable, Unreachable, from_wire

log = structlog.get_logger()
#: Seconds that a killed child has to go; one in D state stays, and is counted.
KILL_GRACE = 1.0
#: Seconds: a call that may take longer than this is one that writes much.
LONG = 60.0
STALLED_HINT = "atoll pool info POOL; look at the storage and the node's kernel log; it recovers by itself when the storage answers"
#: Bytes of one answer at most.
LIMIT = 64 << 20


_MAIN = "atoll.runtime.workermain"
#: Hears how far a call is, in percent.
Told = Callable[[float], None]


def nobody(percent: float) -> None:
    """A ``Told`` that does not listen."""


def _when_gone(pid: int, then: Callable[[], None]) -> Callable[[], None]:
    """Call ``then`` when the process has ended; gives what stops the watching."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        handle = loop.call_soon(then)
        return handle.cancel
    open_ = [fd]

    def stop() -> None:
        for found in open_:
            loop.remove_reader(found)
            os.close(found)
        open_.clear()

    def ended() -> None:
        stop()
        then()

    loop.add_reader(fd, ended)
    return stop


def _left_behind(module: str, key: str) -> list[int]:
    """Workers for the same storage whose parent has died, and that hang in the kernel in spite of their death.

    Those of other nodes on this kernel (containers, nodes of a lab) know their parents by other numbers, and are not ours.
    """
    found, own = [], os.stat("/proc/self/ns/pid").st_ino
    for entry in os.listdir("/proc"):
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0") if entry.isdigit() else []
            if _MAIN not in argv or argv[-4:-3] != [module] or argv[-2] != key:
                continue
            if os.stat(f"/proc/{entry}/ns/pid").st_ino != own:
                continue
            status = _state(int(entry))
        except OSError:
            continue
        if status[0] not in "ZX" and status[1] != argv[-3]:
            found.append(int(entry))
    return found


def _state(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on. Errors: OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ended(pid: int) -> int | None:
    """None as long as the process runs, which is not a child of ours: whoever is its parent now may leave it a zombie for long."""
    try:
        return 0 if _state(pid)[0] in "ZX" else None
    except OSError:
        return 0


class _Child:
    """One process and its socket."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process, self.reader, self.writer = process, reader, writer

    @classmethod
    async def start(cls, module: str, environment: dict[str, str], key: str) -> _Child:
        """Start one. ``key`` is only seen in its command line. Errors: HostError."""
        ours, theirs = socket.socketpair()
        # -P: what lies in the present directory is not imported.
        argv = [sys.executable, "-P", "-m", _MAIN, str(theirs.fileno()), module, str(os.getpid()), key]
        try:
            process = subprocess.Popen(
                argv,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                # A group of its own, so that what a driver has started ends with it.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise HostError(f"cannot start a worker process: {error.strerror}") from None
        finally:
            theirs.close()
        ours.setblocking(False)
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=LIMIT)
        except BaseException:
            ours.close()
            process.kill()
            raise
        return cls(process, reader, writer)

    @property
    def usable(self) -> bool:
        return self.process.poll() is None and not self.reader.at_eof()

    async def call(self, function: str, args: dict[str, Any], told: Told) -> Any:
        self.writer.write(json.dumps({"function": function, "args": args}).encode() + b"\n")
        await self.writer.drain()
        while True:
            line = await self.reader.readline()
            if not line.endswith(b"\n"):
                raise ConnectionResetError("its process ended")
            answer = json.loads(line)
            if "percent" not in answer:
                break
            told(answer["percent"])
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer["result"]

    async def kill(self) -> bool:
        """Kill its process group. Whether it is gone after the grace."""
        self.writer.close()
        # Only while it has not been reaped is the number surely its own.
        if self.process.poll() is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        gone = asyncio.Event()
        stop = _when_gone(self.process.pid, gone.set)
        try:
            async with asyncio.timeout(KILL_GRACE):
                await gone.wait()
        except TimeoutError:
            pass
        finally:
            stop()
        return self.process.poll() is not None


class Worker:
    """A few children that share one kind of work. A call takes a free one, starts another up to ``lanes``, or waits.

    At its deadline a call's child is killed. A child that cannot be killed is abandoned and keeps its lane until it has gone, so that
    there are never more processes than lanes; when all lanes are lost so, every call is refused at once. So do children that an earlier
    process of ours has left hanging: ``key`` names the storage for that. ``beside``: a worker whose lanes are meant, all calls together.
    Calls with a deadline of more than ``LONG`` seconds leave one lane to the others.
    Use it from the main thread: children end with the thread that started them.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        lanes: int = 3,
        environment: dict[str, str] | None = None,
        key: str = "",
        beside: Worker | None = None,
    ) -> None:
        self.name, self._module, self._lanes, self._key = name, module, lanes, key
        self._environment = environment or {}
        self._free: list[_Child] = []
        self._busy: set[_Child] = set()
        self._abandoned: dict[int, tuple[Callable[[], object], Callable[[], None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._own = asyncio.Semaphore(lanes)
        self._long = asyncio.Semaphore(max(1, lanes - 1))
        self._beside = beside
        self._reason, self._since = "", 0.0
        self._closed, self._looked = False, not key

    async def call(
        self, function: str, deadline: float, told: Told = nobody, *, begun: Callable[[], None] | None = None, **args: Any
    ) -> Any:
        """The function's result, within ``deadline`` seconds; waiting for a free child counts. ``told`` hears how far it is.

        ``begun`` is called when a child is about to be asked: until then the call waits for others of its kind, not for an answer.
        Errors: its own; DeadlineExceeded or Unreachable = outcome not known; PoolUnavailable = stalled; HostError.
        """
        if self._closed:
            raise Unreachable(f"{self.name}: its worker was closed")
        if not self._looked:
            await self._find_left_behind()
        if self.stalled():
            raise PoolUnavailable(f"{self.name} is stalled: {self.stalled()}", hint=STALLED_HINT)
        what, end = args.get("method", function), asyncio.get_running_loop().time() + deadline
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout_at(end):
                    if deadline > LONG:
                        await held.enter_async_context(self._long)
                    await self._acquire()
            except TimeoutError:
                raise DeadlineExceeded(f"{self.name}: {what} was not begun, other calls took more than {deadline:g} s") from None
            return await self._carry_out(function, what, args, deadline, end, told, begun)

    async def _acquire(self) -> None:
        await self._own.acquire()
        if self._beside is not None:
            try:
                await self._beside._own.acquire()
            except BaseException:
                self._own.release()
                raise

    def _release(self) -> None:
        self._own.release()
        if self._beside is not None:
            self._beside._own.release()

    async def _carry_out(
        self, function: str, what: str, args: dict[str, Any], deadline: float, end: float, told: Told, begun: Callable[[], None] | None
    ) -> Any:
        try:
            child = self._idle() or await _Child.start(self._module, self._environment, self._key)
        except BaseException:
            self._release()
            raise
        self._busy.add(child)
        if begun is not None:
            begun()
        healthy = False
        try:
            async with asyncio.timeout_at(end):
                try:
                    result = await child.call(function, args, told)
                except AtollError:
                    healthy = True
                    raise
                except (OSError, ValueError) as error:
                    raise Unreachable(f"{self.name}: its worker ended during {what}: {error}") from None
                healthy = True
                return result
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: {what} took longer than {deadline:g} s") from None
        finally:
            if healthy and not self._closed:
                self._busy.discard(child)
                self._free.append(child)
                self._release()
            else:
                ending = asyncio.create_task(self._end(child, what))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
                await asyncio.shield(ending)

    def _idle(self) -> _Child | None:
        """A free child that still lives."""
        while self._free:
            child = self._free.pop()
            if child.usable:
                return child
            child.writer.close()
        return None

    async def _end(self, child: _Child, what: str) -> None:
        try:
            gone = await child.kill()
        finally:
            self._busy.discard(child)
        if gone:
            self._release()
            return
        self._abandon(child.process.pid, child.process.poll, what)

    def _abandon(self, pid: int, poll: Callable[[], object], what: str) -> None:
        """It keeps its lane until it has gone. ``poll`` gives None as long as it has not."""
        if not self._abandoned:
            self._since = asyncio.get_running_loop().time()
        self._abandoned[pid] = poll, _when_gone(pid, lambda: self._returned(pid))
        many = len(self._abandoned)
        self._reason = f"{many} process{'es hang' if many > 1 else ' hangs'} in the kernel (the last one in {what})"
        log.error("worker abandoned", worker=self.name, pid=pid, abandoned=many)

    def _returned(self, pid: int) -> None:
        """An abandoned child may have gone: its lane is free again."""
        if pid in self._abandoned and self._abandoned[pid][0]() is not None:
            self._abandoned.pop(pid)[1]()
            self._release()

    async def _find_left_behind(self) -> None:
        """Children of a process before us hang on: they count, or each restart during a stall would add as many."""
        self._looked = True
        for pid in _left_behind(self._module, self._key)[: self._lanes]:
            await self._acquire()
            self._abandon(pid, partial(_ended, pid), "a call of an earlier agent")

    def stalled(self) -> str:
        """Why it is stalled, empty if it is not."""
        return self._reason if self.abandoned >= self._lanes else ""

    @property
    def abandoned(self) -> int:
        """How many children hang in the kernel."""
        for pid in list(self._abandoned):
            self._returned(pid)
        return len(self._abandoned)

    def hanging(self) -> tuple[str, float]:
        """In words what hangs, and for how many seconds; empty if nothing does."""
        return (self._reason, asyncio.get_running_loop().time() - self._since) if self.abandoned else ("", 0.0)

    async def close(self) -> None:
        """End all children; calls under way end as Unreachable."""
        self._closed = True
        await asyncio.gather(*(child.kill() for child in [*self._free, *self._busy]), *self._ending)
        for _, stop in self._abandoned.values():
            stop()
        self._free.clear()
        self._abandoned.clear()
