"""Operations: add and remove an instance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import InvalidInput, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Boot, Claim, Disk, Group, Instance, MachinePin, Nic, Node, Pool, Volume, VolumeState
from atoll.model.units import format_size
from atoll.operations import seed
from atoll.operations.common import PlacementView, check_new_name, check_pool_open, frozen, locks, name_lock
from atoll.operations.importing import DAY
from atoll.operations.installing import check_definition, run_script
from atoll.operations.making import Filler, delete_image, make_volume, mark_deleting, plan_volume
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceAdd, InstanceRemove
from atoll.operations.running import detached, start_on, stop_on
from atoll.operations.state import State
from atoll.placement.choose import choose
from atoll.placement.rules import Needs
from atoll.storage.contract import Mirroring


def _groups(state: State, request: dict[str, Any]) -> str | None:
    if request["group"]:
        return state.store.find(Group, request["group"]).id
    if request["node"]:
        return state.store.find(Node, request["node"]).group
    groups = state.store.all(Group)
    return groups[0].id if len(groups) == 1 else None


def disk_pool(state: State, disk: dict[str, Any], template: str | None, group: str | None) -> Pool:
    """The pool of a new disk: its own, else the instance's template, else the only pool there is."""
    text = disk["pool"] or template
    if text is None:
        pools = [p for p in state.store.all(Pool) if not p.observed and (group is None or group in p.groups)]
        if len(pools) != 1:
            names = ", ".join(p.name for p in pools) or "none"
            raise InvalidInput(f"say where the disk shall be; pools here: {names}", hint="-t POOL, or --disk N:pool=POOL")
        return pools[0]
    return state.resolve_pool(text, group)


def installs(request: dict[str, Any]) -> bool:
    """Whether the scripts of an OS definition shall install it."""
    return bool(request["os"]) and not request["no_install"]


def plan_add(state: State, request: dict[str, Any]) -> dict[str, Any]:
    """Everything that is decided once: ids, node, pools, addresses. Errors tell the user what does not fit."""
    group = _groups(state, request)
    pools = [disk_pool(state, disk, request["template"], group) for disk in request["disks"]]
    for pool in pools:
        check_pool_open(state, pool, group)
    wanted = state.store.find(Node, request["node"]) if request["node"] else None
    needs = Needs(memory=request["memory"] if request["start"] else 0, pools=tuple(pools), group=group)
    node = choose(PlacementView(state), needs, wanted)
    secondary = _secondary(state, request, pools, node)
    volumes = []
    for index, (disk, pool) in enumerate(zip(request["disks"], pools, strict=True)):
        name = disk["name"] or f"{request['name']}-disk{index}"
        check_new_name(state, Volume, name)
        local = state.driver(pool).node_local
        internal = state.driver(pool).mirroring is Mirroring.INTERNAL
        volumes.append(
            plan_volume(
                state,
                name=name,
                pool=pool,
                size=disk["size"],
                adopt=disk["adopt"],
                image=disk["image"],
                node=node.id if local else None,
                secondary=secondary if internal else None,
                options=disk["options"],
            )
        )
        volumes[-1]["mode"] = disk["mode"]
    if request["cloud_init"]:
        volumes.append(_plan_seed(state, request, pools, node, secondary, group))
    return {
        # A job that an older version has submitted has no id yet.
        "instance": request.get("id") or new_id("i", state.rng),
        "node": node.id,
        "group": node.group,
        "secondary": secondary,
        "volumes": volumes,
        "nics": plan_nics(state, request["nics"]),
        "pin": state.store.require(Group, node.group).pin.model_dump(mode="json"),
        "hypervisor": state.cluster.hypervisor,
    }


def _plan_seed(
    state: State, request: dict[str, Any], pools: list[Pool], node: Node, secondary: str | None, group: str | None
) -> dict[str, Any]:
    """The seed's volume is where the first disk is."""
    name = seed.name_of(request["name"])
    check_new_name(state, Volume, name)
    pool = pools[0] if pools else disk_pool(state, {"pool": None}, request["template"], group)
    local, internal = state.driver(pool).node_local, state.driver(pool).mirroring is Mirroring.INTERNAL
    owner = node.id if local else None
    plan = plan_volume(state, name=name, pool=pool, size=seed.SIZE, adopt=None, node=owner, secondary=secondary if internal else None)
    return {**plan, "mode": "ro", "seed": True}


