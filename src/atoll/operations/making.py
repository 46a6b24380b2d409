"""Making one volume, as steps of a larger job."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import UNKNOWN_OUTCOME, InvalidInput, NodeUnavailable, PoolUnavailable, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Node, Pool, Volume, VolumeState
from atoll.operations.common import check_new_name, check_size_for
from atoll.operations.importing import fill, look_at_image, plan_image
from atoll.operations.snapshot_source import plan_source
from atoll.operations.state import State

#: Seconds for an order of which a dead client of the storage may have to be waited for.
PATIENT = 120.0
#: Writes into a new image, which it gets as (node, pool reference) and logical id.
Filler = Callable[[tuple[str, dict[str, Any]], str], Awaitable[None]]


def plan_volume(
    state: State,
    *,
    name: str,
    pool: Pool,
    size: int | None,
    adopt: str | None,
    node: str | None,
    secondary: str | None = None,
    options: dict[str, str] | None = None,
    tags: list[str] | None = None,
    image: dict[str, Any] | None = None,
    snapshot: str | None = None,
    ident: str | None = None,
) -> dict[str, Any]:
    """All that the steps need, as JSON; the id is chosen here unless ``ident`` is one.

    ``node`` owns the disk of a node-local pool, else it just works first.
    """
    driver = state.driver(pool)
    if adopt is None:
        state.pools_health.check(pool)
    origin = plan_source(state, snapshot, pool, size, other=adopt or image) if snapshot else None
    if origin is not None:
        size = origin["size"]
    if adopt is None and size is None and image is None:
        raise InvalidInput("a new volume needs a size", hint="--size 10G")
    if adopt is not None and image is not None:
        raise InvalidInput("a volume is either adopted or made from an image", hint="leave adopt or image away")
    if adopt is not None and driver.adoption == "no":
        raise WrongState(f"driver {driver.name} cannot adopt images")
    if adopt is None and driver.adoption == "must":
        raise WrongState(f"driver {driver.name} only adopts: name an existing device", hint="--disk 0:adopt=...")
    source = plan_image(state, image) if image else None
    worker = state.pool_node(pool, prefer=source["node"] if source else node, owner=node)
    owners = {"node": worker.id if driver.node_local else None, "secondary": secondary if driver.node_local else None}
    return {
        "volume": ident or new_id("vol", state.rng),
        "name": name,
        "pool": pool.id,
        "size": check_size_for(driver, size) if size is not None else 0,
        "adopt": adopt,
        "image": source,
        "snapshot": origin,
        "worker": worker.id,
        "options": options or {},
        "tags": tags or [],
        **owners,
    }


@undo_function("volume.forget")
def _forget(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Volume, args["volume"])
    return Changes(delete=[found] if found else [])


async def make_volume(
    job: JobContext,
    plan: dict[str, Any],
    *,
    instance: str | None = None,
    span: tuple[float, float] | None = None,
    filler: Filler | None = None,
) -> dict[str, Any]:
    """Record it, make (or adopt) the image, and call it available. The undo leaves neither record nor image; an adopted image stays.

    ``span``: from which to which percent of the job this goes.
    """
    volume = plan["volume"]
    size, kind = plan["size"], ""
    # The journal of an older version has no such thing.
    origin = plan.get("snapshot")

    def record() -> Changes:
        state: State = job.state
        if plan["name"] != volume:
            check_new_name(state, Volume, plan["name"])
        pool = state.store.require(Pool, plan["pool"])
        if plan["adopt"]:
            other = next((v for v in state.store.all(Volume) if v.pool == pool.id and v.logical_id == plan["adopt"]), None)
            if other is not None and (not state.driver(pool).node_local or other.node == plan["node"]):
                raise WrongState(f"image {plan['adopt']} belongs to volume {other.name} already", hint=f"atoll volume info {other.name}")
        new = Volume(
            id=volume,
            name=plan["name"],
            pool=pool.id,
            size=size or 512,
            logical_id=plan["adopt"] or "",
            node=plan["node"],
            secondary=plan["secondary"],
            instance=instance,
            adopted=bool(plan["adopt"]),
            snapshot=origin["id"] if origin else "",
            created=state.clock.now(),
            tags=tuple(plan["tags"]),
        )
        return Changes(put=[new])

    refs = await job.read(f"refs/{volume}", lambda: _refs(job.state, plan))
    if not plan["adopt"]:
        await look_at_pool(job, volume, refs)
    if plan["image"]:
        size, kind = await look_at_image(job, plan)
    await job.write(f"record volume/{volume}", record, Undo("volume.forget", {"volume": volume}))
    logical_id = plan["adopt"]
    for number, (node, ref) in enumerate(refs):
        if plan["adopt"]:
            stat = await job.call(f"adopt image/{volume}", node, "volume.adopt", {"ref": ref, "source": plan["adopt"], "volume": volume})
            size, logical_id = stat["size"], stat["logical_id"]
            break
        spec = {"volume": volume, "name": plan["name"], "size": size, "options": plan["options"]}
        logical_id = await job.call(
            f"create image/{volume}" + (f" copy {number + 1}" if number else ""),
            node,
            "volume.clone" if origin else "volume.create",
            {"ref": ref, "spec": spec, **({"snapshot": origin["logical_id"]} if origin else {})},
            undo=Undo("volume.uncreate", {"ref": ref, "volume": volume}, node=node, local=plan["node"] is not None),
            deadline=3600.0,
        )
    if plan["image"]:
        await fill(job, plan, kind, refs[0], logical_id, span)
    if filler is not None:
        await filler(refs[0], logical_id)
    if plan["secondary"]:
        names = await job.read(f"copies/{volume}", lambda: [job.state.store.require(Node, n).name for n, _ in refs])
        args = {"ref": refs[0][1], "logical_id": logical_id, "primary": names[0], "secondary": names[1]}
        await job.call(f"sync/{volume}", refs[0][0], "volume.sync", args, deadline=3600.0)

    def available() -> Changes:
        found = job.state.store.require(Volume, volume)
        state = VolumeState.IN_USE if instance else VolumeState.AVAILABLE
        return Changes(put=[found.model_copy(update={"state": state, "logical_id": logical_id, "size": size})])

    await job.write(f"available/{volume}", available)
    return {"volume": volume, "name": plan["name"], "size": size}


async def look_at_pool(job: JobContext, volume: str, refs: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuse storage that is not there before anything is begun: what may have been made could not be undone there either.

    Errors: PoolUnavailable.
    """

    def usable(status: Any, name: str) -> None:
        if not status["ok"]:
            raise PoolUnavailable(status["reason"], hint=f"atoll pool check {name}")

    for node, ref in refs:
        key = f"look at the pool/{volume} on {ref['node']}"
        await job.look(key, node, "pool.check", {"ref": ref}, accept=partial(usable, name=ref["name"]))


