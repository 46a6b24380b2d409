"""Conversations with QEMU. Each command has a time limit of its own, because QEMU and ``qemu.qmp`` have none.

A QMP socket serves one client at a time and a second one waits silently, so connections are kept only while an operation needs them;
operations of one process on one guest share theirs. That is also why a process that died stands in nobody's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import StateError

# The library logs as errors what we handle: a guest that has just gone, a call that was cancelled.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class Closed(Exception):
    """The guest's process has ended, or has closed its socket."""


class Refused(Exception):
    """QEMU refused a command; the text is its own."""


class Session:
    """An open conversation. Commands of several tasks may overlap."""

    def __init__(self, client: QMPClient, command: float) -> None:
        self._client = client
        self._command = command

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, limit: float | None = None, oob: bool = False
    ) -> Any:
        """Carry out a command and give its result. ``limit`` in seconds; ``oob``: ahead of all others. Raises Refused, Closed,
        TimeoutError (outcome not known)."""
        try:
            done = self._client.execute(command, dict(arguments) if arguments else None, oob=oob)
            return await asyncio.wait_for(done, limit or self._command)
        except ExecuteError as error:
            raise Refused(str(error)) from None
        except (ExecInterruptedError, StateError, EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise Closed(str(error)) from None

    async def yank(self) -> None:
        """Drop the migration's connection, also while QEMU hears nothing else: it does not, while it sends the last of a guest's state to
        a target that does not read. None = success. Raises Closed, TimeoutError."""
        with contextlib.suppress(Refused):
            await self.execute("yank", {"instances": [{"type": "migration"}]}, oob=True)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[Events]:
        """Collect events with these names from now on."""
        with self._client.listener(names) as listener:
            yield Events(self._client, listener)


class Events:
    """Events as they come."""

    def __init__(self, client: QMPClient, listener: EventListener) -> None:
        self._client = client
        self._listener = listener

    async def next(self, limit: float) -> Mapping[str, Any] | None:
        """The next event; None when ``limit`` seconds pass without. Raises Closed."""
        # The listener alone would wait for ever after the connection is lost.
        event = asyncio.ensure_future(self._listener.get())
        lost = asyncio.ensure_future(self._client.runstate_changed())
        try:
            if self._client.runstate is not Runstate.RUNNING and self._listener.empty():
                raise Closed("the connection is lost")
            await asyncio.wait({event, lost}, timeout=max(limit, 0), return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                found: Mapping[str, Any] = event.result()
                return found
            if lost.done():
                raise Closed("the connection is lost")
            return None
        finally:
            event.cancel()
            lost.cancel()


@dataclass
class _Shared:
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    client: QMPClient | None = None
    users: int = 0


class Monitors:
    """The conversations of this process, by socket."""

    #: Of the whole process, for two objects may look after the same guests; of each event loop, for connections belong to theirs.
    _open: dict[tuple[asyncio.AbstractEventLoop, Path], _Shared] = {}

    @contextlib.asynccontextmanager
    async def session(self, socket: Path, *, command: float, connect: float | None = None) -> AsyncIterator[Session]:
        """A conversation for the time of the block. ``command``: default limit of its commands, in seconds; ``connect``: of opening it.
        Raises Closed (nobody listens), TimeoutError (QEMU does not answer, or talks with another process)."""
        key = asyncio.get_running_loop(), socket
        shared = self._open.setdefault(key, _Shared())
        shared.users += 1
        try:
            async with asyncio.timeout(connect or command), shared.opening:
                if shared.client is None or shared.client.runstate is not Runstate.RUNNING:
                    await _close(shared.client)
                    shared.client = None
                    shared.client = await _connect(socket)
            yield Session(shared.client, command)
        finally:
            shared.users -= 1
            if not shared.users:
                del self._open[key]
                await _close(shared.client)


async def _connect(socket: Path) -> QMPClient:
    client = QMPClient(socket.parent.name)
    try:
        await client.connect(str(socket))
    except (QMPError, OSError, EOFError) as error:
        raise Closed(str(error)) from None
    return client


async def _close(client: QMPClient | None) -> None:
    if client is not None:
        # Also after a lost connection: else asyncio complains about results that nobody fetched. Why it was lost, nobody wants to know.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(client.disconnect(), 2)
