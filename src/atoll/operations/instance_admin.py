"""Operations: rename, modify and tag an instance."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import InUse
from atoll.model.objects import Instance, Nic, Volume
from atoll.operations.common import check_new_name, frozen, locks, name_lock, prepare_tags, run_tags
from atoll.operations.importing import DAY
from atoll.operations.installing import check_definition, run_script
from atoll.operations.instance_add import plan_nics
from atoll.operations.instance_power import instance_locks, plan_start
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceModify, InstanceRename, TagsChange
from atoll.operations.seed import name_of
from atoll.operations.state import State
from atoll.operations.volumes import rename_image


def _renames(state: State, instance: Instance, new_name: str) -> list[tuple[str, str]]:
    """Volumes named after their instance follow its name."""
    found = []
    for _, volume in state.volumes_of(instance):
        if volume.name.startswith(f"{instance.name}-disk") or volume.name == name_of(instance.name):
            found.append((volume.id, new_name + volume.name[len(instance.name) :]))
    return found


def _prepare_rename(state: State, target: str, request: InstanceRename) -> Prepared:
    instance = state.store.find(Instance, target)
    check_new_name(state, Instance, request.new_name)
    if instance.desired == "running" or state.claim(instance.id).holder:
        raise InUse(f"instance {instance.name} runs; its name is part of it", hint=f"atoll instance stop {instance.name}")
    names = [name for _, name in _renames(state, instance, request.new_name)]
    for name in names:
        check_new_name(state, Volume, name)
    scripted = instance.os_scripts and request.run_script
    held = instance_locks(state, instance, plan_start(state, instance, None, False)["node"] if scripted else None)
    return Prepared(
        frozen(request, id=instance.id),
        locks(held.shared, [*held.exclusive, name_lock(Instance, request.new_name), *(name_lock(Volume, n) for n in names)]),
        f"rename instance {instance.name} to {request.new_name}",
        deadline=DAY if scripted else None,
    )


@undo_function("instance.name")
def _restore_name(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Instance, args["instance"])
    return Changes(put=[found.model_copy(update={"name": args["name"]})] if found else [])


async def _run_rename(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        instance = job.state.store.require(Instance, request["id"])
        scripted = instance.os_scripts and request["run_script"]
        node = plan_start(job.state, instance, None, False)["node"] if scripted else None
        renamed = _renames(job.state, instance, request["new_name"])
        return {"old": instance.name, "volumes": renamed, "node": node, "os": instance.os, "os_parameters": instance.os_parameters}

    decided = await job.read("plan", plan)
    if decided["node"]:
        await check_definition(job, request["id"], decided["node"], decided["os"], decided["os_parameters"])

    def record() -> Changes:
        check_new_name(job.state, Instance, request["new_name"])
        return Changes(put=[job.state.store.require(Instance, request["id"]).model_copy(update={"name": request["new_name"]})])

    await job.write("record name", record, Undo("instance.name", {"instance": request["id"], "name": decided["old"]}))
    for volume, name in decided["volumes"]:
        await rename_image(job, volume, name)
    if decided["node"]:
        old = {"old_name": decided["old"]}
        await run_script(job, request["id"], decided["node"], "rename", request["os_timeout"], span=(30.0, 95.0), extra=old)
    return {"instance": request["id"], "name": request["new_name"]}


register(Operation("instance.rename", InstanceRename, _prepare_rename, _run_rename))


def _prepare_modify(state: State, target: str, request: InstanceModify) -> Prepared:
    instance = state.store.find(Instance, target)
    if request.nics is not None:
        plan_nics(state, [nic.model_dump(mode="json") for nic in request.nics])
    return Prepared(frozen(request, id=instance.id), instance_locks(state, instance), f"modify instance {instance.name}")


async def _run_modify(job: JobContext, request: dict[str, Any]) -> Any:
    nics = await job.read("nics", lambda: plan_nics(job.state, request["nics"]) if request["nics"] is not None else None)

    def change() -> Changes:
        found = job.state.store.require(Instance, request["id"])
        update = {field: request[field] for field in ("memory", "vcpus", "os") if request[field] is not None}
        boot = {field: request[field] for field in ("kernel", "initrd", "append") if request[field] is not None}
        if boot:
            update["boot"] = found.boot.model_copy(update=boot)
        if nics is not None:
            update["nics"] = tuple(Nic(**nic) for nic in nics)
        return Changes(put=[found.model_copy(update=update)], result={"takes_effect": "at the next start"})

    await job.commit()
    return await job.write("change", change)


register(Operation("instance.modify", InstanceModify, _prepare_modify, _run_modify))
register(Operation("instance.tags", TagsChange, prepare_tags(Instance), run_tags(Instance)))
