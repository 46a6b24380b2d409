"""Routes that make jobs, generated from the table of operations; and those that steer jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from atoll.api.leader import Leader
from atoll.api.rest import auth, body
from atoll.api.rest.reads import MAX_WAIT, answer, job_row
from atoll.model.errors import InvalidInput
from atoll.operations.index import Row
from atoll.operations.registry import Operation
from atoll.operations.requests import Name, Ref
from atoll.operations.views import find

_CREATES, _DELETES = ("add", "create"), ("remove", "delete")


class NodeTokenRequest(BaseModel):
    """For which node the join token is, and the group it shall be in; ``rejoin``: it is one of the cluster and shall come back."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    group: Ref | None = None
    rejoin: bool = False


class ApiTokenRequest(BaseModel):
    """For whom the API token is, what it allows, and for how many days it is good (default: until it is revoked)."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    days: Annotated[int, Field(ge=1, le=36500)] | None = None
    role: Literal["reader", "operator", "admin"] = "reader"


class ResumeRequest(BaseModel):
    """``node_is_dead``: your word that this node is off, for this moment."""

    model_config = ConfigDict(extra="forbid")
    node_is_dead: Ref | None = Field(default=None)


def address(operation: Operation) -> tuple[str, str]:
    """The HTTP method and path of an operation; paths of existing objects have ``{target}``."""
    noun, verb = operation.noun, operation.verb
    if noun == "cluster":
        return "POST", f"/v1/cluster/{verb}"
    if verb in _CREATES:
        return "POST", f"/v1/{noun}s"
    if verb == "import":
        return "POST", f"/v1/{noun}s/{verb}"
    if verb in _DELETES:
        return "DELETE", f"/v1/{noun}s/{{target}}"
    return "POST", f"/v1/{noun}s/{{target}}/{verb}"


def router(leader: Leader, operations: Mapping[str, Operation]) -> APIRouter:
    """All routes that change something."""
    routes = APIRouter()
    _tokens(routes, leader)
    _jobs(routes, leader)
    for operation in operations.values():
        if operation.public:
            _operation(routes, leader, operation)
    return routes


def _with_body(model: type[BaseModel], required: bool = True) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def _operation(routes: APIRouter, leader: Leader, operation: Operation) -> None:
    method, path = address(operation)
    required = any(field.is_required() for field in operation.request.model_fields.values())

    async def submit(
        request: Request,
        dry_run: Annotated[bool, Query(description="check only; nothing is changed")] = False,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT, description="seconds to wait for the job's end, which is then in `ended`")] = 0.0,
        idempotency_key: Annotated[str, Header(description="the same key and request give the same job again")] = "",
    ) -> Response:
        caller = auth.require(request, leader, operation.role)
        if len(idempotency_key) > 255 or not idempotency_key.isprintable():
            raise InvalidInput("the Idempotency-Key is longer than 255 characters or not printable")
        parsed = await body.parse(request, operation.request)
        auth.refuse_unless_admin(caller, parsed.only_admins)
        submission = await leader.submit(
            operation.name,
            request.path_params.get("target", ""),
            parsed.model_dump(mode="json"),
            who=caller,
            key=idempotency_key,
            dry_run=dry_run,
        )
        if submission.job is None:
            locks = {"shared": list(submission.shared), "exclusive": list(submission.exclusive)}
            plan = {"plan": submission.plan} if submission.plan else {}
            return answer({"job": None, "summary": submission.summary, "repeated": False, **locks, **plan})
        made: dict[str, Any] = {"job": submission.job, "summary": submission.summary, "repeated": submission.repeated}
        if wait:
            made["ended"] = await _ended(leader, submission.job, wait)
        return answer(made, 202, {"Location": f"/v1/jobs/{submission.job}"})

    extra = _with_body(operation.request, required)
    if "{target}" in path:
        described = {"description": f"name or id of the {operation.noun}"}
        extra["parameters"] = [{"name": "target", "in": "path", "required": True, "schema": {"type": "string"}, **described}]
    routes.add_api_route(
        path,
        submit,
        methods=[method],
        status_code=202,
        tags=[operation.noun],
        summary=(operation.request.__doc__ or operation.name).strip().splitlines()[0],
        name=operation.name,
        operation_id=operation.name.replace(".", "_").replace("-", "_"),
        openapi_extra=extra,
    )


async def _ended(leader: Leader, number: int, seconds: float) -> Row | None:
    """The job once it has ended or needs attention; None when that takes longer."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    job = find(leader.state, "job", str(number))
    while job.state.active and (left := until - loop.time()) > 0:
        job, _ = await leader.wait_job(number, left)
    return None if job.state.active else await job_row(leader, str(number))


def _jobs(routes: APIRouter, leader: Leader) -> None:
    @routes.post("/v1/jobs/{target}/cancel", tags=["job"], summary="Ask a job to stop; it is undone")
    async def cancel(request: Request, target: str) -> Response:
        auth.require(request, leader, "operator")
        await leader.cancel_job(find(leader.state, "job", target).number)
        return answer(await job_row(leader, target))

    @routes.post("/v1/jobs/{target}/undo", tags=["job"], summary="Undo a job that needs attention")
    async def undo(request: Request, target: str) -> Response:
        auth.require(request, leader, "operator")
        await leader.undo_job(find(leader.state, "job", target).number)
        return answer(await job_row(leader, target))

    @routes.post(
        "/v1/jobs/{target}/resume",
        tags=["job"],
        summary="Let a job that needs attention try again",
        openapi_extra=_with_body(ResumeRequest, required=False),
    )
    async def resume(request: Request, target: str) -> Response:
        auth.require(request, leader, "operator")
        wanted = await body.parse(request, ResumeRequest)
        await leader.resume_job(find(leader.state, "job", target).number, wanted.node_is_dead)
        return answer(await job_row(leader, target))


def _tokens(routes: APIRouter, leader: Leader) -> None:
    @routes.post("/v1/nodes/token", tags=["node"], summary="A token with which a node may join", openapi_extra=_with_body(NodeTokenRequest))
    async def node_token(request: Request) -> Response:
        auth.require(request, leader, "admin")
        wanted = await body.parse(request, NodeTokenRequest)
        token = await leader.join_token(wanted.name, wanted.group, wanted.rejoin)
        return answer({"name": wanted.name, "token": token}, 201, {"Cache-Control": "no-store"})

    @routes.post("/v1/tokens", tags=["cluster"], summary="A new API token, shown once", openapi_extra=_with_body(ApiTokenRequest))
    async def api_token(request: Request) -> Response:
        auth.require(request, leader, "admin")
        wanted = await body.parse(request, ApiTokenRequest)
        token = await leader.api_token(wanted.name, wanted.role, wanted.days)
        return answer({"name": wanted.name, "role": wanted.role, "token": token}, 201, {"Cache-Control": "no-store"})

    @routes.get("/v1/tokens", tags=["cluster"], summary="The API tokens: names, roles and dates, never the tokens themselves")
    async def api_tokens(request: Request) -> Response:
        auth.require(request, leader, "admin")
        return answer({"items": leader.api_tokens()})

    @routes.delete("/v1/tokens/{target}", tags=["cluster"], summary="Revoke an API token; it is refused from now on")
    async def revoke(request: Request, target: str) -> Response:
        auth.require(request, leader, "admin")
        await leader.revoke_token(target)
        return answer({"name": target})
