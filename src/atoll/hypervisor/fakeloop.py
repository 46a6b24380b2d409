"""A loop and streams for the guests of the fake hypervisor: asyncio would double the time that a start takes."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time

TYPE_CHECKING = False  # the real one costs an import of typing
if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator
    from typing import Any, TypeAlias

    Task: TypeAlias = Coroutine["Wait", bool, None]

#: Bytes read or written at once.
CHUNK = 256 * 1024
#: What poll reports without being asked.
BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Wait:
    """Wait for a file descriptor, for ``seconds``, or (``change``) for Loop.notify, whichever is first; True if not for the time."""

    def __init__(self, fd: int = -1, events: int = 0, seconds: float | None = None, change: bool = False) -> None:
        self.fd, self.events, self.change = fd, events, change
        self.until = None if seconds is None else time.monotonic() + max(seconds, 0)

    def __await__(self) -> Generator[Wait, bool, bool]:
        return (yield self)


class Loop:
    """The smallest loop that does it: asyncio would double the time that a start takes."""

    def __init__(self) -> None:
        self.waiting: dict[Task, Wait] = {}
        self.changed = False

    def spawn(self, task: Task) -> None:
        """Run a task as far as it gets without waiting."""
        self._step(task, None)

    def end(self, task: Task) -> None:
        """Stop a task where it waits; its ``finally`` blocks run."""
        if self.waiting.pop(task, None) is not None:
            task.close()

    def notify(self) -> None:
        self.changed = True

    def run(self) -> None:
        while self.waiting:
            changed, self.changed = self.changed, False
            masks: dict[int, int] = {}
            for wait in self.waiting.values():
                if wait.fd >= 0:
                    masks[wait.fd] = masks.get(wait.fd, 0) | wait.events
            poll = select.poll()
            for fd, events in masks.items():
                poll.register(fd, events)
            until = min((wait.until for wait in self.waiting.values() if wait.until is not None), default=None)
            left = 0.0 if changed else None if until is None else max(0.0, (until - time.monotonic()) * 1000)
            ready = dict(poll.poll(left))
            now = time.monotonic()
            for task, wait in list(self.waiting.items()):
                if self.waiting.get(task) is not wait:
                    continue  # another task ended it
                hit = (changed and wait.change) or bool(ready.get(wait.fd, 0) & (wait.events | BROKEN))
                if hit or (wait.until is not None and now >= wait.until):
                    self._step(task, hit)

    def _step(self, task: Task, hit: bool | None) -> None:
        try:
            self.waiting[task] = task.send(hit)  # type: ignore[arg-type]  # None to begin with
        except StopIteration:
            self.waiting.pop(task, None)


# --- sockets under the loop ---


async def connect(host: str, port: int, seconds: float) -> socket.socket:
    """A connected stream. Errors: OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setblocking(False)
    code = sock.connect_ex((host, port))
    if code == errno.EINPROGRESS:
        hit = await Wait(sock.fileno(), select.POLLOUT, seconds)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if hit else errno.ETIMEDOUT
    if code:
        sock.close()
        raise OSError(code, f"{host}:{port}: {os.strerror(code)}")
    return sock


async def send(sock: socket.socket, data: bytes, seconds: float | None = None) -> None:
    """Send all of it; without ``seconds`` it may wait for ever, as a stream over a cut link does."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            if not await Wait(sock.fileno(), select.POLLOUT, seconds):
                raise TimeoutError("the other side does not read") from None


async def receive(sock: socket.socket, size: int, seconds: float | None = None) -> bytes:
    """Exactly ``size`` bytes. Errors: OSError, also for the end of the stream."""
    parts = []
    while size:
        try:
            part = sock.recv(min(size, CHUNK))
        except BlockingIOError:
            if not await Wait(sock.fileno(), select.POLLIN, seconds):
                raise TimeoutError("the other side says nothing") from None
            continue
        if not part:
            raise ConnectionResetError("the other side closed the stream")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


async def receive_line(sock: socket.socket, seconds: float | None = None) -> Any:
    """A line of JSON, at most 1 MiB of it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1 << 20:
        line += await receive(sock, 1, seconds)
    return json.loads(line)


def alive(sock: socket.socket) -> None:
    """Raises OSError when the other side has closed the stream."""
    try:
        if sock.recv(1, socket.MSG_PEEK) == b"":
            raise ConnectionResetError("the other side closed the stream")
    except BlockingIOError:
        return
