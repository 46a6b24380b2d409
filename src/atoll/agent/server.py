"""The agent's HTTPS side: orders from masters only.

Plain ASGI, without a framework: an order is one POST to one address, and each of them costs CPU time on every node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog
from pydantic import ValidationError

from atoll.agent.service import Service
from atoll.model.errors import AtollError, Forbidden, HostError, MalformedRequest, MethodNotAllowed, NotFound, RequestTooLarge
from atoll.model.messages import Call, Progress
from atoll.rpc.https import PULSE, lines
from atoll.runtime import certs

log = structlog.get_logger()
#: Bytes of an order at most.
LIMIT = 4 << 20
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def create_app(service: Service) -> App:
    """The app behind the agent's port."""

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            order = await _order(scope, receive)
        except AtollError as error:
            # A line like any other answer: the master must not take a refusal for an agent that went away.
            body = lines(error=error)
            await _start(send, error.status, b"application/json", len(body))
            await send({"type": "http.response.body", "body": body})
            return
        await _answer(service, order, send)

    return app


async def _order(scope: MutableMapping[str, Any], receive: Receive) -> Call:
    """The order in a request. Errors: Forbidden (no master), NotFound, MethodNotAllowed, RequestTooLarge, MalformedRequest."""
    identity = certs.identity(scope.get("state", {}).get("peer"))
    if identity is None or identity.role != "master":
        raise Forbidden("agents obey masters only", hint="use the REST API of the master")
    if scope["path"] != "/call":
        raise NotFound(f"there is nothing at {scope['path']}", hint="agents have /call only; use the REST API of the master")
    if scope["method"] != "POST":
        raise MethodNotAllowed(f"{scope['method']} is not possible at /call")
    parts, seen, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise MalformedRequest("the order ends in the middle")
        parts.append(message.get("body", b""))
        seen += len(parts[-1])
        if seen > LIMIT:
            raise RequestTooLarge(f"an order has at most {LIMIT} bytes")
        more = message.get("more_body", False)
    try:
        order = Call.model_validate_json(b"".join(parts))
    except ValidationError as error:
        raise MalformedRequest(f"not an order: {error.errors()[0]['msg']}") from None
    if order.master and order.master != identity.id:
        raise Forbidden("this master speaks in the name of another", hint="")
    return order


async def _start(send: Send, status: int, kind: bytes, length: int | None = None) -> None:
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _answer(service: Service, order: Call, send: Send) -> None:
    """Progress while it happens, then the result. What is done before there is any progress to tell is one plain answer."""
    news = asyncio.Event()
    progress: list[Progress] = []

    def report(told: Progress) -> None:
        if len(progress) < 100:
            progress.append(told)
            news.set()

    task = asyncio.ensure_future(service.handle(order, report))
    task.add_done_callback(lambda _: news.set())
    started = False
    try:
        while True:
            try:
                async with asyncio.timeout(PULSE):
                    await news.wait()
            except TimeoutError:
                progress_lines = b"\n"
            else:
                news.clear()
                progress_lines = b"".join(lines(progress=told) for told in progress)
                progress.clear()
            ended = task.done()
            body = progress_lines + (_end(task, order) if ended else b"")
            if not started:
                await _start(send, 200, b"application/x-ndjson", len(body) if ended else None)
                started = True
            await send({"type": "http.response.body", "body": body, "more_body": not ended})
            if ended:
                return
    finally:
        # The server ends: the order itself goes on or is left to the next agent, and its repeat joins it.
        task.cancel()


def _end(task: asyncio.Future[Any], order: Call) -> bytes:
    try:
        return lines(result=task.result())
    except AtollError as error:
        return lines(error=error)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        # A bug must reach the master as this order's error, not as a node that went away.
        log.exception("order failed", method=order.method, job=order.job, step=order.step)
        return lines(error=HostError(f"the agent failed in {order.method}: {type(error).__name__}: {error}"))
