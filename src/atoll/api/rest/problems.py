"""Every error as an RFC 9457 problem (``application/problem+json``)."""

from __future__ import annotations

import json
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from atoll.model.errors import AtollError, InvalidInput, MalformedRequest, MethodNotAllowed, NotFound, NotLeader, Unauthenticated

log = structlog.get_logger()
MEDIA_TYPE = "application/problem+json"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457. `code` is stable; `hint` says what to type next. The codes are in docs/reference/errors.md.",
    "required": ["type", "title", "status", "detail", "code", "hint", "instance", "details"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "hint": {"type": "string"},
        "instance": {"type": "string"},
        "details": {"type": "object"},
    },
}


def problem(error: AtollError, path: str) -> dict[str, Any]:
    """The error as a problem; ``path`` is the address that was asked for."""
    title = (type(error).__doc__ or type(error).__name__).strip().splitlines()[0].rstrip(".")
    return {
        "type": f"urn:atoll:error:{error.code}",
        "title": title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "instance": path,
        "details": error.details,
    }


def response(error: AtollError, path: str) -> Response:
    """The answer that tells of an error."""
    headers = {}
    if isinstance(error, Unauthenticated) and error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="atoll"'
    if isinstance(error, NotLeader):
        headers["Retry-After"] = "1"
    body = json.dumps(problem(error, path), default=str)
    return Response(body, status_code=error.status, media_type=MEDIA_TYPE, headers=headers)


def in_words(error: ValidationError | RequestValidationError) -> InvalidInput:
    """What pydantic found, as one sentence: where and why. ``details.fields`` has all of it."""
    fields = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"] if part not in ("body", "query", "path"))
        fields.append({"field": where, "why": str(found["msg"])})
    words = "; ".join(f"{f['field']}: {_lower(f['why'])}" if f["field"] else f["why"] for f in fields[:5])
    if len(fields) > 5:
        words += f"; and {len(fields) - 5} more"
    return InvalidInput(words, hint="the schema is at /v1/openapi.json", fields=fields)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def install(app: FastAPI) -> None:
    """Let every error of the app be a problem, unknown addresses and bugs included."""

    @app.exception_handler(AtollError)
    async def known(request: Request, error: AtollError) -> Response:
        return response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(in_words(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return response(NotFound(f"there is nothing at {path}", hint="the addresses are at /v1/openapi.json"), path)
        if error.status_code == 405:
            found = response(MethodNotAllowed(f"{request.method} is not possible at {path}"), path)
            found.headers.update(error.headers or {})
            return found
        return response(MalformedRequest(str(error.detail)), path)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("a request failed because of a bug", path=request.url.path, method=request.method, exc_info=error)
        told = AtollError("this is a bug in atoll; the master's log has the details", hint="look at the master's log")
        return response(told, request.url.path)
