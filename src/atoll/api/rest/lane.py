"""The short way to a route, past most of what FastAPI does for each request: that costs more than what the routes do.

FastAPI stays the one that knows the routes, describes them, and explains what is wrong with a request. This takes only requests that are
plainly right (a known address, parameters that fit) and calls the very same functions; everything else goes the long way.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.api.rest import problems
from atoll.model.errors import AtollError


class _Known:
    """A route. Only if it is ``understood`` it can be called from here."""

    def __init__(self, route: APIRoute) -> None:
        self.endpoint: Callable[..., Any] = route.endpoint
        self.path: re.Pattern[str] = route.path_regex
        self.understood = _understood(route)
        parameters = _parameters(route.endpoint)
        self.in_path = [name for name in parameters if f"{{{name}}}" in route.path]
        others = parameters.items() if self.understood else ()
        self.others = {name: _Other(name, *parameter) for name, parameter in others if name not in self.in_path}

    def arguments(self, scope: Scope, found: dict[str, str]) -> dict[str, Any] | None:
        """What to call the endpoint with; None when something about the request is not plainly right."""
        if not self.understood:
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)) if scope["query_string"] else {}
        given: dict[str, Any] = {name: found[name] for name in self.in_path}
        for name, other in self.others.items():
            text = _header(scope, other.header) if other.header else query.get(name)
            if text is not None:
                try:
                    given[name] = other.adapter.validate_python(text)
                except ValidationError:
                    return None
            elif other.default is inspect.Parameter.empty:
                return None
        return given


class _Other:
    """A parameter in the query, or in a header."""

    def __init__(self, name: str, hint: Any, default: Any) -> None:
        markers = get_args(hint)[1:]
        self.header = name.replace("_", "-").encode() if any(type(marker).__name__ == "Header" for marker in markers) else b""
        bounds = tuple(bound for marker in markers for bound in getattr(marker, "metadata", ()))
        kind: Any = get_args(hint)[0]
        self.adapter: TypeAdapter[Any] = TypeAdapter(Annotated[(kind, *bounds)] if bounds else kind)
        self.default = default


def _parameters(endpoint: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    hints = get_type_hints(endpoint, include_extras=True)
    found = inspect.signature(endpoint).parameters.values()
    return {p.name: (hints[p.name], p.default) for p in found if hints[p.name] is not Request}


def _understood(route: APIRoute) -> bool:
    """Whether all its parameters are the request, parts of the path, or simple values in query and headers."""
    return not route.dependencies and all(
        f"{{{name}}}" in route.path
        or (get_origin(hint) is Annotated and any(type(marker).__name__ in ("Query", "Header") for marker in get_args(hint)[1:]))
        for name, (hint, _) in _parameters(route.endpoint).items()
    )


def _header(scope: Scope, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


class Lane:
    """Middleware, right inside of the limit on bodies. ``routes``: in the order in which they are looked at."""

    def __init__(self, app: ASGIApp, routes: Iterable[Any]) -> None:
        self.app = app
        self._known: dict[tuple[str, int], list[_Known]] = {}
        for route in routes:
            if isinstance(route, APIRoute):
                known = _Known(route)
                for method in route.methods or ():
                    self._known.setdefault((method, route.path.count("/")), []).append(known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for known in self._known.get((scope["method"], scope["path"].count("/")), ()):
                match = known.path.match(scope["path"])
                if match is not None:
                    arguments = known.arguments(scope, match.groupdict())
                    if arguments is not None:
                        await self._call(known, match.groupdict(), arguments, scope, receive, send)
                        return
                    break
        await self.app(scope, receive, send)

    @staticmethod
    async def _call(known: _Known, match: dict[str, str], arguments: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        # As the long way has it: parts of the path that only the endpoint's request sees.
        scope["path_params"] = match
        request = Request(scope, receive, send)
        try:
            response = await known.endpoint(request, **arguments)
        except AtollError as error:
            response = problems.response(error, scope["path"])
        await response(scope, receive, send)
