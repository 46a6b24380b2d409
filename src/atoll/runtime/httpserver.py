"""Serves an ASGI app on a Unix socket and over HTTPS, in the running event loop. Masters and agents use it alike."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from atoll.model.errors import HostError

#: Seconds that running requests have when the server stops; long polls are cut after that.
GRACE = 3


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that tells the app who the peer is: ``scope["state"]["peer"]`` (certificate) and ``["uid"]`` (Unix socket)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        # A dictionary of its own per connection: uvicorn copies it into the scope of each request.
        self.app_state = {**self.app_state, "peer": tls.getpeercert() if tls else None, "uid": _peer_uid(transport)}


def _peer_uid(transport: asyncio.Transport) -> int | None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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


def tcp_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Errors: HostError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(256)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return sock


def _config(app: Any, tls_dir: Path | None, need_certificate: bool) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if tls_dir is not None:
        tls = {
            "ssl_keyfile": str(tls_dir / "key.pem"),
            "ssl_certfile": str(tls_dir / "cert.pem"),
            "ssl_ca_certs": str(tls_dir / "ca.pem"),
            "ssl_cert_reqs": ssl.CERT_REQUIRED if need_certificate else ssl.CERT_OPTIONAL,
        }
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
        timeout_keep_alive=75,
        **tls,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
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
) -> AsyncIterator[int | None]:
    """Serve while the block runs; when it starts, connections are accepted. Gives the TCP port (useful with port 0).

    HTTPS needs ``host``, ``port`` and ``tls_dir`` (``ca.pem``, ``cert.pem``, ``key.pem``). Errors: HostError.
    """
    listeners: list[tuple[socket.socket, Path | None]] = []
    tasks: list[asyncio.Task[None]] = []
    servers: list[_Server] = []
    bound = None
    try:
        if socket_path is not None:
            listeners.append((unix_listener(socket_path), None))
        if host is not None and port is not None:
            if tls_dir is None:
                raise HostError("HTTPS needs a directory with certificates")
            listeners.append((tcp_listener(host, port), tls_dir))
            bound = int(listeners[-1][0].getsockname()[1])
        for sock, tls in listeners:
            try:
                server = _Server(_config(app, tls, need_certificate))
            except (OSError, ssl.SSLError) as error:
                raise HostError(f"the certificates in {tls} cannot be used: {error}") from error
            servers.append(server)
            tasks.append(asyncio.create_task(server.serve(sockets=[sock]), name="rest"))
        while not all(server.started for server in servers):
            done, _ = await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        yield bound
    finally:
        for server in servers:
            server.should_exit = True
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
