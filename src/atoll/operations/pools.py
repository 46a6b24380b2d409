"""Operations on storage pools."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import (
    UNKNOWN_OUTCOME,
    AtollError,
    InUse,
    InvalidInput,
    NodeUnavailable,
    NotFound,
    NotSupported,
    PoolNotReachable,
    PoolUnavailable,
)
from atoll.model.ids import new_id
from atoll.model.messages import PoolRef
from atoll.model.objects import Group, Instance, Node, Pool, Snapshot, Volume, Writers
from atoll.operations.common import check_new_name, check_usable, frozen, locks, name_lock, prepare_tags, refuse_observed, run_tags
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Nothing, PoolAdd, PoolConnect, PoolMark, PoolModify, PoolRemove, TagsChange
from atoll.operations.state import State
from atoll.storage import registry as drivers
from atoll.storage.contract import DriverInfo


def check_options(driver: DriverInfo, given: dict[str, str], defaults: dict[str, str]) -> dict[str, str]:
    """The options with the cluster's and the driver's defaults. Errors: InvalidInput names the option and what it takes."""
    known = {option.name: option for option in driver.options}
    for name in given:
        if name not in known:
            raise InvalidInput(f"driver {driver.name} has no option {name!r}", hint=f"options: {', '.join(sorted(known))}")
    result = {**{n: o.default for n, o in known.items() if o.default}, **defaults, **given}
    for name, option in known.items():
        if option.required and not result.get(name):
            raise InvalidInput(f"driver {driver.name} needs the option {name}: {option.description}", hint=f"-O {name}=VALUE")
        if option.choices and result.get(name) and result[name] not in option.choices:
            raise InvalidInput(f"option {name} is one of {', '.join(option.choices)}, not {result[name]!r}")
    return result


def _members(state: State, driver: DriverInfo, groups: list[str] | tuple[str, ...]) -> list[Node]:
    """The nodes of these groups that take part: all that are not offline, and have the driver's credential if there is one."""
    return [n for n in state.managers(driver, groups) if not n.offline]


def _prepare_add(state: State, target: str, request: PoolAdd) -> Prepared:
    check_new_name(state, Pool, request.name)
    driver = drivers.info(request.driver)
    if state.store.by_name(Pool, request.name) is None and request.name in {d.name for d in drivers.drivers()}:
        raise InvalidInput(f"{request.name!r} is the name of a driver", hint="choose another name for the pool")
    if request.observe and not driver.observe:
        able = ", ".join(sorted(d.name for d in drivers.drivers() if d.observe))
        raise NotSupported(
            f"driver {driver.name} cannot observe a pool: what it looks at, it has to mark first", hint=f"drivers that can: {able}"
        )
    options = check_options(driver, request.options, state.cluster.driver_options.get(driver.name, {}))
    groups = [state.store.find(Group, g) for g in request.groups] or state.store.all(Group)
    silent = [n.name for n in _members(state, driver, [g.id for g in groups]) if not state.health.alive(n.id)]
    if silent:
        raise NodeUnavailable(
            f"node {', '.join(silent)} does not answer, so the pool cannot be prepared there", hint="atoll node modify NODE --offline yes"
        )
    same = [p.name for p in state.store.all(Pool) if p.driver == driver.name and p.options == options]
    if same:
        raise InUse(f"pool {same[0]} has the same driver and options", hint=f"atoll pool info {same[0]}")
    return Prepared(
        frozen(request, options=options, groups=[g.id for g in groups]),
        locks([g.resource for g in groups], [name_lock(Pool, request.name)]),
        f"add pool {request.name} ({driver.name})",
    )


@undo_function("pool.drop")
def _drop(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Pool, args["pool"])
    return Changes(delete=[found] if found else [])


async def prepare_on_nodes(job: JobContext, pool: str, ref: dict[str, Any], nodes: list[tuple[str, str]], *, first: bool) -> None:
    """Make the pool usable on nodes (id, name). ``first``: the first node marks shared storage as this pool's."""
    local = drivers.info(ref["driver"]).node_local
    for number, (node, name) in enumerate(nodes):
        create = local or (first and number == 0)
        here = {**ref, "node": name}
        undo = Undo("pool.unprepare", {"ref": here}, node=node) if create else None
        job.progress(10 + 60 * number / len(nodes), f"preparing {name}")
        status = await job.call(f"prepare/{name}", node, "pool.prepare", {"ref": here, "create": create}, undo=undo)
        if not status["ok"]:
            raise PoolUnavailable(f"on {name}: {status['reason']}", hint=f"on {name}: {status.get('hint') or 'look at the directory'}")


