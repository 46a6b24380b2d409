"""What strangers and slow clients may take of a server: connections, and the time that a request may take to arrive."""

from __future__ import annotations

import asyncio
import socket
import weakref
from dataclasses import dataclass
from typing import Any

import structlog

log = structlog.get_logger()


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. Times in seconds."""

    #: Connections at a time, those that still shake hands included; and of them from one address.
    connections: int = 1024
    from_one_address: int = 256
    #: For the TLS handshake; for the head of a request from its first byte (or from the connection's begin); for a whole request.
    handshake: float = 10.0
    head: float = 15.0
    request: float = 60.0
    #: How long a connection may stay open with nothing asked.
    idle: float = 75.0
    #: Bytes of a request's head.
    head_bytes: int = 64 << 10


class BoundedListener(socket.socket):
    """A listening socket that hangs up on callers beyond the limits. asyncio accepts from it as from any other.

    The bound is here, and not where requests are read, because a connection costs a file descriptor from its first packet on.
    """

    limits: Limits = Limits()

    def bound(self, limits: Limits) -> BoundedListener:
        """Set the limits."""
        self.limits = limits
        self._open: dict[weakref.ref[socket.socket], str] = {}
        self._told = 0.0
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """The next caller. Errors: ConnectionAbortedError for one beyond the limits."""
        connection, address = super().accept()
        where = address[0] if isinstance(address, tuple) else ""
        self._open = {ref: who for ref, who in self._open.items() if (known := ref()) is not None and known.fileno() != -1}
        from_there = sum(who == where for who in self._open.values())
        if len(self._open) >= self.limits.connections or (where and from_there >= self.limits.from_one_address):
            connection.close()
            self._tell(where, from_there)
            raise ConnectionAbortedError("too many connections")
        self._open[weakref.ref(connection)] = where
        return connection, address

    def _tell(self, where: str, from_there: int) -> None:
        now = asyncio.get_running_loop().time()
        if not self._told or now - self._told > 60.0:
            self._told = now
            log.warning("too many connections: hanging up on new ones", open=len(self._open), client=where, of_this_client=from_there)
