"""Operations on an instance's disks: grow, add, attach, detach, remove, activate, recreate."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import InUse, NodeUnavailable, NotSupported, PoolNotReachable, WrongState
from atoll.model.messages import GuestDisk
from atoll.model.objects import Disk, Group, Instance, Node, Pool, Volume, VolumeState
from atoll.model.units import format_size
from atoll.operations.common import check_new_name, check_pool_open, check_size_for, find_disk, frozen, locks, name_lock, needs_of
from atoll.operations.importing import DAY
from atoll.operations.instance_add import disk_pool
from atoll.operations.instance_power import instance_locks
from atoll.operations.making import delete_image, make_volume, mark_deleting, plan_volume
from atoll.operations.parameters import access_of
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import ActivateDisks, AddDisk, AttachDisk, DetachDisk, GrowDisk
from atoll.operations.running import (
    activate_on,
    attached,
    check_connections,
    check_runs,
    connecting,
    detached,
    free_claim,
    note_writers,
    revoke_rights,
    undo_rights,
)
from atoll.operations.state import State
from atoll.operations.volumes import grow_image, new_size
from atoll.storage.contract import Mirroring


def running_node(state: State, instance: Instance) -> Node | None:
    """The node it runs on, None when it is stopped. Errors: NodeUnavailable when it may run on a silent node."""
    if state.claim(instance.id).holder is None:
        return None
    return check_runs(state, instance)


# --- grow ---


def _prepare_grow(state: State, target: str, request: GrowDisk) -> Prepared:
    instance = state.store.find(Instance, target)
    index = find_disk(state, instance, request.index, None)
    volume = state.store.require(Volume, instance.disks[index].volume)
    pool = state.store.require(Pool, volume.pool)
    driver = state.driver(pool)
    if not driver.grow:
        raise NotSupported(f"driver {driver.name} cannot grow volumes")
    state.pools_health.check(pool)
    size = check_size_for(driver, new_size(volume, request.size, request.increment))
    node = running_node(state, instance)
    return Prepared(
        frozen(request, id=instance.id, volume=volume.id),
        instance_locks(state, instance, node.id if node else None),
        f"grow disk {index} of instance {instance.name} to {format_size(size)}",
    )


async def _run_grow(job: JobContext, request: dict[str, Any]) -> Any:
    def where() -> tuple[str | None, int]:
        state: State = job.state
        instance = state.store.require(Instance, request["id"])
        find_disk(state, instance, None, request["volume"])
        volume = state.store.require(Volume, request["volume"])
        driver = state.driver(state.store.require(Pool, volume.pool))
        node = running_node(state, instance)
        return node.id if node else None, check_size_for(driver, new_size(volume, request["size"], request["increment"]))

    node, size = await job.read("node and size", where)
    await grow_image(job, request["volume"], size, prefer=node)
    if node:
        args = {"instance": request["id"], "volume": request["volume"], "size": size}
        try:
            await job.call("tell the guest", node, "guest.resize", args)
        except NodeUnavailable:
            # Proved dead, and the guest with it: its next start sees the new size.
            job.progress(None, "the guest's node is dead; it sees the new size at its next start")
    return {"volume": request["volume"], "size": size}


register(Operation("instance.grow-disk", GrowDisk, _prepare_grow, _run_grow))


# --- plug ---


@undo_function("instance.drop-disk")
def _drop_disk(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Instance, args["instance"])
    volume = state.store.get(Volume, args["volume"])
    put: list[Any] = []
    if found is not None:
        put.append(found.model_copy(update={"disks": tuple(d for d in found.disks if d.volume != args["volume"])}))
    if volume is not None and volume.instance == args["instance"]:
        put.append(detached(volume))
    return Changes(put=put)


async def plug_volume(job: JobContext, instance: str, volume: str, mode: str) -> None:
    """Give the volume a slot, and plug it if the guest runs."""

    def record() -> Changes:
        state: State = job.state
        found = state.store.require(Instance, instance)
        disk = Disk(volume=volume, slot=_slot(found), mode="ro" if mode == "ro" else "rw")
        new = found.model_copy(update={"disks": (*found.disks, disk)})
        return Changes(put=[new, attached(state.store.require(Volume, volume), instance)], result=disk.slot)

    slot = await job.write("record the disk", record, Undo("instance.drop-disk", {"instance": instance, "volume": volume}))

    def where() -> str | None:
        node = running_node(job.state, job.state.store.require(Instance, instance))
        return node.id if node else None

    node = await job.read("node", where)
    if node is None:
        return
    args = await _plug_args(job, instance, node, volume, slot, mode)
    # The guest may have ended itself meanwhile; that must not keep the undo from ending.
    back = {"instance": instance, "volume": volume, "timeout": 20.0, "even_ended": True}
    undo = Undo("guest.unplug", back, node=node, dies=True)
    await job.call("plug", node, "guest.plug", args, undo=undo)
    await note_writers(job, instance, node, volume=volume)


async def _plug_args(
    job: JobContext, instance: str, node: str, volume: str, slot: int, mode: str, *, plugged: bool = False
) -> dict[str, Any]:
    """What a plug needs to know. ``plugged``: the guest itself writes it already."""
    disks = await connect_disks_of(job, instance, node, volume, expect_writer=plugged)
    size = await job.read("size", lambda: job.state.store.require(Volume, volume).size)
    guest_disk = GuestDisk(volume=volume, slot=slot, size=size, mode="ro" if mode == "ro" else "rw").model_dump(mode="json")
    return {"instance": instance, "disk": guest_disk, **disks}


def _slot(instance: Instance, slots: int = 8) -> int:
    taken = {disk.slot for disk in instance.disks}
    slot = next((n for n in range(slots) if n not in taken), None)
    if slot is None:
        raise WrongState(f"instance {instance.name} has {slots} disks already; it has no free slot", hint="atoll instance detach-disk")
    return slot


async def connect_disks_of(job: JobContext, instance: str, node: str, volume: str, *, expect_writer: bool = False) -> dict[str, Any]:
    """The connection of one volume, refused if somebody writes it. Errors: DiskInUse."""

    def plan() -> dict[str, Any]:
        state: State = job.state
        found = state.store.require(Volume, volume)
        pool = state.store.require(Pool, found.pool)
        worker = state.pool_node(pool, prefer=node, owner=found.node)
        ref = state.ref(pool, worker).model_dump(mode="json")
        disk = {"ref": ref, "volume": volume, "logical_id": found.logical_id, "size": found.size}
        # A free volume is nobody's: whoever was noted as its writer has let go of it, or is proved gone.
        disk |= connecting(state, pool, node, "" if expect_writer else "known")
        return {"worker": worker.id, "disk": disk, "access": access_of(state, pool, node)}

    found = await job.read("volume to connect", plan)
    accept = partial(check_connections, expect_writer=expect_writer)
    if not expect_writer:
        await undo_rights(job, found["worker"], [found["disk"]])
    answer = (
        await job.look("connect the volume", found["worker"], "disks.connect", {"disks": [found["disk"]]}, accept=accept, deadline=100.0)
    )[0]
    return {"pool": answer["pool"], "connection": answer["connection"], "access": found["access"]}


def _check_reach(state: State, instance: Instance, pool: Pool, owner: str | None) -> None:
    """The new disk must be reachable where the instance is."""
    if instance.group not in pool.groups:
        group = state.store.require(Group, instance.group).name
        raise PoolNotReachable(f"group {group} cannot reach pool {pool.name}", hint=f"atoll pool connect {pool.name} {group}")
    if state.driver(pool).node_local:
        needs = needs_of(state, instance)
        place = state.claim(instance.id).holder or instance.home
        if owner is not None and (owner != place or (needs.nodes is not None and owner not in needs.nodes)):
            name = state.store.require(Node, owner).name
            raise WrongState(f"the volume is on node {name}, where instance {instance.name} is not", hint="atoll instance info")


def _prepare_add_disk(state: State, target: str, request: AddDisk) -> Prepared:
    instance = state.store.find(Instance, target)
    node = running_node(state, instance)
    _slot(instance)
    pool = disk_pool(state, request.disk.model_dump(mode="json"), request.template, instance.group)
    check_pool_open(state, pool, instance.group)
    home = (node.id if node else None) or instance.home
    name = request.disk.name or _disk_name(state, instance)
    check_new_name(state, Volume, name)
    disk = request.disk.model_dump(mode="json", include={"size", "adopt", "image"})
    plan_volume(state, name=name, pool=pool, node=home, secondary=instance.secondary, **disk)
    held = instance_locks(state, instance, home)
    more = [name_lock(Volume, name), *([f"image:{pool.id}:{request.disk.adopt}"] if request.disk.adopt else [])]
    return Prepared(
        frozen(request, id=instance.id, pool=pool.id, home=home),
        locks([*held.shared, pool.resource], [*held.exclusive, *more]),
        f"add a disk to instance {instance.name}",
        deadline=DAY if request.disk.image else None,
    )


def _disk_name(state: State, instance: Instance) -> str:
    number = len(instance.disks)
    while state.store.by_name(Volume, f"{instance.name}-disk{number}") is not None:
        number += 1
    return f"{instance.name}-disk{number}"


async def _run_add_disk(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        pool = state.store.require(Pool, request["pool"])
        driver = state.driver(pool)
        instance = state.store.require(Instance, request["id"])
        return plan_volume(
            state,
            name=request["disk"]["name"] or _disk_name(state, instance),
            pool=pool,
            size=request["disk"]["size"],
            adopt=request["disk"]["adopt"],
            image=request["disk"]["image"],
            node=request["home"] if driver.node_local else None,
            secondary=instance.secondary if driver.mirroring is Mirroring.INTERNAL else None,
            options=request["disk"]["options"],
        )

    made = await make_volume(job, await job.read("plan", plan), instance=request["id"])
    await plug_volume(job, request["id"], made["volume"], request["disk"]["mode"])
    return {"instance": request["id"], **made}


register(Operation("instance.add-disk", AddDisk, _prepare_add_disk, _run_add_disk))


def _prepare_attach(state: State, target: str, request: AttachDisk) -> Prepared:
    instance = state.store.find(Instance, target)
    volume = state.store.find(Volume, request.volume)
    node = running_node(state, instance)
    _slot(instance)
    if volume.instance:
        owner = state.store.require(Instance, volume.instance)
        raise InUse(f"volume {volume.name} is a disk of instance {owner.name}", hint=f"atoll instance detach-disk {owner.name}")
    if volume.state is not VolumeState.AVAILABLE:
        raise WrongState(f"volume {volume.name} is {volume.state}", hint=f"atoll volume info {volume.name}")
    pool = state.store.require(Pool, volume.pool)
    _check_reach(state, instance, pool, volume.node)
    held = instance_locks(state, instance, node.id if node else None)
    return Prepared(
        frozen(request, id=instance.id, volume=volume.id),
        locks([*held.shared, pool.resource], [*held.exclusive, volume.resource]),
        f"attach volume {volume.name} to instance {instance.name}",
    )


async def _run_attach(job: JobContext, request: dict[str, Any]) -> Any:
    await plug_volume(job, request["id"], request["volume"], request["mode"])
    return {"instance": request["id"], "volume": request["volume"]}


register(Operation("instance.attach-disk", AttachDisk, _prepare_attach, _run_attach))


# --- unplug ---


def _prepare_detach(words: str) -> Any:
    def prepare(state: State, target: str, request: DetachDisk) -> Prepared:
        instance = state.store.find(Instance, target)
        index = find_disk(state, instance, request.index, request.volume)
        node = running_node(state, instance)
        if node is not None and index == 0:
            raise InUse(f"disk 0 of instance {instance.name} is in use while it runs", hint=f"atoll instance stop {instance.name}")
        volume = state.store.require(Volume, instance.disks[index].volume)
        return Prepared(
            {"id": instance.id, "volume": volume.id, "timeout": request.timeout},
            instance_locks(state, instance, node.id if node else None),
            f"{words} disk {index} ({volume.name}) of instance {instance.name}",
        )

    return prepare


async def _unplug(job: JobContext, request: dict[str, Any]) -> None:
    def where() -> str | None:
        node = running_node(job.state, job.state.store.require(Instance, request["id"]))
        return node.id if node else None

    node = await job.read("node", where)
    if node:
        # A guest may let go of it late, after the job has given up: then it gets the disk back.
        slot, mode = await job.read("slot", lambda: _place_of(job.state.store.require(Instance, request["id"]), request["volume"]))
        back = await _plug_args(job, request["id"], node, request["volume"], slot, mode, plugged=True)
        args = {"instance": request["id"], "volume": request["volume"], "timeout": request["timeout"]}
        undo = Undo("guest.plug", {**back, "even_ended": True}, node=node, dies=True)
        await job.call("unplug", node, "guest.unplug", args, undo=undo, deadline=request["timeout"] + 30.0)
    await job.commit()
    if node:
        await revoke_rights(job, request["id"], node, volume=request["volume"])
    await job.write("drop the disk", lambda: _drop_disk(job.state, {"instance": request["id"], "volume": request["volume"]}))


def _place_of(instance: Instance, volume: str) -> tuple[int, str]:
    disk = next(disk for disk in instance.disks if disk.volume == volume)
    return disk.slot, disk.mode


async def _run_detach(job: JobContext, request: dict[str, Any]) -> Any:
    await _unplug(job, request)
    return {"instance": request["id"], "volume": request["volume"]}


async def _run_remove_disk(job: JobContext, request: dict[str, Any]) -> Any:
    await _unplug(job, request)
    await mark_deleting(job, request["volume"], VolumeState.AVAILABLE)
    lost = await delete_image(job, request["volume"])
    return {"instance": request["id"], "volume": request["volume"], **({"lost": lost} if lost else {})}


register(Operation("instance.detach-disk", DetachDisk, _prepare_detach("detach"), _run_detach))
register(Operation("instance.remove-disk", DetachDisk, _prepare_detach("remove"), _run_remove_disk))


# --- disks on demand ---


def _prepare_activate(words: str) -> Any:
    def prepare(state: State, target: str, request: ActivateDisks) -> Prepared:
        instance = state.store.find(Instance, target)
        claim = state.claim(instance.id)
        if claim.holder is not None and instance.desired == "running":
            raise InUse(f"instance {instance.name} runs; its disks are in use", hint=f"atoll instance stop {instance.name}")
        node = state.store.find(Node, request.node or claim.holder or instance.home or "")
        return Prepared(
            {"id": instance.id, "node": node.id}, instance_locks(state, instance, node.id), f"{words} the disks of {instance.name}"
        )

    return prepare


async def _run_activate(job: JobContext, request: dict[str, Any]) -> Any:
    """The claim goes to the node: nothing may start elsewhere while an administrator works on the disks."""
    instance, node = request["id"], request["node"]
    _, paths = await activate_on(job, instance, node)
    name = await job.read("node name", lambda: job.state.store.require(Node, node).name)
    return {"instance": instance, "node": name, "paths": paths}


async def _run_deactivate(job: JobContext, request: dict[str, Any]) -> Any:
    instance, node = request["id"], request["node"]
    await job.call("deactivate", node, "disks.deactivate", {"owner": instance})
    await job.commit()
    generation = await job.read("generation", lambda: job.state.claim(instance).generation)
    await job.call("release claim", node, "claim.release", {"instance": instance, "generation": generation})
    # Only if it is this node's: another may hold it.
    await free_claim(job, instance, node, generation)
    await revoke_rights(job, instance, node, suffix=" after deactivation")
    return {"instance": instance}


register(Operation("instance.activate-disks", ActivateDisks, _prepare_activate("activate"), _run_activate))
register(Operation("instance.deactivate-disks", ActivateDisks, _prepare_activate("deactivate"), _run_deactivate))
