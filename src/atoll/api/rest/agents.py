"""What nodes ask of a master: to join, and to report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response

from atoll.api.leader import Leader
from atoll.api.rest import auth, body
from atoll.api.rest.reads import answer
from atoll.model.ids import check_name
from atoll.model.messages import NodeReport

_Text = Annotated[str, StringConstraints(min_length=1, max_length=253)]


class JoinRequest(BaseModel):
    """A node's wish to join: its token, name, address and a certificate signing request (PEM)."""

    model_config = ConfigDict(extra="forbid")
    token: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    name: _Text
    address: _Text
    port: Annotated[int, Field(ge=1, le=65535)] = 7771
    csr: Annotated[str, StringConstraints(min_length=1, max_length=65536)]


def router(leader: Leader) -> APIRouter:
    """The routes of ``/agent/v1``."""
    routes = APIRouter(include_in_schema=False)

    @routes.post("/agent/v1/join")
    async def join(request: Request) -> Response:
        wish = await body.parse(request, JoinRequest)
        check_name(wish.name, "node name")
        found = await leader.join(wish.token, wish.name, wish.address, wish.port, wish.csr)
        return answer(asdict(found), 201, {"Cache-Control": "no-store"})

    @routes.post("/agent/v1/report")
    async def report(request: Request) -> Response:
        node = auth.node(request, leader)
        return answer(await leader.report(node, await body.parse(request, NodeReport)))

    @routes.get("/agent/v1/facts")
    async def facts(request: Request) -> Response:
        return answer(leader.facts(auth.node(request, leader)), 200, {"Cache-Control": "no-store"})

    return routes
