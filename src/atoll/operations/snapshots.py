"""Operations on snapshots: create, delete, tags."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Settled, Undo, undo_function
from atoll.model.errors import DiskInUse, NotSupported, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Instance, Pool, Snapshot, SnapshotState, Volume, VolumeState
from atoll.operations.common import check_new_name, frozen, locks, name_lock, prepare_tags, run_tags
from atoll.operations.making import PATIENT, look_at_pool, look_at_shared, on_shared
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Nothing, SnapshotCreate, TagsChange
from atoll.operations.state import State


def _source(state: State, target: str) -> Volume:
    """The volume, if snapshots can be made of it now. Errors: NotFound, NotSupported, WrongState."""
    volume = state.store.find(Volume, target)
    driver = state.driver(state.store.require(Pool, volume.pool))
    if not driver.snapshots:
        raise NotSupported(
            f"driver {driver.name} of volume {volume.name} makes no snapshots",
            hint="stop its instance and export it: atoll instance export; drivers that can: docs/reference/drivers.md",
        )
    if volume.state not in (VolumeState.AVAILABLE, VolumeState.IN_USE):
        raise WrongState(f"volume {volume.name} is {volume.state}", hint="atoll job list")
    return volume


def _prepare_create(state: State, target: str, request: SnapshotCreate) -> Prepared:
    volume = _source(state, request.volume)
    if request.name:
        check_new_name(state, Snapshot, request.name)
    ident = target or new_id("snap", state.rng)
    # The volume is not changed, but neither is it grown, renamed or deleted meanwhile, nor does its guest move.
    shared = [f"pool:{volume.pool}", *([f"instance:{volume.instance}"] if volume.instance else [])]
    held = [volume.resource, f"snapshot:{ident}", *([name_lock(Snapshot, request.name)] if request.name else [])]
    return Prepared(
        frozen(request, id=ident, volume=volume.id, instance=volume.instance),
        locks(shared, held),
        f"create snapshot {request.name or ''} of volume {volume.name}".replace("  ", " "),
    )


@undo_function("snapshot.forget")
def _forget(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Snapshot, args["snapshot"])
    return Changes(delete=[found] if found else [])


async def _run_create(job: JobContext, request: dict[str, Any]) -> Any:
    ident = request["id"]

    def where() -> dict[str, Any]:
        state: State = job.state
        volume = _source(state, request["volume"])
        if volume.instance != request["instance"]:
            owner = state.store.get(Instance, volume.instance or "")
            words = f"belongs to instance {owner.name} now" if owner else "belongs to no instance any more"
            raise WrongState(f"volume {volume.name} {words}", hint=f"try again: atoll snapshot create {volume.name}")
        pool = state.store.require(Pool, volume.pool)
        worker = state.pool_node(pool, owner=volume.node)
        return {
            "node": worker.id,
            "ref": state.ref(pool, worker).model_dump(mode="json"),
            "logical_id": volume.logical_id,
            "name": request["name"] or ident,
        }

    found = await job.read("where", where)
    ref, logical_id = found["ref"], found["logical_id"]
    await look_at_pool(job, request["volume"], [(found["node"], ref)])

    def record() -> Changes:
        state: State = job.state
        if found["name"] != ident:
            check_new_name(state, Snapshot, found["name"])
        volume = state.store.require(Volume, request["volume"])
        new = Snapshot(
            id=ident,
            name=found["name"],
            pool=volume.pool,
            size=volume.size,
            volume=volume.id,
            volume_name=volume.name,
            created=state.clock.now(),
            tags=tuple(request["tags"]),
        )
        return Changes(put=[new])

    await job.write("record snapshot", record, Undo("snapshot.forget", {"snapshot": ident}))
    stat = await job.call(
        "make snapshot",
        found["node"],
        "snapshot.create",
        {"ref": ref, "logical_id": logical_id, "snapshot": ident},
        undo=Undo("snapshot.delete", {"ref": ref, "snapshot": ident, "source": logical_id}, node=found["node"], deadline=PATIENT),
        deadline=PATIENT,
    )

    def completed() -> Changes:
        made = job.state.store.require(Snapshot, ident)
        update = {"state": SnapshotState.COMPLETED, "logical_id": stat["logical_id"], "size": stat["size"]}
        return Changes(put=[made.model_copy(update=update)])

    await job.write("completed", completed)
    return {"snapshot": ident, "name": found["name"], "size": stat["size"]}


register(Operation("snapshot.create", SnapshotCreate, _prepare_create, _run_create))


def _prepare_delete(state: State, target: str, request: Nothing) -> Prepared:
    snapshot = state.store.find(Snapshot, target)
    if snapshot.state is SnapshotState.PENDING:
        raise WrongState(f"snapshot {snapshot.name} is being made", hint="atoll job list")
    return Prepared({"id": snapshot.id}, locks([f"pool:{snapshot.pool}"], [snapshot.resource]), f"delete snapshot {snapshot.name}")


@undo_function("snapshot.state")
def _restore_state(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Snapshot, args["snapshot"])
    return Changes(put=[found.model_copy(update={"state": SnapshotState(args["state"])})] if found else [])


async def _run_delete(job: JobContext, request: dict[str, Any]) -> Any:
    """Marked at once; what volumes still read of it stays on the storage until they are gone, which is the driver's to see to."""
    ident = request["id"]

    def present() -> dict[str, Any]:
        found = job.state.store.find(Snapshot, ident)
        return {"state": str(found.state), "logical_id": found.logical_id, "pool": found.pool}

    found = await job.read("state", present)

    if not job.committed:
        await look_at_shared(job, ident, found["pool"])

    def become(state: SnapshotState) -> Changes:
        kept = job.state.store.require(Snapshot, ident)
        return Changes(put=[kept.model_copy(update={"state": state})])

    await job.write(
        "mark deleting", lambda: become(SnapshotState.DELETING), Undo("snapshot.state", {"snapshot": ident, "state": found["state"]})
    )
    await job.commit()

    def pool() -> Pool:
        home: Pool = job.state.store.require(Pool, found["pool"])
        return home

    args = {"snapshot": ident, "logical_id": found["logical_id"]}
    try:
        await on_shared(job, "delete snapshot", pool, "snapshot.delete", args, prefer=None, deadline=PATIENT)
    except DiskInUse as refusal:
        # It is protected by hand: the driver has changed nothing.
        await job.write("refused: as it was", lambda: become(SnapshotState(found["state"])))
        raise Settled(refusal) from refusal
    await job.write("forget", lambda: Changes(delete=[job.state.store.require(Snapshot, ident)]))
    return {"snapshot": ident}


register(Operation("snapshot.delete", Nothing, _prepare_delete, _run_delete))
register(Operation("snapshot.tags", TagsChange, prepare_tags(Snapshot), run_tags(Snapshot)))
