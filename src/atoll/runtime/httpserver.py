"""Serves an ASGI app on a Unix socket and over HTTPS, in the running event loop. Masters and agents use it alike.

New certificates are used by the next connection, without a restart (``runtime.tls``); what clients may take is bounded
(``runtime.httplimits``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from atoll.model.errors import HostError
from atoll.runtime.httplimits import BoundedListener, Limits
from atoll.runtime.tls import FreshContext, fresh_server

#: Seconds that running requests have when the server stops; long polls are cut after that.
GRACE = 3
#: Seconds between looks at the certificate's files. New connections look by themselves; this closes idle ones that began with old files.
LOOK = 5.0


class _Gathered:
    """A transport that sends what is written in one turn of the loop with one call: an answer's head and body come one after the other,
    and each call to the system (with TLS each record, too) costs as much as making them."""

    #: Bytes that are sent at once.
    most = 1 << 16

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size >= self.most:
            self._flush()

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts:
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        self._flush()
        self._transport.close()


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that tells the app who the peer is: ``scope["state"]["peer"]`` (certificate) and ``["uid"]`` (Unix socket).

    Hangs up on clients that take too long to say what they want, and on those that open connections and say nothing.
    """

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = _Gathered(transport, self.loop)  # type: ignore[assignment]
        tls = transport.get_extra_info("ssl_object")
        # A dictionary of its own per connection: uvicorn copies it into the scope of each request.
        self.app_state = {**self.app_state, "peer": tls.getpeercert() if tls else None, "uid": _peer_uid(transport)}
        self._timer: asyncio.TimerHandle | None = None
        self._waits_for = ""
        self._expect("head", self.limits.head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect("", 0.0)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.transport.is_closing() or self.conn.their_state is h11.ERROR:
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._expect("body", self.limits.request)
        elif self.conn.their_state is h11.IDLE and (self.conn.trailing_data[0] or not self.cycle):
            self._expect("head", self.limits.head)
        elif self.conn.their_state is h11.IDLE:
            self._expect("anything", self.limits.idle)
        else:
            # What comes next is ours to do.
            self._expect("", 0.0)

    def _expect(self, what: str, seconds: float) -> None:
        """The client has so long for ``what``; the clock goes on while the same is expected."""
        if what == self._waits_for:
            return
        self._waits_for = what
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._too_slow) if what else None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("reading", self.limits.request)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect("", 0.0)

    def _too_slow(self) -> None:
        # Not close(): that would wait for a client that reads nothing.
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()


def _peer_uid(transport: asyncio.Transport) -> int | None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


class _State(ServerState):
    """uvicorn's, with a Date header that is made when it is asked for, at most once a second."""

    _date = (-1, b"")

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Those of every answer."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return [(b"date", self._date[1])]

    @default_headers.setter
    def default_headers(self, value: list[tuple[bytes, bytes]]) -> None:
        """uvicorn begins with none."""


class _Server(uvicorn.Server):
    """uvicorn on one socket, without its signal handlers: the daemon has its own. ``context``: TLS; None: none."""

    def __init__(self, config: uvicorn.Config, context: FreshContext | None, limits: Limits) -> None:
        super().__init__(config)
        self.server_state = _State()
        self._stopped = asyncio.Event()
        self._context, self._limits = context, limits
        self._protocol = type("Protocol", (PeerProtocol,), {"limits": limits})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a bound for the handshake."""

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self._protocol(config=self.config, server_state=self.server_state, app_state={})
            return made

        loop = asyncio.get_running_loop()
        handshake = self._limits.handshake if self._context else None
        self.servers = [
            await loop.create_server(protocol, sock=sock, ssl=self._context, backlog=256, ssl_handshake_timeout=handshake)
            for sock in sockets or []
        ]
        self.started = True

    async def main_loop(self) -> None:
        """uvicorn's looks ten times a second whether it shall end."""
        await self._stopped.wait()

    def stop(self) -> None:
        """Take no more connections, and end."""
        self.should_exit = True
        self._stopped.set()

    async def follow(self) -> None:
        """For ever: let connections that began with an old certificate end once they are idle."""
        assert self._context is not None
        known = self._context.version
        while True:
            await asyncio.sleep(LOOK)
            if self._context.refresh() != known:
                known = self._context.version
                for connection in list(self.server_state.connections):
                    connection.shutdown()


def unix_listener(path: Path) -> socket.socket:
    """A listening socket with mode 0600 in place of a dead one. Errors: HostError when somebody listens there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _refuse_living(path)
            path.unlink()
        # The mode must be right from the first moment, not after a chmod.
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {path}: {error.strerror or error}") from error
    except HostError:
        sock.close()
        raise
    return sock


def _refuse_living(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError as error:
            raise HostError(f"{path} exists and is no socket of ours: {error.strerror or error}", hint="remove it") from error
    raise HostError(f"another process listens on {path}", hint="stop the other master first")


def tcp_listener(host: str, port: int, limits: Limits) -> BoundedListener:
    """A listening TCP socket. Errors: HostError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = BoundedListener(family, socket.SOCK_STREAM).bound(limits)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(256)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return sock


def _config(app: Any, limits: Limits) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=int(limits.idle),
        h11_max_incomplete_event_size=limits.head_bytes,
    )
    config.load()
    return config


@asynccontextmanager
async def listening(
    app: Any,
    *,
    socket_path: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    tls_dir: Path | None = None,
    need_certificate: bool = False,
    limits: Limits = Limits(),
) -> AsyncIterator[int | None]:
    """Serve while the block runs; when it starts, connections are accepted. Gives the TCP port (useful with port 0).

    HTTPS needs ``host``, ``port`` and ``tls_dir`` (``ca.pem``, ``cert.pem``, ``key.pem``); files that are replaced later are taken up by
    new connections, and idle ones that are older are closed. Errors: HostError.
    """
    listeners: list[tuple[socket.socket, Path | None]] = []
    tasks: list[asyncio.Task[None]] = []
    follows: list[asyncio.Task[None]] = []
    servers: list[_Server] = []
    bound = None
    try:
        if socket_path is not None:
            listeners.append((unix_listener(socket_path), None))
        if host is not None and port is not None:
            if tls_dir is None:
                raise HostError("HTTPS needs a directory with certificates")
            listeners.append((tcp_listener(host, port, limits), tls_dir))
            bound = int(listeners[-1][0].getsockname()[1])
        for sock, tls in listeners:
            try:
                context = fresh_server(tls, optional_client=not need_certificate) if tls else None
            except (OSError, ssl.SSLError) as error:
                raise HostError(f"the certificates in {tls} cannot be used: {error}") from error
            server = _Server(_config(app, limits), context, limits)
            servers.append(server)
            tasks.append(asyncio.create_task(server.serve(sockets=[sock]), name="rest"))
            if context is not None:
                follows.append(asyncio.create_task(server.follow(), name="certificates"))
        while not all(server.started for server in servers):
            done, _ = await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        yield bound
    finally:
        for follow in follows:
            follow.cancel()
        for server in servers:
            server.stop()
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE + 5)
        for sock, _ in listeners:
            sock.close()
        if socket_path is not None and listeners:
            socket_path.unlink(missing_ok=True)


async def serve(
    app: Any, *, socket_path: Path | None = None, host: str | None = None, port: int | None = None, tls_dir: Path | None = None
) -> None:
    """Serve until this task is cancelled; then running requests get a few seconds to end."""
    async with listening(app, socket_path=socket_path, host=host, port=port, tls_dir=tls_dir):
        await asyncio.Event().wait()
