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
from typing import Any

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, HostError, PoolUnavailable, Unreachable, from_wire

log = structlog.get_logger()
#: Seconds that a killed child has to go; one in D state stays, and is counted.
KILL_GRACE = 1.0
#: Bytes of one answer at most.
LIMIT = 64 << 20


def _when_gone(process: subprocess.Popen[bytes], then: Callable[[], None]) -> Callable[[], None]:
    """Call ``then`` when the process has ended; gives what stops the watching."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(process.pid)
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


class _Child:
    """One process and its socket."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process, self.reader, self.writer = process, reader, writer

    @classmethod
    async def start(cls, module: str, environment: dict[str, str]) -> _Child:
        """Start one. Errors: HostError."""
        ours, theirs = socket.socketpair()
        # -P: what lies in the present directory is not imported.
        argv = [sys.executable, "-P", "-m", "atoll.runtime.workermain", str(theirs.fileno()), module, str(os.getpid())]
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

    async def call(self, function: str, args: dict[str, Any]) -> Any:
        self.writer.write(json.dumps({"function": function, "args": args}).encode() + b"\n")
        await self.writer.drain()
        line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("its process ended")
        answer = json.loads(line)
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
        stop = _when_gone(self.process, gone.set)
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
    there are never more processes than lanes; when all lanes are lost so, every call is refused at once.
    Use it from the main thread: children end with the thread that started them.
    """

    def __init__(self, name: str, module: str, *, lanes: int = 3, environment: dict[str, str] | None = None) -> None:
        self.name, self._module, self._lanes = name, module, lanes
        self._environment = environment or {}
        self._free: list[_Child] = []
        self._busy: set[_Child] = set()
        self._abandoned: dict[subprocess.Popen[bytes], Callable[[], None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(lanes)
        self._reason = ""
        self._closed = False

    async def call(self, function: str, deadline: float, **args: Any) -> Any:
        """The function's result, within ``deadline`` seconds; waiting for a free child counts.

        Errors: its own; DeadlineExceeded or Unreachable = outcome not known; PoolUnavailable = stalled; HostError.
        """
        if self._closed:
            raise Unreachable(f"{self.name}: its worker was closed")
        if self.stalled():
            raise PoolUnavailable(f"{self.name} is stalled: {self._reason}", hint="look at the storage and at this node's kernel log")
        what, end = args.get("method", function), asyncio.get_running_loop().time() + deadline
        try:
            async with asyncio.timeout_at(end):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: {what} was not begun, other calls took more than {deadline:g} s") from None
        try:
            child = self._idle() or await _Child.start(self._module, self._environment)
        except BaseException:
            self._slots.release()
            raise
        self._busy.add(child)
        healthy = False
        try:
            async with asyncio.timeout_at(end):
                try:
                    result = await child.call(function, args)
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
                self._slots.release()
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
        process = child.process
        if gone:
            self._slots.release()
            return
        self._abandoned[process] = _when_gone(process, lambda: self._returned(process))
        self._reason = f"{len(self._abandoned)} processes hang in the kernel (the last one in {what})"
        log.error("worker abandoned", worker=self.name, pid=process.pid, abandoned=len(self._abandoned))

    def _returned(self, process: subprocess.Popen[bytes]) -> None:
        """An abandoned child may have gone: its lane is free again."""
        if process in self._abandoned and process.poll() is not None:
            self._abandoned.pop(process)()
            self._slots.release()

    def stalled(self) -> str:
        """Why it is stalled, empty if it is not."""
        for process in list(self._abandoned):
            self._returned(process)
        return self._reason if len(self._abandoned) >= self._lanes else ""

    async def close(self) -> None:
        """End all children; calls under way end as Unreachable."""
        self._closed = True
        await asyncio.gather(*(child.kill() for child in [*self._free, *self._busy]), *self._ending)
        for stop in self._abandoned.values():
            stop()
        self._free.clear()
        self._abandoned.clear()
