"""Request bodies: at most 1 MiB of JSON, checked against the operation's model."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.api.rest import problems
from atoll.model.errors import MalformedRequest, RequestTooLarge

LIMIT = 1 << 20
#: How much of a body that is too large is read and thrown away, so that the client reads the answer instead of a reset.
DRAIN = 8 << 20

M = TypeVar("M", bound=BaseModel)


class BodyLimit:
    """Middleware that refuses bodies above 1 MiB, whether or not their length is announced."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > LIMIT:
            await _drain(receive, DRAIN)
            await problems.response(RequestTooLarge(_why(announced.decode())), scope["path"])(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > LIMIT:
                await _drain(receive, DRAIN)
                raise RequestTooLarge(_why(f"more than {LIMIT}"))
            return message

        await self.app(scope, counted, send)


def _why(size: str) -> str:
    return f"the request body has {size} bytes; the limit is {LIMIT}"


async def _drain(receive: Receive, limit: int) -> None:
    seen = 0
    while seen < limit:
        message = await receive()
        seen += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


async def read(request: Request, *, optional: bool = True) -> dict[str, Any]:
    """The body as a JSON object; no body is an empty one. Errors: MalformedRequest, RequestTooLarge."""
    raw = await request.body()
    if not raw.strip() and optional:
        return {}
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise MalformedRequest("the request body is not UTF-8") from None
    except RecursionError:
        raise MalformedRequest("the request body is nested too deeply") from None
    except ValueError as error:
        raise MalformedRequest(f"the request body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise MalformedRequest(f"the request body is a JSON {_kind(data)}, not an object")
    return data


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _kind(data: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(data), "number")


async def parse(request: Request, model: type[M]) -> M:
    """The body as a request of that model. Errors: MalformedRequest, InvalidInput."""
    try:
        return model.model_validate(await read(request))
    except ValidationError as error:
        raise problems.in_words(error) from None