def plan_nics(state: State, nics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Network cards with their MAC addresses: the given ones, else random with QEMU's own prefix."""
    planned = []
    for nic in nics:
        if nic["mode"] == "bridged" and not nic["link"]:
            raise InvalidInput("a bridged network card needs a bridge", hint="--net 0:mode=bridged,link=br0")
        tail = ":".join(f"{state.rng.getrandbits(8):02x}" for _ in range(3))
        planned.append({"mac": nic["mac"] or f"52:54:00:{tail}", "mode": nic["mode"], "link": nic["link"]})
    return planned


def _secondary(state: State, request: dict[str, Any], pools: list[Pool], node: Node) -> str | None:
    """The node of the second copies: asked for only where Atoll itself mirrors."""
    internal = any(state.driver(pool).mirroring is Mirroring.INTERNAL for pool in pools)
    if request["secondary"] and not internal:
        raise InvalidInput("no disk of it is mirrored by Atoll, so there is no secondary node", hint="leave it away")
    if not internal:
        return None
    needs = Needs(memory=0, pools=tuple(pools), group=node.group, exclude=frozenset({node.id}))
    wanted = state.store.find(Node, request["secondary"]) if request["secondary"] else None
    return choose(PlacementView(state), needs, wanted).id


def _prepare_add(state: State, target: str, request: InstanceAdd) -> Prepared:
    kept = seed.sealed(state, request.cloud_init, request.name)
    data = {**request.model_dump(mode="json"), "cloud_init": kept}
    check_new_name(state, Instance, request.name)
    plan = plan_add(state, data)  # for its errors only; it is made again when the locks are granted
    # It has its id from the beginning, and is locked by it: nobody changes or removes an instance that is still being made.
    ident = target or plan["instance"]
    held = [f"instance:{ident}", name_lock(Instance, request.name)]
    held += [name_lock(Volume, v["name"]) for v in plan["volumes"]]
    held += [f"image:{v['pool']}:{v['adopt']}" for v in plan["volumes"] if v["adopt"]]
    shared = [f"pool:{v['pool']}" for v in plan["volumes"]] + [f"group:{plan['group']}", f"node:{plan['node']}"]
    shared += [f"node:{v['image']['node']}" for v in plan["volumes"] if v["image"]]
    deadline = DAY if installs(data) or any(v["image"] for v in plan["volumes"]) else None
    sizes = ", ".join(format_size(v["size"]) if v["size"] else "from an image" for v in plan["volumes"]) or "no disks"
    summary = f"add instance {request.name} ({sizes})"
    return Prepared(frozen(request, id=ident, node=plan["node"], cloud_init=kept), locks(shared, held), summary, deadline=deadline)


@undo_function("instance.forget")
def _forget(state: State, args: dict[str, Any]) -> Changes:
    found = [state.store.get(Instance, args["instance"]), state.store.get(Claim, args["instance"])]
    return Changes(delete=[item for item in found if item is not None])


async def _run_add(job: JobContext, request: dict[str, Any]) -> Any:
    plan = await job.read("plan", lambda: plan_add(job.state, request))
    return await make_instance(job, request, plan)


async def make_instance(
    job: JobContext, request: dict[str, Any], plan: dict[str, Any], fill: Callable[[int, str, tuple[float, float]], Filler] | None = None
) -> dict[str, Any]:
    """Make what was planned, and start it if it is asked for. ``fill`` gives what writes into the new disk with an index and a volume
    (see ``make_volume``), with its part of the job's percent."""
    instance = plan["instance"]
    if installs(request):
        await check_definition(job, instance, plan["node"], request["os"], request["os_parameters"])

    def record() -> Changes:
        check_new_name(job.state, Instance, request["name"])
        new = Instance(
            id=instance,
            name=request["name"],
            group=plan["group"],
            memory=request["memory"],
            vcpus=request["vcpus"],
            hypervisor=plan["hypervisor"],
            nics=tuple(Nic(**nic) for nic in plan["nics"]),
            boot=Boot(kernel=request["kernel"], initrd=request["initrd"], append=request["append"]),
            pin=MachinePin(**plan["pin"]),
            os=request["os"],
            os_parameters=request["os_parameters"],
            os_scripts=installs(request) or request.get("os_scripts", False),
            secondary=plan["secondary"],
            home=plan["node"],
            created=job.state.clock.now(),
            tags=tuple(request["tags"]),
        )
        return Changes(put=[new])

    job.progress(2, f"recording instance {request['name']}")
    await job.write("record instance", record, Undo("instance.forget", {"instance": instance}))
    for index, volume in enumerate(plan["volumes"]):
        low, high = (5 + 50 * n / len(plan["volumes"]) for n in (index, index + 1))
        job.progress(low, f"making disk {index}")
        filler: Filler | None = partial(seed.write, job, request, instance, volume["volume"]) if volume.get("seed") else None
        if fill is not None:
            filler = fill(index, volume["volume"], (low, high))
        await make_volume(job, volume, instance=instance, span=(low, high), filler=filler)
    disks = tuple(Disk(volume=v["volume"], slot=i, mode=v["mode"]) for i, v in enumerate(plan["volumes"]))

    def complete() -> Changes:
        return Changes(put=[job.state.store.require(Instance, instance).model_copy(update={"disks": disks})])

    await job.write("record disks", complete)
    if installs(request):
        await run_script(job, instance, plan["node"], "create", request["os_timeout"], span=(55.0, 90.0))
    if request["start"]:
        job.progress(90 if installs(request) else 60, "starting the guest")
        await start_on(job, instance, plan["node"])
    node = await job.read("node name", lambda: job.state.store.require(Node, plan["node"]).name)
    return {"instance": instance, "name": request["name"], "node": node, "volumes": [v["volume"] for v in plan["volumes"]]}


register(Operation("instance.add", InstanceAdd, _prepare_add, _run_add))


def _prepare_remove(state: State, target: str, request: InstanceRemove) -> Prepared:
    instance = state.store.find(Instance, target)
    claim = state.claim(instance.id)
    if claim.holder is not None and not state.health.alive(claim.holder) and not state.proved_dead(claim.holder):
        name = state.store.require(Node, claim.holder).name
        raise WrongState(f"instance {instance.name} may run on node {name}, which does not answer", hint="atoll node list")
    volumes = [v for _, v in state.volumes_of(instance)]
    held = [instance.resource, *(v.resource for v in volumes)]
    return Prepared(frozen(request, id=instance.id), locks([f"pool:{v.pool}" for v in volumes], held), f"remove instance {instance.name}")


async def _run_remove(job: JobContext, request: dict[str, Any]) -> Any:
    instance = request["id"]

    def plan() -> dict[str, Any]:
        state: State = job.state
        found = state.store.require(Instance, instance)
        holder = state.claim(instance).holder
        dead = holder is not None and state.proved_dead(holder)
        volumes = [v.id for _, v in state.volumes_of(found)]
        return {"holder": None if dead else holder, "volumes": volumes, "name": found.name}

    decided = await job.read("plan", plan)
    if decided["holder"]:
        job.progress(10, "stopping the guest")
        await stop_on(job, instance, decided["holder"], request["timeout"])
    if not request["keep_disks"]:
        for volume in decided["volumes"]:
            await mark_deleting(job, volume, VolumeState.IN_USE)
    await job.commit()
    lost: list[str] = []
    if not request["keep_disks"]:
        for index, volume in enumerate(decided["volumes"]):
            job.progress(40 + 50 * index / len(decided["volumes"]), f"deleting disk {index}")
            lost += await delete_image(job, volume)

    def forget() -> Changes:
        state: State = job.state
        gone = [state.store.get(Instance, instance), state.store.get(Claim, instance)]
        kept = [detached(state.store.require(Volume, v)) for v in decided["volumes"]] if request["keep_disks"] else []
        return Changes(put=[*kept], delete=[item for item in gone if item is not None])

    await job.write("forget instance", forget)
    return {"instance": instance, "name": decided["name"], **({"lost": lost} if lost else {})}


register(Operation("instance.remove", InstanceRemove, _prepare_remove, _run_remove))
