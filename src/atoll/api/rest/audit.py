"""What is written down of requests: all that change something, that show secrets, or that were refused for want of a right.

Plain reads are not: they would bury the rest. What a request says is kept, without secrets.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.api.leader import Leader
from atoll.api.rest import auth
from atoll.api.rest.reads import answer
from atoll.model.errors import HostError, WrongState
from atoll.runtime import certs
from atoll.runtime.audit import AuditLog

#: Bytes of a request that are kept, and of an answer that are looked at for an error's code.
BODY, ANSWER = 8 << 10, 64 << 10
_NOT = ("/agent/v1/report",)
#: Reads that are written down all the same: they show who asked what.
_READS = ("/v1/cluster/audit",)


class Audited(Protocol):
    """Where entries go."""

    def add(self, entry: dict[str, Any]) -> None:
        """See ``AuditLog.add``."""


class AuditMiddleware:
    """The outermost layer: it sees also what the others refuse."""

    def __init__(self, app: ASGIApp, log: Audited) -> None:
        self.app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _NOT:
            await self.app(scope, receive, send)
            return
        change = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        note: dict[str, Any] = {}
        scope.setdefault("state", {})["audit"] = note
        said, told = bytearray(), bytearray()
        status, location = 0, ""

        async def heard() -> Message:
            message = await receive()
            if change and message["type"] == "http.request" and len(said) <= BODY:
                said.extend(message.get("body", b"")[: BODY + 1])
            return message

        async def answered(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                location = next((v.decode("latin-1") for n, v in message["headers"] if n.lower() == b"location"), "")
            elif status >= 400 and len(told) < ANSWER:
                told.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, heard, answered)
        finally:
            if change or status in (401, 403) or scope["path"] in _READS:
                self._log.add(_entry(scope, note, bytes(said), bytes(told), status, location))


def _entry(scope: Scope, note: dict[str, Any], said: bytes, told: bytes, status: int, location: str) -> dict[str, Any]:
    state = scope["state"]
    who = certs.identity(state.get("peer"))
    client = scope.get("client")
    entry: dict[str, Any] = {
        "who": note.get("who") or (f"{who.role} {who.name}" if who else ""),
        "role": note.get("role") or (who.role if who else ""),
        "from": client[0] if client else f"socket, uid {state.get('uid')}",
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
    }
    if scope["query_string"]:
        entry["query"] = scope["query_string"].decode("latin-1")[:1024]
    if status >= 400:
        entry["code"] = _code(told)
    if location.startswith("/v1/jobs/"):
        entry["job"] = int(location.rpartition("/")[2])
    request = _request(said)
    if request is not None:
        entry["request"] = request
    return entry


def _code(told: bytes) -> str:
    try:
        return str(json.loads(told).get("code", ""))
    except (ValueError, AttributeError):
        return ""


def _request(said: bytes) -> Any:
    """What was asked for; only as JSON, where it can be told what is a secret."""
    if not said.strip():
        return None
    if len(said) > BODY:
        return f"more than {BODY} bytes"
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return "not JSON"
    return found if isinstance(found, dict) else "not an object"


def router(leader: Leader, log: AuditLog | None) -> APIRouter:
    """``GET /v1/cluster/audit``."""
    routes = APIRouter()

    @routes.get("/v1/cluster/audit", tags=["cluster"], summary="The newest entries of this master's audit log, the oldest of them first")
    async def audit(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        who: Annotated[str, Query(description="only of this caller")] = "",
        path: Annotated[str, Query(description="only where the address, or a job's operation, has this in it")] = "",
        since: Annotated[str, Query(description="only from then on: the beginning of a time in UTC, such as 2026-01-31T18")] = "",
    ) -> Response:
        auth.require(request, leader, "admin")
        if log is None:
            raise WrongState("this master keeps no audit log", hint="look at its configuration: log_dir")

        def fits(entry: dict[str, Any]) -> bool:
            return (
                (not who or entry.get("who") == who)
                and (not path or path in f"{entry.get('path', '')} {entry.get('operation', '')}")
                and str(entry.get("at", "")) >= since
            )

        try:
            found = await asyncio.to_thread(log.newest, limit, fits)
        except OSError as error:
            raise HostError(f"the audit log cannot be read: {error}") from None
        return answer({"items": found, "trouble": log.trouble, "lost": log.lost})

    return routes
