"""The short way to a route answers exactly as the long way does."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI, Header, Query, Request
from starlette.responses import Response

from atoll.api.rest import lane, problems
from atoll.model.errors import NotFound

ROUTES = APIRouter()
SEEN: list[bool] = []


def said(request: Request, **values: Any) -> Response:
    SEEN.append("route" in request.scope)  # FastAPI's own router leaves this
    return Response(json.dumps({"path": dict(request.path_params), **values}), media_type="application/json")


@ROUTES.get("/v1/things/special")
async def special(request: Request) -> Response:
    return said(request, special=True)


@ROUTES.get("/v1/things/{target}")
async def one(
    request: Request,
    target: str,
    wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
    full: Annotated[bool, Query()] = False,
    fields: Annotated[str | None, Query()] = None,
    idempotency_key: Annotated[str, Header()] = "",
) -> Response:
    if target == "nothing":
        raise NotFound("there is no such thing")
    return said(request, target=target, wait=wait, full=full, fields=fields, key=idempotency_key)


@ROUTES.get("/v1/odd/{target}")
async def odd(request: Request, target: int, wanted: int = 3) -> Response:
    return said(request, target=target, wanted=wanted)


def app(*, short: bool) -> FastAPI:
    made = FastAPI()
    problems.install(made)
    if short:
        made.add_middleware(lane.Lane, routes=ROUTES.routes)
    made.include_router(ROUTES)
    return made


async def ask(served: FastAPI, path: str, query: str = "", key: str = "", method: str = "GET") -> tuple[int, Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"idempotency-key", key.encode())] if key else []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(), "headers": headers,
        "root_path": "", "scheme": "http", "server": ("x", 80), "client": ("y", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await served(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


SHORT = [
    ("/v1/things/a", "", ""),
    ("/v1/things/special", "", ""),
    ("/v1/things/a", "wait=2.5&full=true&fields=x,y", "k1"),
    ("/v1/things/ü b", "full=no&other=1&wait=1&wait=3", ""),
    ("/v1/things/nothing", "", ""),
]
LONG = [
    ("/v1/things/a", "wait=61", ""),
    ("/v1/things/a", "wait=x", ""),
    ("/v1/things/a", "full=maybe", ""),
    ("/v1/things/a/b", "", ""),
    ("/v1/odd/4", "wanted=5", ""),
    ("/v1/odd/x", "", ""),
]


@pytest.mark.parametrize(("path", "query", "key"), SHORT + LONG)
async def test_both_ways_answer_the_same(path: str, query: str, key: str) -> None:
    assert await ask(app(short=True), path, query, key) == await ask(app(short=False), path, query, key)


@pytest.mark.parametrize(("path", "query", "key"), SHORT[:4])
async def test_what_is_plainly_right_takes_the_short_way(path: str, query: str, key: str) -> None:
    SEEN.clear()
    assert (await ask(app(short=True), path, query, key))[0] == 200
    assert SEEN == [False]


async def test_another_method_is_explained_by_the_long_way() -> None:
    assert (await ask(app(short=True), "/v1/things/a", method="POST"))[0] == 405
