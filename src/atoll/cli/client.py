"""HTTP to the master, with the standard library alone: over its Unix socket, or TLS.

What only a request needs (``http.client`` and what that imports) is imported by the first one: it takes as long as all of click.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from atoll.cli import settings
from atoll.model.errors import (
    AtollError,
    DeadlineExceeded,
    NotLeader,
    Unauthenticated,
    Unreachable,
    from_wire,
)

if TYPE_CHECKING:
    import http.client

#: Seconds for an answer, and how long a lost connection is tried again.
ANSWER, PATIENCE = 90.0, 30.0


class ConnectionLost(Exception):
    """The connection broke. ``sent``: the request may have arrived. ``late``: the answer took too long."""

    def __init__(self, why: str, *, sent: bool, late: bool = False) -> None:
        super().__init__(why)
        self.sent, self.late = sent, late


class Client:
    """A connection to whichever master leads. Errors: what the master's problem says; Unreachable."""

    def __init__(self) -> None:
        self._urls = settings.masters()
        self._socket = settings.socket_path()
        self._token = settings.token()
        self._connection: http.client.HTTPConnection | None = None

    @property
    def where(self) -> str:
        """What we talk to, for people."""
        return self._urls[0] if self._urls else self._socket

    def get(self, path: str, query: dict[str, Any] | None = None, *, patience: float = 0.0, timeout: float = ANSWER) -> Any:
        """Read something; a lost connection is tried again for ``patience`` seconds."""
        return self._request("GET", path, query, None, {}, patience, timeout)

    def all(self, noun: str, fields: str | None = None) -> list[dict[str, Any]]:
        """All rows of a kind, however many pages they take."""
        rows: list[dict[str, Any]] = []
        after: str | None = ""
        while after is not None:
            page = self.get(f"/v1/{noun}s", {"after": after or None, "fields": fields})
            rows += page["items"]
            after = page["after"]
        return rows

    def send(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, key: str | None = None, query: dict[str, Any] | None = None
    ) -> Any:
        """Change something. With an idempotency key, a lost connection is tried again with the same key."""
        headers = {"Idempotency-Key": key} if key else {}
        return self._request(method, path, query, body, headers, PATIENCE if key else 0.0, ANSWER)

    def _request(
        self, method: str, path: str, query: dict[str, Any] | None, body: Any, headers: dict[str, str], patience: float, timeout: float
    ) -> Any:
        import json
        from urllib.parse import urlencode

        wanted = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urlencode(wanted)}" if wanted else path
        raw = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + patience
        turned = 0
        arrived = False
        while True:
            try:
                return self._once(method, target, raw, headers, timeout)
            except NotLeader:
                turned += 1
                if turned < len(self._urls):
                    self.next_master()
                elif method != "GET" or time.monotonic() > until:
                    raise
                else:
                    # Whoever watches a job waits for the next leader, as for one that restarts.
                    time.sleep(0.3)
                    self.next_master()
            except ConnectionLost as lost:
                self.close()
                arrived = arrived or lost.sent
                turned += 1
                if turned < len(self._urls):
                    self.next_master()
                    continue
                if lost.late:
                    raise DeadlineExceeded(f"{self.where} gave no answer within {timeout:.0f} s", hint="atoll job list") from None
                # A request that never left is not tried again: most likely no master is there at all.
                if time.monotonic() > until or (method != "GET" and not arrived):
                    raise self.unreachable(str(lost), arrived and method != "GET") from None
                time.sleep(0.3)

    def unreachable(self, why: str, arrived: bool = False) -> AtollError:
        """The error for a master that does not answer. ``arrived``: a change may have reached it."""
        if arrived:
            return Unreachable(f"the connection to {self.where} was lost: {why}; the request may have arrived", hint="atoll job list")
        hint = "run this as root on a master, or set ATOLL_MASTER, ATOLL_CA and ATOLL_TOKEN_FILE"
        if self._urls:
            hint = "see whether that master runs, and whether ATOLL_MASTER is right"
        elif settings.followed():
            hint = f"this node follows the master at {', '.join(settings.followed())}: type it there"
        return Unreachable(f"no master answers at {self.where}: {why}", hint=hint)

    def next_master(self) -> None:
        """Talk to the next of several masters from now on."""
        self.close()
        if self._urls:
            self._urls.append(self._urls.pop(0))

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def stream(
        self, path: str, query: dict[str, Any], after: int | None, *, timeout: float
    ) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
        """The Server-Sent Events of an address: name (empty for a sign of life), id, data. Ends when the master ends it.

        ``after``: the last id that was seen. ``timeout``: seconds without a byte. Errors: ConnectionLost; what the problem says.
        """
        import json
        from http.client import HTTPException
        from urllib.parse import urlencode

        wanted = {name: value for name, value in query.items() if value is not None}
        headers = {"Accept": "text/event-stream, application/problem+json"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self.close()
        connection = self._connection = self._open()
        try:
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            connection.request("GET", f"{path}?{urlencode(wanted)}", headers=headers)
            response = connection.getresponse()
            if response.status >= 400:
                content = response.read()
                raise _error(json.loads(content) if content else None, response.status)
            yield from _events(response)
        except TimeoutError:
            raise ConnectionLost("it fell silent", sent=True, late=True) from None
        except (OSError, HTTPException, ValueError) as error:
            raise ConnectionLost(str(error) or type(error).__name__, sent=True) from None
        finally:
            self.close()

    def _open(self) -> http.client.HTTPConnection:
        from atoll.cli import transport

        connection = transport.tls(self._urls[0]) if self._urls else transport.UnixConnection(self._socket)
        try:
            connection.connect()
        except PermissionError:
            raise Unauthenticated(
                f"only root may use {self._socket}", hint="use sudo, or HTTPS with a token: ATOLL_MASTER, ATOLL_TOKEN_FILE"
            ) from None
        except OSError as error:
            import ssl

            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "set ATOLL_CA to the cluster's ca.pem, and use the name or address that the master's certificate has"
                raise Unauthenticated(f"the certificate of {self.where} is not trusted: {error.verify_message}", hint=hint) from None
            raise ConnectionLost(error.strerror or str(error), sent=False) from None
        return connection

    def _once(self, method: str, target: str, raw: bytes | None, headers: dict[str, str], timeout: float) -> Any:
        import json
        from http.client import HTTPException

        connection = self._connection = self._connection or self._open()
        sent = False
        try:
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            everything = {"Accept": "application/json", **headers}
            if raw is not None:
                everything["Content-Type"] = "application/json"
            if self._token:
                everything["Authorization"] = f"Bearer {self._token}"
            # From the first byte on, it may have arrived.
            sent = True
            connection.request(method, target, body=raw, headers=everything)
            response = connection.getresponse()
            content = response.read()
        except TimeoutError:
            raise ConnectionLost("no answer in time", sent=sent, late=True) from None
        except (OSError, HTTPException) as error:
            raise ConnectionLost(str(error) or type(error).__name__, sent=sent) from None
        if response.will_close:
            self.close()
        try:
            data = json.loads(content) if content else None
        except ValueError:
            raise Unreachable(f"{self.where} answered with something that is not JSON (HTTP {response.status})") from None
        if response.status >= 400:
            raise _error(data, response.status)
        return data


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    import json

    name, ident, data = "", None, ""
    for raw in response:
        line = raw.decode().rstrip("\n")
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "id":
            ident = int(value)
        elif field == "data":
            data = value
        elif not line:
            yield name, ident, json.loads(data) if data else {}
            name, ident, data = "", None, ""


def _error(problem: Any, status: int) -> AtollError:
    if not isinstance(problem, dict) or "code" not in problem:
        return AtollError(f"the master answered with HTTP {status}")
    details = {k: v for k, v in (problem.get("details") or {}).items() if k not in ("message", "hint")}
    return from_wire({"code": problem["code"], "message": problem.get("detail", ""), "hint": problem.get("hint"), "details": details})


def path_of(noun: str, target: str, *more: str) -> str:
    """The address of an object."""
    from urllib.parse import quote

    return "/".join(["/v1", f"{noun}s", quote(target, safe=""), *more])
