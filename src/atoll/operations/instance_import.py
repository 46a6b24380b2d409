"""Operation: make an instance from the file that an export has written."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Undo
from atoll.model.errors import InvalidInput
from atoll.model.ids import new_id
from atoll.model.objects import Instance, Node, Pool, Volume
from atoll.operations.common import check_new_name, check_pool_open, check_size_for, check_usable, frozen, locks, name_lock
from atoll.operations.importing import DAY, LONG
from atoll.operations.instance_add import make_instance, plan_add
from atoll.operations.instance_export import check_exportable
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceAdd, InstanceImport
from atoll.operations.state import State

#: Disks that an instance has at most.
_DISKS = 8


def _prepare(state: State, target: str, request: InstanceImport) -> Prepared:
    check_new_name(state, Instance, request.name)
    node = check_usable(state, state.store.find(Node, request.node))
    pools = [pool for pool in state.store.all(Pool) if node.group in pool.groups]
    if request.template:
        pools = [state.resolve_pool(request.template, node.group)]
        check_pool_open(state, pools[0], node.group)
    # How many disks there are says only the file.
    names = [f"{request.name}-disk{index}" for index in range(_DISKS)]
    # As in instance.add: nobody changes or removes an instance that is still being made.
    ident = target or new_id("i", state.rng)
    return Prepared(
        frozen(request, id=ident, node=node.id),
        locks(
            [*(pool.resource for pool in pools), f"group:{node.group}", node.resource],
            [f"instance:{ident}", name_lock(Instance, request.name), *(name_lock(Volume, name) for name in names)],
        ),
        f"import instance {request.name} from {node.name}:{request.path}",
        deadline=DAY,
    )


def _as_request(state: State, request: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The request that makes an instance like the one in the file, empty."""
    node = state.store.require(Node, request["node"])
    what = found["instance"]
    known = {nic.mac for instance in state.store.all(Instance) for nic in instance.nics}
    nics = [{**nic, "mac": None if nic["mac"] in known else nic["mac"]} for nic in what["nics"]]
    pools = {pool.name for pool in state.store.all(Pool)}
    disks = []
    for disk in found["disks"]:
        if not request["template"] and disk["pool"] not in pools:
            raise InvalidInput(f"there is no pool {disk['pool']!r} here, where the exported disk was", hint="-t POOL")
        disks.append({"size": disk["size"], "mode": disk["mode"], "pool": request["template"] or disk["pool"]})
    boot = what["boot"]
    try:
        made = InstanceAdd(
            name=request["name"],
            disks=disks,
            nics=nics,
            memory=what["memory"],
            vcpus=what["vcpus"],
            node=node.name,
            os=what["os"],
            os_parameters=what["os_parameters"],
            no_install=True,
            kernel=boot["kernel"],
            initrd=boot["initrd"],
            append=boot["append"],
            start=request["start"],
            tags=what["tags"],
        )
    except ValueError as error:
        raise InvalidInput(f"the export describes an instance that cannot be made here: {error}") from None
    return {**made.model_dump(mode="json"), "id": request.get("id"), "node": node.id, "os_scripts": bool(what["os_scripts"])}


def _plan(state: State, request: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is made, as in ``instance.add``; every disk is made on the node that has the file, for only it can fill it."""
    wanted = _as_request(state, request, found)
    plan = plan_add(state, wanted)
    for volume, disk in zip(plan["volumes"], found["disks"], strict=True):
        check_exportable(state, state.store.require(Pool, volume["pool"]))
        if volume["size"] != check_size_for(state.driver(state.store.require(Pool, volume["pool"])), disk["size"]):
            raise InvalidInput("the sizes of the exported disks cannot be kept here")
        volume["worker"] = request["node"]
    return {"wanted": wanted, "plan": plan, "id": found["id"]}


async def _fill(
    job: JobContext, source: dict[str, Any], volume: str, span: tuple[float, float], place: tuple[str, dict[str, Any]], disk: str
) -> None:
    node, ref = place
    args = {**source, "ref": ref, "logical_id": disk, "volume": volume}
    undo = Undo("image.unimport", {"volume": volume}, node=node, dies=True)
    await job.call(f"fill/{volume}", node, "export.read", args, undo=undo, deadline=LONG, span=span)


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    def accept(answer: dict[str, Any]) -> None:
        if len(answer["disks"]) > _DISKS:
            raise InvalidInput(f"{request['path']} has {len(answer['disks'])} disks; an instance has {_DISKS} at most")

    found = await job.look("look at the export", request["node"], "export.look", {"path": request["path"]}, accept=accept)
    decided = await job.read("plan", lambda: _plan(job.state, request, found))

    def filler(index: int, volume: str, span: tuple[float, float]) -> Any:
        return partial(_fill, job, {"path": request["path"], "id": decided["id"], "index": index}, volume, span)

    return await make_instance(job, decided["wanted"], decided["plan"], filler)


register(Operation("instance.import", InstanceImport, _prepare, _run))