async def _look_from(job: JobContext, ref: dict[str, Any], nodes: list[tuple[str, str]]) -> None:
    """Look at a pool that shall only be observed; nothing is prepared. Errors: PoolUnavailable."""

    def usable(name: str, status: Any) -> None:
        if not status["ok"]:
            raise PoolUnavailable(f"on {name}: {status['reason']}", hint=f"on {name}: {status.get('hint') or 'look at the options'}")

    for number, (node, name) in enumerate(nodes):
        job.progress(10 + 80 * number / len(nodes), f"looking from {name}")
        await job.look(f"look from {name}", node, "pool.check", {"ref": {**ref, "node": name}}, accept=partial(usable, name))


async def measure_writers(job: JobContext, ref: dict[str, Any], nodes: list[tuple[str, str]], *, suffix: str = "") -> str:
    """Does a lock that one node takes show on another, and go when it is dropped? ``none`` unless it was seen."""
    driver = drivers.info(ref["driver"])
    # A lock that a service keeps is seen alike from everywhere.
    alone = driver.node_local or (driver.runs_on == "controllers" and len(nodes) == 1)
    if not nodes or (not alone and len(nodes) < 2):
        return str(Writers.NONE)
    holder, looker = nodes[0], nodes[0] if alone else nodes[1]
    there, here = {**ref, "node": holder[1]}, {**ref, "node": looker[1]}

    async def probe(key: str, node: tuple[str, str], at: dict[str, Any], action: str, undo: Undo | None = None) -> bool:
        return bool(await job.call(f"{key}{suffix}", node[0], "pool.probe", {"ref": at, "action": action}, undo=undo))

    let_go = Undo("pool.probe", {"ref": there, "action": "drop"}, node=holder[0], dies=True)
    held = await probe("take a probe lock", holder, there, "hold", let_go)
    seen = await probe("look for the lock", looker, here, "look")
    await probe("drop the lock", holder, there, "drop")
    gone = not await probe("look again", looker, here, "look")
    return str(Writers.ADVISORY if held and seen and gone else Writers.NONE)