async def look_at_shared(job: JobContext, what: str, pool: str) -> None:
    """The same for shared storage, by whoever works on it. Errors: PoolUnavailable."""

    def where() -> list[Any]:
        state: State = job.state
        home = state.store.require(Pool, pool)
        if state.driver(home).node_local:
            return []
        worker = state.pool_node(home)
        return [[worker.id, state.ref(home, worker).model_dump(mode="json")]]

    refs = await job.read(f"who looks/{what}", where)
    await look_at_pool(job, what, [(node, ref) for node, ref in refs])


def own_refs(state: State, volume: Volume) -> list[tuple[str, dict[str, Any]]]:
    """Node and pool reference for each copy of a node-local volume's image; none for a volume on shared storage, or without an image."""
    pool = state.store.require(Pool, volume.pool)
    nodes = [n for n in (volume.node, volume.secondary) if n and volume.logical_id] if state.driver(pool).node_local else []
    return [(n, state.ref(pool, state.store.require(Node, n)).model_dump(mode="json")) for n in nodes]


def _refs(state: State, plan: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The nodes that make the image: one, or both of an internally mirrored volume."""
    pool = state.store.require(Pool, plan["pool"])
    nodes = [plan["worker"], *([plan["secondary"]] if plan["secondary"] else [])]
    return [(n, state.ref(pool, state.store.require(Node, n)).model_dump(mode="json")) for n in nodes]


@undo_function("volume.state")
def _restore_state(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Volume, args["volume"])
    return Changes(put=[found.model_copy(update={"state": VolumeState(args["state"])})] if found else [])


async def mark_deleting(job: JobContext, volume: str, back_to: VolumeState) -> None:
    """The first half of a deletion: from here on nobody uses it. Undone by going back to ``back_to``."""

    def mark() -> Changes:
        found = job.state.store.require(Volume, volume)
        return Changes(put=[found.model_copy(update={"state": VolumeState.DELETING})])

    await job.write(f"mark deleting/{volume}", mark, Undo("volume.state", {"volume": volume, "state": str(back_to)}))


async def on_pool(job: JobContext, key: str, volume: str, method: str, args: dict[str, Any], *, prefer: str | None, deadline: float) -> Any:
    """``on_shared`` for a volume."""

    def pool() -> Pool:
        return _pool_of(job.state, volume)

    return await on_shared(job, key, pool, method, args, prefer=prefer, deadline=deadline)


def _pool_of(state: State, volume: str) -> Pool:
    return state.store.require(Pool, state.store.require(Volume, volume).pool)


async def on_shared(
    job: JobContext, key: str, pool: Callable[[], Pool], method: str, args: dict[str, Any], *, prefer: str | None, deadline: float
) -> Any:
    """An idempotent order about shared storage, past the job's commit: if the agent that got it is silent, another one gets it.

    Errors: the agent's; Unreachable, NodeUnavailable or WrongState when nobody is left to ask.
    """
    tried: list[str] = []
    while True:
        step = key + (f" again {len(tried)}" if tried else "")

        def choose() -> tuple[str, dict[str, Any]]:
            state: State = job.state
            worker = state.pool_node(pool(), prefer=prefer, exclude=tried)
            return worker.id, state.ref(pool(), worker).model_dump(mode="json")

        worker, ref = await job.read(f"who: {step}", choose)
        tried.append(worker)
        if job.journaled(f"who: {key} again {len(tried)}"):
            continue
        try:
            return await job.call(step, worker, method, {"ref": ref, **args}, deadline=deadline)
        except (NodeUnavailable, *UNKNOWN_OUTCOME):
            if not any(n.id not in tried for n in job.state.pool_nodes(job.state.store.require(Pool, ref["id"]))):
                raise


def declare_lost(node: str) -> str:
    """The command for somebody who knows that a node's own disks will not come back."""
    return f"atoll node declare-dead {node} --disks-are-lost"


async def on_own_disk(job: JobContext, key: str, node: str, method: str, args: dict[str, Any], *, deadline: float) -> tuple[bool, Any]:
    """An order, past the job's commit, about what lies on a node's own disks: (True, its result); (False, None) when these are lost, as
    somebody has said.

    Errors: the agent's; Unreachable or NodeUnavailable, with what to type when the node never comes back.
    """
    try:
        return True, await job.call(key, node, method, args, deadline=deadline)
    except (NodeUnavailable, *UNKNOWN_OUTCOME) as error:
        state: State = job.state
        if state.disks_are_lost(node):
            return False, None
        command = declare_lost(state.store.require(Node, node).name)
        raise type(error)(error.message, hint=f"if it never comes back: {command}", commands=[command]) from error


async def delete_image(job: JobContext, volume: str, *, prefer: str | None = None) -> list[str]:
    """The second half, past the job's commit: remove the image (all copies), then the record. Gives what was forgotten instead, because
    it was on lost disks."""

    def where() -> dict[str, Any]:
        found = job.state.store.require(Volume, volume)
        return {"logical_id": found.logical_id, "refs": own_refs(job.state, found)}

    image = await job.read(f"image of/{volume}", where)
    args = {"logical_id": image["logical_id"]}
    lost = []
    for number, (node, ref) in enumerate(image["refs"]):
        key = f"delete image/{volume}" + (f" copy {number + 1}" if number else "")
        there, _ = await on_own_disk(job, key, node, "volume.delete", {"ref": ref, **args}, deadline=120.0)
        if not there:
            lost.append(f"{image['logical_id']} on {ref['node']} was forgotten, not deleted: its disks are lost")
    if image["logical_id"] and not image["refs"]:
        await on_pool(job, f"delete image/{volume}", volume, "volume.delete", args, prefer=prefer, deadline=PATIENT)
    await job.write(f"forget/{volume}", lambda: Changes(delete=[job.state.store.require(Volume, volume)]))
    return lost
