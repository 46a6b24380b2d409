"""Calls that may hang for ever, in child processes that can be killed (PROTOCOLS 4)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from typing import Any

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, PoolUnavailable, Unreachable, from_wire

log = structlog.get_logger()
#: Seconds that a killed child has to go; one in D state stays, and is counted.
KILL_GRACE = 1.0
#: Bytes of one answer at most.
LIMIT = 64 << 20


class _Child:
    """One process and its socket."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process, self.reader, self.writer = process, reader, writer

    @classmethod
    async def start(cls, module: str, environment: dict[str, str]) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "atoll.runtime.workermain", str(theirs.fileno()), module],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours, limit=LIMIT)
        return cls(process, reader, writer)

    async def call(self, function: str, args: dict[str, Any]) -> Any:
        self.writer.write(json.dumps({"function": function, "args": args}).encode() + b"\n")
        await self.writer.drain()
        line = await self.reader.readline()
        if not line:
            raise ConnectionResetError("the worker ended")
        answer = json.loads(line)
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer["result"]

    async def kill(self) -> bool:
        """Whether it is gone after the grace."""
        self.writer.close()
        self.process.kill()
        end = asyncio.get_running_loop().time() + KILL_GRACE
        while self.process.poll() is None:
            if asyncio.get_running_loop().time() > end:
                return False
            await asyncio.sleep(0.01)
        return True


class Worker:
    """A few children that share one kind of work. A call takes a free one, starts another up to ``lanes``, or waits.

    At its deadline a call's child is killed. A child that cannot be killed is abandoned and counted; with ``most_abandoned`` of them
    every call is refused at once, until one has gone.
    """

    def __init__(
        self, name: str, module: str, *, lanes: int = 3, most_abandoned: int = 3, environment: dict[str, str] | None = None
    ) -> None:
        self.name, self._module, self._most = name, module, most_abandoned
        self._environment = environment or {}
        self._free: list[_Child] = []
        self._busy: set[_Child] = set()
        self._abandoned: list[subprocess.Popen[bytes]] = []
        self._slots = asyncio.Semaphore(lanes)
        self._reason = ""

    async def call(self, function: str, deadline: float, **args: Any) -> Any:
        """The function's result. Errors: its own; DeadlineExceeded or Unreachable = outcome not known; PoolUnavailable = stalled."""
        if self.stalled():
            raise PoolUnavailable(f"{self.name} is stalled: {self._reason}", hint="look at the storage and at this node's kernel log")
        try:
            async with asyncio.timeout(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: other calls took more than {deadline:g} s") from None
        try:
            return await self._run(function, args, deadline)
        finally:
            self._slots.release()

    async def _run(self, function: str, args: dict[str, Any], deadline: float) -> Any:
        child = self._free.pop() if self._free else await _Child.start(self._module, self._environment)
        self._busy.add(child)
        healthy = False
        try:
            async with asyncio.timeout(deadline):
                try:
                    result = await child.call(function, args)
                except AtollError:
                    healthy = True
                    raise
                except (OSError, ValueError) as error:
                    raise Unreachable(f"{self.name}: its worker ended during {function}: {error}") from None
                healthy = True
                return result
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: {args.get('method', function)} took longer than {deadline:g} s") from None
        finally:
            self._busy.discard(child)
            if healthy:
                self._free.append(child)
            else:
                await asyncio.shield(self._end(child, f"{args.get('method', function)} hung"))

    async def _end(self, child: _Child, why: str) -> None:
        if not await child.kill():
            self._abandoned.append(child.process)
            self._reason = f"{len(self._abandoned)} processes hang in the kernel ({why})"
            log.error("worker abandoned", worker=self.name, pid=child.process.pid, abandoned=len(self._abandoned))

    def stalled(self) -> str:
        """Why it is stalled, empty if it is not."""
        self._abandoned = [process for process in self._abandoned if process.poll() is None]
        return self._reason if len(self._abandoned) >= self._most else ""

    async def close(self) -> None:
        """End all children."""
        for child in [*self._free, *self._busy]:
            await child.kill()
        self._free.clear()
