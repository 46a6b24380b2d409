"""Operation: reinstall an instance with the scripts of an OS definition."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import InUse, InvalidInput
from atoll.model.objects import Instance
from atoll.operations.common import frozen
from atoll.operations.importing import DAY
from atoll.operations.installing import check_definition, run_script
from atoll.operations.instance_power import instance_locks, plan_start
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceReinstall
from atoll.operations.running import release_from
from atoll.operations.state import State

_FIELDS = ("os", "os_parameters", "os_scripts")


def _wanted(state: State, instance: Instance, request: dict[str, Any]) -> dict[str, Any]:
    """What its record shall say. Errors: InvalidInput (no definition is named), InUse (it runs)."""
    os = request["os"] or instance.os
    if not os:
        raise InvalidInput(f"instance {instance.name} has no OS definition", hint="-o NAME; see atoll os list")
    if instance.desired == "running":
        raise InUse(f"instance {instance.name} runs", hint=f"atoll instance stop {instance.name}")
    same = os.partition("+")[0] == instance.os.partition("+")[0]
    kept = instance.os_parameters if same else {}
    return {"os": os, "os_parameters": {**kept, **request["os_parameters"]}, "os_scripts": True}


def _prepare(state: State, target: str, request: InstanceReinstall) -> Prepared:
    instance = state.store.find(Instance, target)
    wanted = _wanted(state, instance, request.model_dump(mode="json"))
    node = plan_start(state, instance, None, False)["node"]
    held = instance_locks(state, instance, node, state.claim(instance.id).holder)
    return Prepared(frozen(request, id=instance.id), held, f"reinstall instance {instance.name} with {wanted['os']}", deadline=DAY)


@undo_function("instance.os")
def _restore(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Instance, args["instance"])
    return Changes(put=[found.model_copy(update={field: args[field] for field in _FIELDS})] if found else [])


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    instance = request["id"]

    def plan() -> dict[str, Any]:
        state: State = job.state
        found = state.store.require(Instance, instance)
        before = {field: getattr(found, field) for field in _FIELDS}
        return {**plan_start(state, found, None, False), "wanted": _wanted(state, found, request), "before": before}

    decided = await job.read("plan", plan)
    wanted = decided["wanted"]
    await check_definition(job, instance, decided["node"], wanted["os"], wanted["os_parameters"])
    if decided["release"]:
        await release_from(job, instance, decided["release"])

    def record() -> Changes:
        return Changes(put=[job.state.store.require(Instance, instance).model_copy(update=wanted)])

    await job.write("record the OS", record, Undo("instance.os", {"instance": instance, **decided["before"]}))
    await run_script(job, instance, decided["node"], "create", request["os_timeout"], span=(5.0, 95.0), extra={"reinstall": True})
    return {"instance": instance, "os": wanted["os"]}


register(Operation("instance.reinstall", InstanceReinstall, _prepare, _run))
