"""What can be read: the cluster, its objects and its jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Protocol, runtime_checkable

from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from atoll.api.leader import Leader
from atoll.api.metrics import MEDIA_TYPE, JobDurations, exposition
from atoll.api.rest import auth
from atoll.model.errors import InvalidInput
from atoll.model.messages import Space
from atoll.operations import views
from atoll.operations.index import Index, Row
from atoll.operations.storages import preview

#: The longest answer of a list, and of a wait in seconds.
MAX_LIMIT, MAX_WAIT = 10_000, 60.0


@runtime_checkable
class KnowsSpace(Protocol):
    """A leader that also knows how full its pools are."""

    def spaces(self) -> Mapping[tuple[str, str], Space]:
        """(pool id, node id) -> space; the node id is "" where the pool is shared."""


def answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON-able data as a response, without the detours that cost a second for 10,000 rows."""
    return Response(json.dumps(data, default=str), status_code=status, media_type="application/json", headers=headers)


def index_of(leader: Leader) -> Index:
    """The index for rows of one answer."""
    return Index(leader.state, _spaces(leader))


def _spaces(leader: Leader) -> Mapping[tuple[str, str], Space] | None:
    return leader.spaces() if isinstance(leader, KnowsSpace) else None


def pick(rows: list[Row], fields: str | None) -> list[Row]:
    """The rows with the named fields only. Errors: InvalidInput."""
    if not fields or not rows:
        return rows
    wanted = [name.strip() for name in fields.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in rows[0]]
    if unknown:
        raise InvalidInput(f"there is no field {', '.join(unknown)}", hint=f"fields: {', '.join(rows[0])}")
    return [{name: row[name] for name in wanted} for row in rows]


async def job_row(leader: Leader, target: str) -> Row:
    """One job with its progress and steps."""
    job = views.find(leader.state, "job", target)
    steps = await leader.state.store.journal(job)
    return views.job(job, index_of(leader), leader.job_progress(job.number), steps)


def router(leader: Leader) -> APIRouter:
    """The routes of ``GET /v1``; every role may use them."""
    routes = APIRouter()
    durations = JobDurations()
    leader.state.store.listeners.append(durations.changed)

    @routes.get("/metrics", tags=["cluster"], summary="Figures for Prometheus", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        auth.require(request, leader, "reader")
        text = exposition(leader.state, _spaces(leader) or {}, leader.events, durations)
        return Response(text, media_type=MEDIA_TYPE)

    @routes.get("/v1/cluster", tags=["cluster"], summary="The cluster")
    async def cluster(request: Request) -> Response:
        auth.require(request, leader, "reader")
        return answer(views.cluster(leader.state))

    @routes.get("/v1/cluster/verify", tags=["cluster"], summary="Look at everything; strange, missing and held things are findings")
    async def verify(request: Request) -> Response:
        auth.require(request, leader, "reader")
        return answer({"findings": [asdict(finding) for finding in await leader.verify()]})

    @routes.get("/v1/cluster/doctor", tags=["cluster"], summary="What each node finds when it looks at itself; takes up to two minutes")
    async def doctor(request: Request) -> Response:
        auth.require(request, leader, "operator")
        return answer({"findings": await leader.doctor()})

    @routes.get("/v1/nodes/{target}/logs", tags=["node"], summary="The end of a node's logs, without secrets")
    async def logs(request: Request, target: str) -> Response:
        auth.require(request, leader, "admin")
        return answer({"logs": await leader.logs(views.find(leader.state, "node", target).id)})

    @routes.get("/v1/os", tags=["os"], summary="The OS definitions on the nodes, and what is wrong with them where", operation_id="list_os")
    async def os_definitions(request: Request) -> Response:
        auth.require(request, leader, "reader")
        return answer({"items": await leader.os_definitions()})

    @routes.get("/v1/groups/{target}/storage-plan", tags=["storage"], summary="What storage.init would make of the group, in words")
    async def plan(request: Request, target: str, type: Annotated[str, Query(description="the kind of storage cluster")] = "") -> Response:
        auth.require(request, leader, "reader")
        return answer(preview(leader.state, target, type).model_dump(mode="json"))

    @routes.get("/v1/storages/{target}/status", tags=["storage"], summary="What a storage cluster says of itself now")
    async def storage_status(request: Request, target: str) -> Response:
        auth.require(request, leader, "reader")
        return answer(await leader.storage_status(target))

    @routes.get("/v1/pools/{target}/images", tags=["pool"], summary="What lies in a pool now, other people's images included")
    async def images(request: Request, target: str) -> Response:
        auth.require(request, leader, "reader")
        return answer({"items": await leader.pool_images(target)})

    for noun in views.KINDS:
        _reads_of(routes, leader, noun)
    return routes


def _reads_of(routes: APIRouter, leader: Leader, noun: str) -> None:
    name = f"list_{noun}s"

    @routes.get(f"/v1/{noun}s", tags=[noun], summary=f"All {noun}s, in pages", name=name, operation_id=name)
    async def many(
        request: Request,
        fields: Annotated[str | None, Query(description="comma-separated; default all")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
        after: Annotated[str, Query(description="the `after` of the page before")] = "",
    ) -> Response:
        auth.require(request, leader, "reader")
        rows, more = views.rows(leader.state, noun, _spaces(leader), after=after, limit=limit)
        return answer({"items": pick(rows, fields), "after": more})

    if noun == "job":

        @routes.get("/v1/jobs/{target}", tags=[noun], summary="A job with progress and steps; waits for a change", operation_id="get_job")
        async def job(
            request: Request,
            target: str,
            wait: Annotated[float, Query(ge=0, le=MAX_WAIT, description="seconds to wait for a change")] = 0.0,
        ) -> Response:
            auth.require(request, leader, "reader")
            found = views.find(leader.state, "job", target)
            if wait and not found.state.ended:
                await leader.wait_job(found.number, wait)
            return answer(await job_row(leader, target))

        return

    @routes.get(f"/v1/{noun}s/{{target}}", tags=[noun], summary=f"One {noun}, by name or id", operation_id=f"get_{noun}")
    async def one(request: Request, target: str) -> Response:
        auth.require(request, leader, "reader")
        _, view = views.KINDS[noun]
        return answer(view(views.find(leader.state, noun, target), index_of(leader)))
