"""Connections to the master; see ``client``, which imports this with the first request."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit

from atoll.cli import settings
from atoll.model.errors import InvalidInput

#: Seconds for a connection.
CONNECT = 5.0


class UnixConnection(http.client.HTTPConnection):
    """To the master's Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT)
        self.path = path

    def connect(self) -> None:
        """Errors: OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT)
        self.sock.connect(self.path)


def tls(url: str) -> http.client.HTTPConnection:
    """To ``https://HOST:PORT``; not connected yet. Errors: InvalidInput."""
    import ssl

    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise InvalidInput(f"ATOLL_MASTER is {url!r}, which is not of the form https://HOST:PORT")
    authority = settings.ca_file()
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise InvalidInput(f"the CA file {authority} cannot be read: {error.strerror or error}", hint="set ATOLL_CA") from None
    return http.client.HTTPSConnection(parts.hostname, parts.port or 7770, timeout=CONNECT, context=context)
