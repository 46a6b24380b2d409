"""A real master in this process: the store on disk, jobs, agents with guests in memory; served on a Unix socket by a thread of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.api.rest.app import create_app
from atoll.lab.box import Box
from atoll.runtime.audit import AuditLog
from atoll.runtime.clock import SystemClock
from atoll.runtime.httpserver import listening
from atoll.store.contract import Store
from atoll.store.sqlite import SqliteStore


class RealBox(Box):
    """The cluster in one process, in real time, with the real store in ``directory``."""

    directory: Path
    kept_store: SqliteStore | None = None

    async def open_store(self) -> Store:
        if self.kept_store is None:
            self.kept_store = await SqliteStore.open(self.directory)
        return self.kept_store

    async def close(self) -> None:
        await super().close()
        if self.kept_store is not None:
            await self.kept_store.close()


async def real_box(directory: Path, nodes: int = 3) -> RealBox:
    """A running one, with certificates."""
    kind = type("Placed", (RealBox,), {"directory": directory / "store"})
    box: RealBox = await kind.make(nodes, certificates=True)
    return box


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Served:
    """The master, and what it is asked."""

    def __init__(self, box: RealBox, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.box, self.path, self._loop = box, path, loop

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 60.0) -> Any:
        """Something in the master's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str, bytes]:
        """Status, content type and body of an answer; of an endless one only the beginning. ``body``: bytes as they are, else JSON."""
        connection = Connection(self.path)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            kind = answer.getheader("content-type", "")
            return answer.status, kind, b"" if kind.startswith("text/event-stream") else answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's data, whatever its status."""
        return json.loads(self.ask(method, path, body)[2])


@contextmanager
def real_master(directory: Path, nodes: int = 3) -> Iterator[Served]:
    """Serve one while the block runs."""
    ready: list[Served] = []
    began, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        box = await real_box(directory, nodes)
        log = AuditLog(directory / "audit.jsonl", SystemClock().now)
        try:
            async with listening(create_app(box.master, log=log), socket_path=directory / "api.sock"):
                ready.append(Served(box, directory / "api.sock", loop))
                began.set()
                await stop.wait()
        finally:
            await box.close()
            log.close()

    def work() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            began.set()
            loop.close()

    with ThreadPoolExecutor(1, "master") as threads:
        served = threads.submit(work)
        began.wait(60.0)
        try:
            if not ready:
                served.result(0)
            yield ready[0]
        finally:
            if ready:
                loop.call_soon_threadsafe(stop.set)
        served.result(60.0)
