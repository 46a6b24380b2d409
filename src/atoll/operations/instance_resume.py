"""Operation: let an instance go on that its storage stopped. Nothing was lost meanwhile: the guest waits for the writes that failed."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.model.errors import AtollError, GuestError, PoolFull, PoolUnavailable, WrongState
from atoll.model.messages import GuestStatus
from atoll.model.objects import Instance
from atoll.operations import trouble
from atoll.operations.index import Index
from atoll.operations.instance_power import instance_locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Nothing
from atoll.operations.running import check_runs
from atoll.operations.state import State


def _plan(state: State, instance: Instance) -> dict[str, Any]:
    claim = state.claim(instance.id)
    if claim.migration is not None:
        raise WrongState(f"instance {instance.name} is being migrated", hint="atoll job list")
    return {"node": check_runs(state, instance).id, "generation": claim.generation}


def _prepare(state: State, target: str, request: Nothing) -> Prepared:
    instance = state.store.find(Instance, target)
    plan = _plan(state, instance)
    return Prepared({"id": instance.id}, instance_locks(state, instance, plan["node"]), f"resume instance {instance.name}")


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    plan = await job.read("plan", lambda: _plan(job.state, job.state.store.require(Instance, request["id"])))
    job.progress(20, "letting it try again")
    order = {"instance": request["id"], "generation": plan["generation"]}
    answer = await job.call("let it go on", plan["node"], "guest.go_on", order, deadline=90.0)
    status = GuestStatus(**answer)
    if status.state in ("paused", "hung"):
        raise _still(job.state, job.state.store.require(Instance, request["id"]), status)
    return {"instance": request["id"], "state": status.state}


def _still(state: State, instance: Instance, status: GuestStatus) -> AtollError:
    index = Index(state)
    words = f"instance {instance.name} stands still again: {trouble.why(status, index)}"
    pools = trouble.failed_pools(status, index)
    looks = [command for command in trouble.commands(instance, status, index) if "pool" in command]
    if not pools:
        return GuestError(words)
    if "failed" in pools.values():
        return PoolUnavailable(words, hint="; ".join(looks))
    return PoolFull(words, hint=f"make room, then: atoll instance resume {instance.name}")


register(Operation("instance.resume", Nothing, _prepare, _run))
