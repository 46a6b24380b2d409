"""The REST application, around whoever leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from atoll import __version__
from atoll.api.leader import Leader
from atoll.api.rest import agents, audit, body, lane, problems, reads, stream, submit
from atoll.operations.registry import OPERATIONS, Operation
from atoll.runtime.audit import AuditLog


def create_app(leader: Leader, operations: Mapping[str, Operation] | None = None, log: AuditLog | None = None) -> FastAPI:
    """The app. Operations must be registered before; ``operations`` replaces the table, for tests. ``log``: where requests are noted."""
    table = OPERATIONS if operations is None else operations
    # No /docs and /redoc: their pages load scripts from elsewhere.
    app = FastAPI(title="Atoll", version=__version__, openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None, redirect_slashes=False)
    problems.install(app)
    routers = [agents.router(leader), submit.router(leader, table), reads.router(leader), stream.router(leader), audit.router(leader, log)]
    app.add_middleware(lane.Lane, routes=[route for router in routers for route in router.routes])
    app.add_middleware(body.BodyLimit)
    if log is not None:
        app.add_middleware(audit.AuditMiddleware, log=log)
    for router in routers:
        app.include_router(router)
    app.openapi = lambda: _openapi(app, table)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI, table: Mapping[str, Operation]) -> dict[str, Any]:
    """The description of ``/v1``: routes from the app, request bodies from the models, problems everywhere."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title, version=app.version, routes=app.routes, description="Shared storage for clusters of virtual machines"
    )
    models: list[Any] = [operation.request for operation in table.values() if operation.public]
    models += [submit.NodeTokenRequest, submit.ApiTokenRequest, submit.ResumeRequest]
    unique = list(dict.fromkeys(models))
    _, definitions = models_json_schema([(m, "validation") for m in unique], ref_template="#/components/schemas/{model}")
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions.get("$defs", {}))
    schemas["Problem"] = problems.SCHEMA
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]
    fault = {"description": "a problem", "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for path in schema["paths"].values():
        for described in path.values():
            described["responses"].pop("422", None)
            described["responses"]["default"] = fault
    app.openapi_schema = schema
    return schema
