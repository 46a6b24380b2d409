"""The transport between machines: HTTPS with both certificates checked. Answers stream, so that progress arrives while it happens.

One POST is one attempt of an order. The answer is lines of JSON: ``{"progress": ...}`` any number of times, then ``{"result": ...}``
or ``{"error": ...}``; empty lines say that the agent still works on it. A connection that ends without one of the two, or falls silent,
leaves the outcome unknown.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

from atoll.model.errors import AtollError, DeadlineExceeded, Unreachable, from_wire
from atoll.model.messages import Call, Progress
from atoll.model.objects import Node
from atoll.rpc.contract import Report

#: Seconds to connect; and seconds beyond an order's deadline after which its answer is no longer waited for.
CONNECT, SLACK = 3.0, 2.0
#: An agent that works on an order sends at least an empty line each PULSE seconds; after SILENT without a byte it is gone.
PULSE, SILENT = 2.0, 10.0


class HttpsTransport:
    """Keeps connections to agents open. ``context`` gives the TLS context, anew for each session, so that certificates renew."""

    def __init__(self, context: Callable[[], ssl.SSLContext]) -> None:
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(ssl=self._context(), limit=0, limit_per_host=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def call(self, node: Node, call: Call, report: Report) -> Any:
        """See ``Transport``."""
        host = f"[{node.address}]" if ":" in node.address else node.address
        url = f"https://{host}:{node.port}/call"
        timeout = aiohttp.ClientTimeout(total=call.deadline + SLACK, sock_connect=CONNECT, sock_read=SILENT)
        try:
            # The agent's certificate must be this node's, not only some node's of the cluster.
            async with self._client().post(
                url, data=call.model_dump_json(), timeout=timeout, server_hostname=node.name, headers={"Content-Type": "application/json"}
            ) as answer:
                async for line in _lines_of(answer.content):
                    message = json.loads(line)
                    if "progress" in message:
                        report(Progress(**message["progress"]))
                    elif "error" in message:
                        raise from_wire(message["error"])
                    else:
                        return message["result"]
        except aiohttp.ServerTimeoutError:
            raise Unreachable(f"node {node.name} ({node.address}) is silent") from None
        except TimeoutError:
            raise DeadlineExceeded(f"node {node.name} did not finish {call.method} within {call.deadline:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError, json.JSONDecodeError) as error:
            raise Unreachable(f"node {node.name} ({node.address}): {error or type(error).__name__}") from None
        raise Unreachable(f"node {node.name} closed the connection before it answered")

    async def close(self) -> None:
        """See ``Transport``."""
        if self._session is not None:
            await self._session.close()


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
