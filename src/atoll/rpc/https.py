"""The transport between machines: HTTPS with both certificates checked. Answers stream, so that progress arrives while it happens.

One POST is one attempt of an order. The answer is lines of JSON: ``{"progress": ...}`` any number of times, then ``{"result": ...}``
or ``{"error": ...}``; empty lines say that the agent still works on it. A connection that ends without one of the two, or falls silent,
leaves the outcome unknown.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from atoll.model.errors import AtollError, DeadlineExceeded, Unreachable, from_wire
from atoll.model.messages import Call, Progress
from atoll.model.objects import Node
from atoll.rpc.contract import Report
from atoll.runtime.tls import FreshContext

#: Seconds to connect; and seconds beyond an order's deadline after which its answer is no longer waited for.
CONNECT, SLACK = 3.0, 2.0
#: An agent that works on an order sends at least an empty line each PULSE seconds; after SILENT without a byte it is gone.
PULSE, SILENT = 2.0, 10.0


class _Session:
    """Connections that began with one certificate, and how many orders use them."""

    def __init__(self, client: aiohttp.ClientSession, version: int) -> None:
        self.client, self.version, self.users = client, version, 0


class HttpsTransport:
    """Keeps connections to agents open. When ``context`` has a new certificate, orders go over new connections; those under way keep
    theirs until they end."""

    def __init__(self, context: FreshContext) -> None:
        self._context = context
        self._sessions: list[_Session] = []

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[aiohttp.ClientSession]:
        version = self._context.refresh()
        if not self._sessions or self._sessions[-1].version != version:
            connector = aiohttp.TCPConnector(ssl=self._context, limit=0, limit_per_host=0, keepalive_timeout=30)
            self._sessions.append(_Session(aiohttp.ClientSession(connector=connector), version))
        session = self._sessions[-1]
        session.users += 1
        try:
            yield session.client
        finally:
            session.users -= 1
            for old in [old for old in self._sessions[:-1] if not old.users]:
                self._sessions.remove(old)
                await old.client.close()

    async def call(self, node: Node, call: Call, report: Report) -> Any:
        """See ``Transport``."""
        host = f"[{node.address}]" if ":" in node.address else node.address
        url = f"https://{host}:{node.port}/call"
        timeout = aiohttp.ClientTimeout(total=call.deadline + SLACK, sock_connect=CONNECT, sock_read=SILENT)
        found: list[Any] = []
        try:
            # The agent's certificate must be this node's, not only some node's of the cluster.
            async with (
                self._client() as client,
                client.post(
                    url,
                    data=call.model_dump_json(),
                    timeout=timeout,
                    server_hostname=node.name,
                    headers={"Content-Type": "application/json"},
                ) as answer,
            ):
                async for line in _lines_of(answer.content):
                    message = json.loads(line)
                    if "progress" in message:
                        report(Progress(**message["progress"]))
                    elif "error" in message:
                        raise from_wire(message["error"])
                    else:
                        # Read on to the end: a connection that is left in the middle of an answer is not used again.
                        found = [message["result"]]
        except aiohttp.ServerTimeoutError:
            if not found:
                raise Unreachable(f"node {node.name} ({node.address}) is silent") from None
        except TimeoutError:
            if not found:
                raise DeadlineExceeded(f"node {node.name} did not finish {call.method} within {call.deadline:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError, json.JSONDecodeError) as error:
            if not found:
                raise Unreachable(f"node {node.name} ({node.address}): {error or type(error).__name__}") from None
        if found:
            return found[0]
        raise Unreachable(f"node {node.name} closed the connection before it answered")

    async def close(self) -> None:
        """See ``Transport``."""
        for session in self._sessions:
            await session.client.close()


async def _lines_of(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines that are not empty. One line may be megabytes long, such as a pool's list: ``readline`` would refuse it."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line = b"".join([*parts, end])
            parts = []
            if line:
                yield line
        if rest:
            parts.append(rest)
    if parts:
        raise aiohttp.ClientPayloadError("the answer ends in the middle of a line")


def lines(progress: Progress | None = None, result: Any = None, error: AtollError | None = None) -> bytes:
    """One line of an answer."""
    if progress is not None:
        return json.dumps({"progress": progress.model_dump(mode="json")}).encode() + b"\n"
    if error is not None:
        return json.dumps({"error": error.to_wire()}, default=str).encode() + b"\n"
    return json.dumps({"result": result}).encode() + b"\n"
