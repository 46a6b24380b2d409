"""The agent's HTTPS side: orders from masters only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from atoll.agent.service import Service
from atoll.model.errors import AtollError, Forbidden, HostError, MalformedRequest, RequestTooLarge
from atoll.model.messages import Call, Progress
from atoll.rpc.https import PULSE, lines
from atoll.runtime import certs

log = structlog.get_logger()
#: Bytes of an order at most.
LIMIT = 4 << 20


def create_app(service: Service) -> Starlette:
    """The app behind the agent's port."""

    async def call(request: Request) -> Response:
        identity = certs.identity(request.scope.get("state", {}).get("peer"))
        if identity is None or identity.role != "master":
            return _refuse(Forbidden("agents obey masters only", hint="use the REST API of the master"))
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LIMIT:
                return _refuse(RequestTooLarge(f"an order has at most {LIMIT} bytes"))
        try:
            order = Call.model_validate_json(body)
        except ValidationError as error:
            return _refuse(MalformedRequest(f"not an order: {error.errors()[0]['msg']}"))
        if order.master and order.master != identity.id:
            return _refuse(Forbidden("this master speaks in the name of another", hint=""))
        return StreamingResponse(_answer(service, order), media_type="application/x-ndjson")

    return Starlette(routes=[Route("/call", call, methods=["POST"])])


def _refuse(error: AtollError) -> Response:
    return JSONResponse({"error": error.to_wire()}, status_code=error.status)


async def _answer(service: Service, order: Call) -> AsyncIterator[bytes]:
    queue: asyncio.Queue[Progress] = asyncio.Queue(maxsize=100)

    def report(progress: Progress) -> None:
        if not queue.full():
            queue.put_nowait(progress)

    task = asyncio.ensure_future(service.handle(order, report))
    try:
        while not task.done():
            getter = asyncio.ensure_future(queue.get())
            await asyncio.wait({task, getter}, timeout=PULSE, return_when=asyncio.FIRST_COMPLETED)
            if getter.done():
                yield lines(progress=getter.result())
                continue
            getter.cancel()
            if not task.done():
                yield b"\n"
        try:
            yield lines(result=task.result())
        except AtollError as error:
            yield lines(error=error)
        except Exception as error:
            # A bug must reach the master as this order's error, not as a node that went away.
            log.exception("order failed", method=order.method, job=order.job, step=order.step)
            yield lines(error=HostError(f"the agent failed in {order.method}: {type(error).__name__}: {error}"))
    finally:
        # The master hung up: the order itself goes on, and its repeat joins it.
        task.cancel()