async def _run_add(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        ident = new_id("pool", state.rng)
        ref = PoolRef(id=ident, name=request["name"], driver=request["driver"], options=request["options"], cluster=state.identity)
        ref = ref.model_copy(update={"observed": request.get("observe", False)})
        nodes = [(n.id, n.name) for n in _members(state, drivers.info(request["driver"]), request["groups"])]
        return {"pool": ident, "ref": ref.model_dump(mode="json"), "nodes": nodes}

    decided = await job.read("plan", plan)
    observe = request.get("observe", False)
    if observe:
        await _look_from(job, decided["ref"], decided["nodes"])
        writers = str(Writers.NONE)
    else:
        await prepare_on_nodes(job, decided["pool"], decided["ref"], decided["nodes"], first=True)
        job.progress(75, "measuring how well the storage tells who writes")
        writers = await measure_writers(job, decided["ref"], decided["nodes"])

    def record() -> Changes:
        check_new_name(job.state, Pool, request["name"])
        new = Pool(
            id=decided["pool"],
            name=request["name"],
            driver=request["driver"],
            options=request["options"],
            groups=tuple(request["groups"]),
            writers=Writers(writers),
            observed=observe,
        )
        return Changes(put=[new])

    await job.write("record", record, Undo("pool.drop", {"pool": decided["pool"]}))
    return {"pool": decided["pool"], "name": request["name"], "writers": writers}


register(Operation("pool.add", PoolAdd, _prepare_add, _run_add, role="admin"))


def _prepare_remove(state: State, target: str, request: PoolRemove) -> Prepared:
    pool = state.store.find(Pool, target)
    volumes = [v for v in state.store.all(Volume) if v.pool == pool.id]
    if volumes:
        raise InUse(f"pool {pool.name} has {len(volumes)} volumes, such as {volumes[0].name}", hint="atoll volume list")
    snapshots = [s for s in state.store.all(Snapshot) if s.pool == pool.id]
    if snapshots:
        raise InUse(f"pool {pool.name} has {len(snapshots)} snapshots, such as {snapshots[0].name}", hint="atoll snapshot list")
    return Prepared({"id": pool.id}, locks(exclusive=[pool.resource]), f"remove pool {pool.name}")


async def _run_remove(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        pool = state.store.require(Pool, request["id"])
        nodes = [n for n in _members(state, state.driver(pool), pool.groups) if state.health.alive(n.id)]
        if not state.driver(pool).node_local:
            nodes = nodes[:1]
        if pool.observed:
            nodes = []  # nothing of ours is there
        return {"nodes": [(n.id, n.name, state.ref(pool, n).model_dump(mode="json")) for n in nodes]}

    decided = await job.read("plan", plan)
    await job.commit()

    def remove() -> Changes:
        state: State = job.state
        pool = state.store.require(Pool, request["id"])
        groups = [g for g in state.store.all(Group) if pool.id in g.default_pools.values()]
        cleared = [g.model_copy(update={"default_pools": {k: v for k, v in g.default_pools.items() if v != pool.id}}) for g in groups]
        return Changes(put=[*cleared], delete=[pool])

    await job.write("remove", remove)
    for node, name, ref in decided["nodes"]:
        try:
            await job.call(f"forget/{name}", node, "pool.forget", {"ref": ref}, deadline=20.0)
        except AtollError as error:
            # The record is gone; a mark that stays on storage nobody can reach harms nothing and names the pool it belonged to.
            job.progress(None, f"the mark on {name} stays: {error.message}")
    return {"pool": request["id"]}


register(Operation("pool.remove", PoolRemove, _prepare_remove, _run_remove, role="admin"))


def _prepare_connect(state: State, target: str, request: PoolConnect) -> Prepared:
    pool, group = state.store.find(Pool, target), state.store.find(Group, request.group)
    refuse_observed(pool)
    return Prepared(
        {"id": pool.id, "group": group.id}, locks([group.resource], [pool.resource]), f"connect pool {pool.name} to group {group.name}"
    )


async def _run_connect(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        pool = state.store.require(Pool, request["id"])
        ref = PoolRef(id=pool.id, name=pool.name, driver=pool.driver, options=pool.options, cluster=state.identity)
        nodes = [(n.id, n.name) for n in _members(state, state.driver(pool), [request["group"]])]
        return {"ref": ref.model_dump(mode="json"), "nodes": nodes}

    decided = await job.read("plan", plan)
    await prepare_on_nodes(job, request["id"], decided["ref"], decided["nodes"], first=False)
    await job.commit()

    def record() -> Changes:
        pool = job.state.store.require(Pool, request["id"])
        return Changes(put=[pool.model_copy(update={"groups": tuple(sorted({*pool.groups, request["group"]}))})])

    await job.write("record", record)
    return {"pool": request["id"], "group": request["group"]}


register(Operation("pool.connect", PoolConnect, _prepare_connect, _run_connect, role="admin"))


def _prepare_disconnect(state: State, target: str, request: PoolConnect) -> Prepared:
    pool, group = state.store.find(Pool, target), state.store.find(Group, request.group)
    if group.id not in pool.groups:
        raise NotFound(f"pool {pool.name} is not connected to group {group.name}", hint=f"atoll pool info {pool.name}")
    users = [i.name for i in state.store.all(Instance) if i.group == group.id and any(v.pool == pool.id for _, v in state.volumes_of(i))]
    if users:
        raise InUse(f"instances of group {group.name} use pool {pool.name}: {', '.join(users[:5])}", hint="atoll instance list")
    return Prepared(
        {"id": pool.id, "group": group.id},
        locks([], [pool.resource, group.resource]),
        f"disconnect pool {pool.name} from group {group.name}",
    )


async def _run_disconnect(job: JobContext, request: dict[str, Any]) -> Any:
    def record() -> Changes:
        pool = job.state.store.require(Pool, request["id"])
        return Changes(put=[pool.model_copy(update={"groups": tuple(g for g in pool.groups if g != request["group"])})])

    await job.commit()
    await job.write("record", record)
    return {"pool": request["id"], "group": request["group"]}


register(Operation("pool.disconnect", PoolConnect, _prepare_disconnect, _run_disconnect, role="admin"))


def _prepare_check(state: State, target: str, request: Nothing) -> Prepared:
    pool = state.store.find(Pool, target)
    _checkable(state, pool)
    return Prepared({"id": pool.id}, locks(exclusive=[pool.resource]), f"check pool {pool.name}")


def _checkable(state: State, pool: Pool) -> list[Node]:
    """The nodes that can look at it. Errors: PoolNotReachable when there is none."""
    nodes = _members(state, state.driver(pool), pool.groups)
    if not nodes:
        raise PoolNotReachable(
            f"no node can look at pool {pool.name}: its groups have none", hint=f"atoll pool connect {pool.name} GROUP, or atoll node add"
        )
    return nodes


async def _run_check(job: JobContext, request: dict[str, Any]) -> Any:
    """Look on every node, measure the writers again, and keep what was found."""

    def plan() -> dict[str, Any]:
        state: State = job.state
        pool = state.store.require(Pool, request["id"])
        nodes = _checkable(state, pool)
        return {
            "ref": state.ref(pool, nodes[0]).model_dump(mode="json"),
            "nodes": [(n.id, n.name) for n in nodes if state.health.alive(n.id)],
            "silent": [n.name for n in nodes if not state.health.alive(n.id)],
        }

    decided = await job.read("plan", plan)
    found: dict[str, Any] = {name: {"ok": False, "reason": "does not answer"} for name in decided["silent"]}
    good = []
    for node, name in decided["nodes"]:
        try:
            found[name] = await job.call(f"check/{name}", node, "pool.check", {"ref": {**decided["ref"], "node": name}}, deadline=40.0)
        except (PoolUnavailable, *UNKNOWN_OUTCOME) as error:
            found[name] = {"ok": False, "reason": error.message}
        if found[name]["ok"]:
            good.append((node, name))
    observed = decided["ref"].get("observed", False)
    writers = str(Writers.NONE) if observed else await measure_writers(job, decided["ref"], good)

    def record() -> Changes:
        pool = job.state.store.require(Pool, request["id"])
        return Changes(put=[pool.model_copy(update={"writers": Writers(writers)})])

    await job.commit()
    await job.write("record", record)
    return {"pool": request["id"], "writers": writers, "nodes": found, "ok": all(f["ok"] for f in found.values())}


register(Operation("pool.check", Nothing, _prepare_check, _run_check))


def _prepare_mark(state: State, target: str, request: PoolMark) -> Prepared:
    pool = state.store.find(Pool, target)
    refuse_observed(pool)
    node = check_usable(state, state.store.find(Node, request.node)) if request.node else state.pool_node(pool)
    return Prepared({"id": pool.id, "node": node.id}, locks([node.resource], [pool.resource]), f"mark pool {pool.name} on {node.name}")


async def _run_mark(job: JobContext, request: dict[str, Any]) -> Any:
    """Somebody has removed the mark. The person's word that this is the right place is checked by the images that must be there."""

    def plan() -> dict[str, Any]:
        state: State = job.state
        pool, node = state.store.require(Pool, request["id"]), state.store.require(Node, request["node"])
        local = state.driver(pool).node_local
        volumes = [v for v in state.store.all(Volume) if v.pool == pool.id and (not local or node.id in (v.node, v.secondary))]
        return {"ref": state.ref(pool, node).model_dump(mode="json"), "expected": [v.logical_id for v in volumes if v.logical_id]}

    await job.call("mark", request["node"], "pool.mark", await job.read("plan", plan))
    return {"pool": request["id"]}


register(Operation("pool.mark", PoolMark, _prepare_mark, _run_mark, role="admin"))


def _prepare_modify(state: State, target: str, request: PoolModify) -> Prepared:
    pool = state.store.find(Pool, target)
    refuse_observed(pool)
    return Prepared(frozen(request, id=pool.id), locks(exclusive=[pool.resource]), f"set pool {pool.name} to {request.state}")


async def _run_modify(job: JobContext, request: dict[str, Any]) -> Any:
    def change() -> Changes:
        pool = job.state.store.require(Pool, request["id"])
        reason = request["reason"] or ("closed by the administrator" if request["state"] == "closed" else "")
        return Changes(put=[pool.model_copy(update={"state": request["state"], "state_reason": reason})])

    await job.commit()
    await job.write("change", change)
    return {"pool": request["id"], "state": request["state"]}


register(Operation("pool.modify", PoolModify, _prepare_modify, _run_modify, role="admin"))
register(Operation("pool.tags", TagsChange, prepare_tags(Pool), run_tags(Pool), role="admin"))
