"""``GET /v1/events``: what changes, as Server-Sent Events."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atoll.api.events import NOUNS, Follower, Hub
from atoll.api.leader import Leader
from atoll.api.rest import auth
from atoll.model.errors import InvalidInput
from atoll.operations import views

_DESCRIPTION = f"""A stream of `text/event-stream`. The event's name is the noun of what changed ({", ".join(NOUNS)}), its data an object
with `noun`, `id`, `change` (changed or removed), `revision`, and where it has them name, state and a few more. Its id is the store's
revision: send the last one as `Last-Event-ID`, and what came since is told first. `progress` tells how far a job is, and has no id.
`reset` says that something was missed (the client was too slow, or the log no longer reaches back so far): read everything again, and go on
from its id. `end`: this master ends; connect again."""


class EventStream(Response):
    """The answer: frames until the client hangs up or is let go. A client that reads nothing is cut off by the server's limits."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub, follower: Follower) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # The length is not known; Response has set that of an empty body.
        del self.headers["content-length"]
        self._hub, self._follower = hub, follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hangs_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._follower.end(b"")

        listening = asyncio.ensure_future(hangs_up())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self._follower.frames():
                await send({"type": "http.response.body", "body": text, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            listening.cancel()
            self._hub.leave(self._follower)


def router(leader: Leader) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.get(
        "/v1/events",
        tags=["events"],
        summary="What changes, while it changes",
        description=_DESCRIPTION,
        operation_id="follow_events",
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def events(
        request: Request,
        nouns: Annotated[str, Query(description="comma-separated; default all")] = "",
        job: Annotated[int | None, Query(ge=1, le=9_999_999_999, description="only this job; its present state is told first")] = None,
        last_event_id: Annotated[str, Header(description="the last id that was seen")] = "",
    ) -> Response:
        auth.require(request, leader, "reader")
        wanted = [noun.strip() for noun in nouns.split(",") if noun.strip()]
        unknown = [noun for noun in wanted if noun not in NOUNS]
        if unknown:
            raise InvalidInput(f"there are no events of {', '.join(unknown)}", hint=f"nouns: {', '.join(NOUNS)}")
        if last_event_id and not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 19):
            raise InvalidInput("Last-Event-ID is not an id of these events", hint="send the id of the last event that was seen")
        if job is not None:
            views.find(leader.state, "job", str(job))
        hub = leader.events
        return EventStream(hub, await hub.follow(wanted, job, int(last_event_id) if last_event_id else None))

    return routes
