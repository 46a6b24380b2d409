"""Operations on volumes: create, delete, grow, rename, tags."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Settled, Undo, undo_function
from atoll.model.errors import (
    UNKNOWN_OUTCOME,
    AtollError,
    Conflict,
    DiskInUse,
    InUse,
    InvalidInput,
    InvalidSize,
    NodeUnavailable,
    NotFound,
    NotSupported,
    PoolFull,
    PoolUnavailable,
    ShrinkRefused,
    WrongState,
)
from atoll.model.objects import Instance, Node, Pool, Snapshot, Volume, VolumeState
from atoll.model.units import format_size
from atoll.operations.common import (
    check_new_name,
    check_pool_open,
    check_size_for,
    check_usable,
    frozen,
    locks,
    name_lock,
    prepare_tags,
    run_tags,
)
from atoll.operations.importing import DAY
from atoll.operations.making import (
    delete_image,
    look_at_pool,
    look_at_shared,
    make_volume,
    mark_deleting,
    on_own_disk,
    on_pool,
    own_refs,
    plan_volume,
)
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Nothing, Rename, TagsChange, VolumeCreate, VolumeGrow
from atoll.operations.state import State


def _prepare_create(state: State, target: str, request: VolumeCreate) -> Prepared:
    node = state.store.find(Node, request.node) if request.node else None
    snapshot = state.store.find(Snapshot, request.snapshot) if request.snapshot else None
    if request.pool is None and snapshot is None:
        raise InvalidInput("a new volume needs a pool", hint="--pool POOL")
    pool = state.resolve_pool(request.pool or (snapshot.pool if snapshot else ""), node.group if node else None)
    check_pool_open(state, pool, node.group if node else None)
    driver = state.driver(pool)
    if node is not None:
        check_usable(state, node)
    elif driver.node_local:
        raise InvalidInput(f"pool {pool.name} is node-local: say on which node", hint="-n NODE")
    if request.name:
        check_new_name(state, Volume, request.name)
    image = request.image.model_dump(mode="json") if request.image else None
    owner = node.id if node else None
    # For its errors, and for the id: nobody changes a volume that is still being made. The rest is planned again when the job runs.
    plan = plan_volume(
        state,
        name=request.name or "check",
        pool=pool,
        size=request.size,
        adopt=request.adopt,
        image=image,
        snapshot=snapshot.id if snapshot else None,
        node=owner,
    )
    ident = target or plan["volume"]
    held = [f"volume:{ident}", *([name_lock(Volume, request.name)] if request.name else [])]
    if request.adopt:
        held.append(f"image:{pool.id}:{request.adopt}")
    source = f"image {request.image.path if request.image else request.adopt}" if request.image or request.adopt else ""
    source = f"snapshot {snapshot.name}" if snapshot else source
    size = " ".join([*([format_size(request.size)] if request.size else []), *([f"from {source}"] if source else [])])
    used = {pool.resource, *([node.resource] if node else []), *([f"node:{plan['image']['node']}"] if plan["image"] else [])}
    used |= {snapshot.resource} if snapshot else set()
    return Prepared(
        frozen(request, id=ident, pool=pool.id, node=node.id if node else None, snapshot=snapshot.id if snapshot else None),
        locks(shared=used, exclusive=held),
        f"create volume {request.name or ''} ({size}) in pool {pool.name}".replace("  ", " "),
        deadline=DAY if request.image else None,
    )


async def _run_create(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        pool = state.store.require(Pool, request["pool"])
        check_pool_open(state, pool)
        made = plan_volume(
            state,
            name=request["name"] or "",
            pool=pool,
            size=request["size"],
            adopt=request["adopt"],
            image=request["image"],
            snapshot=request.get("snapshot"),
            node=request["node"],
            options=request["options"],
            tags=request["tags"],
            ident=request.get("id"),
        )
        return {**made, "name": made["name"] or made["volume"]}

    return await make_volume(job, await job.read("plan", plan), span=(5.0, 95.0))


register(Operation("volume.create", VolumeCreate, _prepare_create, _run_create))


def _free_volume(state: State, target: str) -> Volume:
    volume = state.store.find(Volume, target)
    if volume.instance:
        owner = state.store.get(Instance, volume.instance)
        name = owner.name if owner else volume.instance
        raise InUse(f"volume {volume.name} is a disk of instance {name}", hint=f"atoll instance detach-disk {name} {volume.name}")
    return volume


def _prepare_delete(state: State, target: str, request: Nothing) -> Prepared:
    volume = _free_volume(state, target)
    pool = state.store.require(Pool, volume.pool)
    if volume.state is VolumeState.CREATING:
        raise WrongState(f"volume {volume.name} is being created", hint="atoll job list")
    return Prepared({"id": volume.id}, locks([pool.resource], [volume.resource]), f"delete volume {volume.name}")


async def _run_delete(job: JobContext, request: dict[str, Any]) -> Any:
    ident = request["id"]
    before = await job.read("state", lambda: str(_free_volume(job.state, ident).state))
    has_image = await job.read("pool", lambda: _image_on(job.state, ident))
    if has_image and not job.committed:
        await look_at_shared(job, ident, has_image)
    await mark_deleting(job, ident, VolumeState(before))
    await job.commit()
    try:
        lost = await delete_image(job, ident)
    except (DiskInUse, Conflict) as refusal:
        # Drivers refuse so before they change anything. Of several copies, another one may be gone.
        if not has_image or _node_local(job.state, ident):
            raise

        def back() -> Changes:
            kept = job.state.store.require(Volume, ident)
            return Changes(put=[kept.model_copy(update={"state": VolumeState(before)})])

        await job.write("refused: as it was", back)
        raise Settled(refusal) from refusal
    return {"volume": ident, **({"lost": lost} if lost else {})}


def _image_on(state: State, volume: str) -> str:
    """The pool of its image; empty when none was ever made."""
    found = state.store.require(Volume, volume)
    return found.pool if found.logical_id else ""


def _node_local(state: State, volume: str) -> bool:
    return state.driver(state.store.require(Pool, state.store.require(Volume, volume).pool)).node_local


register(Operation("volume.delete", Nothing, _prepare_delete, _run_delete))


def new_size(volume: Volume, size: int | None, increment: int | None) -> int:
    """The size that a grow asks for. Errors: InvalidInput, ShrinkRefused."""
    if (size is None) == (increment is None):
        raise InvalidInput("give the new size or the increment, one of both", hint="--size 20G, or --increment 10G")
    wanted = size if size is not None else volume.size + (increment or 0)
    if wanted < volume.size:
        raise ShrinkRefused(f"volume {volume.name} has {format_size(volume.size)}; it cannot shrink to {format_size(wanted)}")
    return wanted


def _prepare_grow(state: State, target: str, request: VolumeGrow) -> Prepared:
    volume = _free_volume(state, target)
    pool = state.store.require(Pool, volume.pool)
    driver = state.driver(pool)
    if not driver.grow:
        raise NotSupported(f"driver {driver.name} cannot grow volumes")
    state.pools_health.check(pool)
    size = check_size_for(driver, new_size(volume, request.size, request.increment))
    return Prepared(
        frozen(request, id=volume.id), locks([pool.resource], [volume.resource]), f"grow volume {volume.name} to {format_size(size)}"
    )


async def grow_image(job: JobContext, volume: str, size: int, prefer: str | None = None) -> None:
    """Grow the image and the record. Past its commit it only goes forward, for what has grown is not shrunk again; but when the storage
    refuses and nothing has grown, the job ends undone. Errors: Settled."""

    def where() -> dict[str, Any]:
        state: State = job.state
        found = state.store.require(Volume, volume)
        refs = own_refs(state, found)
        look = refs or [_any_ref(state, state.store.require(Pool, found.pool), prefer)]
        return {"refs": refs, "look": look, "logical_id": found.logical_id}

    found = await job.read("where", where)
    await look_at_pool(job, volume, found.get("look", []))  # an older version's journal has none
    await job.commit()
    key, args = f"grow image/{volume}", {"logical_id": found["logical_id"], "size": size}
    grown = 0
    try:
        for number, (node, ref) in enumerate(found["refs"]):
            step = key + (f" copy {number + 1}" if number else "")
            there, answer = await on_own_disk(job, step, node, "volume.grow", {"ref": ref, **args}, deadline=3600.0)
            grown = answer if there else grown
        if found["refs"] and not grown:
            raise Settled(_lost(job.state, volume, " and ".join(ref["node"] for _, ref in found["refs"])))
        if not found["refs"]:
            grown = await on_pool(job, key, volume, "volume.grow", args, prefer=prefer, deadline=600.0)
    except (PoolFull, PoolUnavailable, ShrinkRefused, NotFound, NotSupported, InvalidSize) as refusal:
        if grown or await _has_grown(job, volume, found, size):
            raise
        raise Settled(refusal) from refusal

    def record() -> Changes:
        kept = job.state.store.require(Volume, volume)
        return Changes(put=[kept.model_copy(update={"size": max(grown, kept.size), "generation": kept.generation + 1})])

    await job.write("record size", record)


def _lost(state: State, volume: str, where: str) -> NodeUnavailable:
    found = state.store.require(Volume, volume)
    owner = state.store.get(Instance, found.instance or "")
    drop = f"atoll instance remove {owner.name}" if owner else f"atoll volume delete {found.name}"
    return NodeUnavailable(f"volume {found.name} was not grown: it was on {where}, whose disks are lost", hint=f"to drop it: {drop}")


async def _has_grown(job: JobContext, volume: str, found: dict[str, Any], size: int) -> bool:
    """Whether the storage shows the new size although it refused. Errors: when it cannot be looked at, for then nobody knows."""
    state: State = job.state
    pool = state.store.require(Pool, state.store.require(Volume, volume).pool)
    try:
        node, ref = found["refs"][0] if found["refs"] else _any_ref(state, pool)
        stat = await job.ask(node, "volume.stat", {"ref": ref, "logical_id": found["logical_id"]})
    except (PoolUnavailable, *UNKNOWN_OUTCOME):
        raise
    except AtollError:
        return False
    return stat is not None and stat["size"] >= size


def _any_ref(state: State, pool: Pool, prefer: str | None = None) -> tuple[str, dict[str, Any]]:
    node = state.pool_node(pool, prefer=prefer)
    return node.id, state.ref(pool, node).model_dump(mode="json")


async def _run_grow(job: JobContext, request: dict[str, Any]) -> Any:
    def decide() -> int:
        state: State = job.state
        volume = _free_volume(state, request["id"])
        driver = state.driver(state.store.require(Pool, volume.pool))
        return check_size_for(driver, new_size(volume, request["size"], request["increment"]))

    size = await job.read("new size", decide)
    await grow_image(job, request["id"], size)
    return {"volume": request["id"], "size": size}


register(Operation("volume.grow", VolumeGrow, _prepare_grow, _run_grow))


def _flattenable(state: State, target: str) -> Volume:
    """The volume, if it can be told to stand by itself. Errors: NotFound, NotSupported, WrongState."""
    volume = state.store.find(Volume, target)
    driver = state.driver(state.store.require(Pool, volume.pool))
    if not driver.clones:
        raise NotSupported(
            f"volumes of driver {driver.name} read from nothing but themselves: there is nothing to flatten", hint="atoll volume list"
        )
    if volume.state not in (VolumeState.AVAILABLE, VolumeState.IN_USE):
        raise WrongState(f"volume {volume.name} is {volume.state}", hint="atoll job list")
    return volume


def _prepare_flatten(state: State, target: str, request: Nothing) -> Prepared:
    volume = _flattenable(state, target)
    # Its guest may run, but neither moves nor ends meanwhile; cancelling frees it at once.
    shared = [f"pool:{volume.pool}", *([f"instance:{volume.instance}"] if volume.instance else [])]
    return Prepared({"id": volume.id}, locks(shared, [volume.resource]), f"flatten volume {volume.name}", deadline=DAY)


async def _run_flatten(job: JobContext, request: dict[str, Any]) -> Any:
    def where() -> dict[str, Any]:
        state: State = job.state
        volume = _flattenable(state, request["id"])
        node, ref = _any_ref(state, state.store.require(Pool, volume.pool))
        return {"node": node, "ref": ref, "logical_id": volume.logical_id}

    found = await job.read("where", where)
    node, args = found["node"], {"ref": found["ref"], "logical_id": found["logical_id"]}
    undo = Undo("volume.unflatten", {"volume": request["id"]}, node=node, dies=True)
    copied = await job.call("flatten", node, "volume.flatten", args, undo=undo, deadline=DAY, span=(0.0, 100.0))
    return {"volume": request["id"], "copied": copied}


register(Operation("volume.flatten", Nothing, _prepare_flatten, _run_flatten))


def _prepare_rename(state: State, target: str, request: Rename) -> Prepared:
    volume = state.store.find(Volume, target)
    check_new_name(state, Volume, request.new_name)
    held = [volume.resource, name_lock(Volume, request.new_name)]
    if volume.instance:
        owner = state.store.require(Instance, volume.instance)
        if owner.desired == "running" and not volume.adopted:
            raise InUse(f"volume {volume.name} is a disk of {owner.name}, which runs", hint=f"atoll instance stop {owner.name}")
        held.append(owner.resource)
    pool = state.store.require(Pool, volume.pool)
    return Prepared(frozen(request, id=volume.id), locks([pool.resource], held), f"rename volume {volume.name} to {request.new_name}")


@undo_function("volume.name")
def _restore_name(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Volume, args["volume"])
    update = {"name": args["name"], "logical_id": args["logical_id"]}
    return Changes(put=[found.model_copy(update=update)] if found else [])


async def rename_image(job: JobContext, volume: str, name: str) -> None:
    """Rename the record, and the image where the driver's images carry names. An adopted image keeps its own."""

    def where() -> dict[str, Any]:
        state: State = job.state
        found = state.store.require(Volume, volume)
        pool = state.store.require(Pool, found.pool)
        renames = state.driver(pool).rename != "no" and not found.adopted and bool(found.logical_id)
        nodes = [state.pool_node(pool, owner=found.node).id, *([found.secondary] if found.secondary else [])] if renames else []
        refs = [(n, state.ref(pool, state.store.require(Node, n)).model_dump(mode="json")) for n in nodes]
        return {"old": found.name, "logical_id": found.logical_id, "refs": refs}

    found = await job.read(f"where/{volume}", where)
    await look_at_pool(job, volume, found["refs"])
    logical_id = found["logical_id"]
    for number, (node, ref) in enumerate(found["refs"]):
        args = {"ref": ref, "logical_id": found["logical_id"], "volume": volume, "name": name}
        back = {"ref": ref, "logical_id": "", "volume": volume, "name": found["old"]}
        logical_id = await job.call(
            f"rename image/{volume} {number + 1}", node, "volume.rename", args, undo=Undo("volume.rename", back, node=node)
        )

    def record() -> Changes:
        kept = job.state.store.require(Volume, volume)
        return Changes(put=[kept.model_copy(update={"name": name, "logical_id": logical_id})])

    undo = Undo("volume.name", {"volume": volume, "name": found["old"], "logical_id": found["logical_id"]})
    await job.write(f"record name/{volume}", record, undo)


async def _run_rename(job: JobContext, request: dict[str, Any]) -> Any:
    await rename_image(job, request["id"], request["new_name"])
    return {"volume": request["id"], "name": request["new_name"]}


register(Operation("volume.rename", Rename, _prepare_rename, _run_rename))
register(Operation("volume.tags", TagsChange, prepare_tags(Volume), run_tags(Volume)))
