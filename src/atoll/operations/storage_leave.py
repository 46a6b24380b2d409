"""Nodes and disks that leave a storage cluster for good: emptied first; or given up, when they are dead and nothing is lost with them."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.deploy import registry as kinds
from atoll.deploy.contract import Member
from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes
from atoll.model.errors import NodeAnswers, NodeUnavailable, StorageWouldStop, WrongState
from atoll.model.objects import Group, JobState, Node, StorageCluster
from atoll.operations import storage_plan
from atoll.operations.common import frozen, locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.state import State
from atoll.operations.storage_requests import NodeLeaveStorage, NodeRemoveStorageDisks, NodeReplaceStorage
from atoll.operations.storage_rest import cluster_of
from atoll.operations.storages import carry_out, members_of, opened, seal

#: Data takes its time; the step that waits for it gives up when nothing moves any more.
DEADLINE = 8 * 24 * 3600.0


def others_of(state: State, cluster: StorageCluster, name: str) -> list[Node]:
    """The other nodes of the storage cluster: each must take part, or data could not be moved. Errors: NodeUnavailable."""
    others = [
        n for n in state.nodes_of_group(cluster.group) if n.name in kinds.planner(cluster.type).roles(cluster.layout) and n.name != name
    ]
    for node in others:
        if node.storage != "joined" or not state.answers(node.id):
            why = "its part is stopped" if node.storage == "stopped" else "it does not answer"
            raise NodeUnavailable(
                f"node {node.name} of the storage cluster {cluster.name} must take part in this, and {why}",
                hint=f"atoll node add {node.name} --readd",
            )
    return others


def check_leaves(state: State, node: Node, disks: list[str], *, dead: bool) -> StorageCluster | None:
    """The storage cluster that it leaves; None: it has no part in one. Errors: those of a request that cannot be granted."""
    cluster = cluster_of(state, node)
    if cluster is None or node.storage not in ("joined", "stopped"):
        return None
    whole = not disks
    if dead and whole and state.health.alive(node.id):
        raise NodeAnswers(f"node {node.name} answers; it is not dead", hint=f"atoll node modify {node.name} --drain")
    if not (dead and whole):
        if node.storage == "stopped":
            raise WrongState(f"the part of node {node.name} in {cluster.name} is stopped", hint=f"atoll node add {node.name} --readd")
        if not state.answers(node.id):
            raise NodeUnavailable(
                f"node {node.name} does not answer", hint=f"if it died for good: atoll storage replace-node {node.name} NEW"
            )
    others_of(state, cluster, node.name)
    kinds.planner(cluster.type).shrunk(cluster.layout, node.name, disks, dead=dead)
    return cluster


def held_by(state: State, node: Node, cluster: StorageCluster | None) -> list[str]:
    """What is locked: one node at a time, since each alone may go, and two together may not."""
    return [node.resource, *([cluster.resource] if cluster else [])]


async def leave(job: JobContext, node: str, disks: list[str], *, dead: bool) -> dict[str, Any]:
    """The node, or some of its disks, leaves its storage cluster. Passes the job's commit. Errors: StorageWouldStop; those of the steps."""

    def begin() -> dict[str, Any]:
        state: State = job.state
        record = state.store.require(Node, node)
        cluster = check_leaves(state, record, disks, dead=dead)
        if cluster is None:
            return {"name": record.name}
        group = state.store.require(Group, cluster.group)
        layout = kinds.planner(cluster.type).shrunk(cluster.layout, record.name, disks, dead=dead)
        members = [m.model_dump(mode="json") for m in members_of(state, cluster.type, group) if state.answers(m.id)]
        there = {"id": cluster.id, "type": cluster.type, "layout": cluster.layout, "keys": cluster.keys, "storage": cluster.name}
        return {"name": record.name, "new": layout, "members": members, **there}

    begun = await job.read("storage", begin)
    if "id" not in begun:
        await job.commit()
        await job.write("no part in it", lambda: Changes(put=_no_longer_wanted(job.state, node)))
        return {"node": node, "unchanged": True}
    kind, planner, name = begun["type"], kinds.planner(begun["type"]), begun["name"]
    layouts = (begun["layout"], begun["new"])
    asked = planner.spare(layouts, name, dead=dead)

    def accept(answer: dict[str, Any]) -> None:
        if answer["stops"]:
            raise StorageWouldStop(
                f"{'its disks' if disks else f'node {name}'} cannot leave {begun['storage']}: {'; '.join(answer['stops'])}",
                hint=f"atoll storage status {begun['storage']}; when that is mended, the same command again",
            )

    job.progress(2, "asking the storage cluster what would be lost")
    await job.look(asked.key, asked.node, f"{kind}.{asked.step}", asked.args, accept=accept, deadline=asked.deadline)
    # What a monitor or a manager elsewhere needs: its key is one of those that are kept, or is made now.
    context = f"storage:{begun['id']}"
    sealed = await job.read("keys", lambda: seal(job.state, planner.more_secrets(*layouts), context))
    secrets = {**opened(job.state, begun["keys"], context), **opened(job.state, sealed, context)}
    members = [Member.model_validate(m) for m in begun["members"]]
    results: dict[str, Any] = {}
    before, after = planner.shrink(members, layouts, name, secrets, dead=dead)
    spans = {"emptied": (10.0, 80.0)}
    for number, phase in enumerate(before):
        await carry_out(job, kind, phase, results, spans.get(phase[0].step, (min(3.0 + number, 9.0), min(4.0 + number, 10.0))))
    await job.commit()
    for number, phase in enumerate(after):
        await carry_out(job, kind, phase, results, (min(80.0 + 3 * number, 97.0), min(83.0 + 3 * number, 98.0)))
    roles = planner.roles(begun["new"])

    def record() -> Changes:
        state: State = job.state
        cluster = state.store.require(StorageCluster, begun["id"])
        put: list[Any] = [cluster.model_copy(update={"layout": begun["new"]})]
        for n in state.nodes_of_group(cluster.group):
            if n.name in roles and n.storage:
                put.append(n.model_copy(update={"storage_roles": tuple(roles[n.name])}))
            elif n.id == node:
                put.append(n.model_copy(update={"storage": "", "storage_roles": ()}))
        return Changes(put=put)

    await job.write("record", record)
    return {"node": node, "storage": begun["id"], "roles": roles.get(name, [])}


def _no_longer_wanted(state: State, node: str) -> list[Any]:
    record = state.store.require(Node, node)
    return [record.model_copy(update={"storage": ""})] if record.storage == "wanted" else []


def _prepare_leave(state: State, target: str, request: NodeLeaveStorage) -> Prepared:
    node = state.store.find(Node, target)
    if cluster_of(state, node) is None:
        raise WrongState(f"node {node.name} has no part in a storage cluster", hint="atoll storage list")
    cluster = check_leaves(state, node, [], dead=request.dead)
    words = "give up" if request.dead else "empty"
    text = f"{words} the part of node {node.name} in the storage cluster {cluster.name if cluster else ''}".rstrip()
    return Prepared(frozen(request, id=node.id), locks([_group(state, node)], held_by(state, node, cluster)), text)


def _group(state: State, node: Node) -> str:
    return state.store.require(Group, node.group).resource


async def _run_leave(job: JobContext, request: dict[str, Any]) -> Any:
    return await leave(job, request["id"], [], dead=request["dead"])


register(
    Operation("node.leave-storage", NodeLeaveStorage, _prepare_leave, _run_leave, role="admin", deadline=DEADLINE, plan=storage_plan.leave)
)


def _prepare_disks(state: State, target: str, request: NodeRemoveStorageDisks) -> Prepared:
    node = state.store.find(Node, target)
    cluster = check_leaves(state, node, request.disks, dead=request.dead)
    if cluster is None:
        raise WrongState(f"node {node.name} has no part in a storage cluster", hint="atoll storage list")
    text = f"remove {', '.join(request.disks)} of node {node.name} from the storage cluster {cluster.name}"
    return Prepared(frozen(request, id=node.id), locks([_group(state, node)], held_by(state, node, cluster)), text)


async def _run_disks(job: JobContext, request: dict[str, Any]) -> Any:
    return await leave(job, request["id"], request["disks"], dead=request["dead"])


register(
    Operation(
        "node.remove-storage-disks",
        NodeRemoveStorageDisks,
        _prepare_disks,
        _run_disks,
        role="admin",
        deadline=DEADLINE,
        plan=storage_plan.remove_disks,
    )
)


# --- a node in the place of a dead one ---


def _prepare_replace(state: State, target: str, request: NodeReplaceStorage) -> Prepared:
    dead, new = state.store.find(Node, target), state.store.find(Node, request.node)
    group = state.store.require(Group, dead.group)
    if cluster_of(state, dead) is None:
        raise WrongState(f"group {group.name} has no storage cluster", hint="atoll storage list")
    if new.id == dead.id or new.group != dead.group:
        raise WrongState(
            f"node {new.name} cannot take the place of {dead.name}: it must be another node of group {group.name}",
            hint=f"atoll node add NAME -g {group.name}, or atoll group assign-nodes {group.name} {new.name} while it is offline",
        )
    if state.health.alive(dead.id) and dead.storage in ("joined", "stopped"):
        raise NodeAnswers(f"node {dead.name} answers; it is not dead", hint=f"atoll node modify {dead.name} --drain")
    if new.storage != "joined" and (new.offline or not state.answers(new.id)):
        raise NodeUnavailable(f"node {new.name} {'is offline' if new.offline else 'does not answer'}")
    return Prepared(
        frozen(request, id=dead.id, node=new.id), locks([group.resource]), f"put node {new.name} in the place of {dead.name}, which is dead"
    )


def _has_joined(job: JobContext, node: str) -> bool:
    found: Node = job.state.store.require(Node, node)
    return found.storage == "joined"


async def _run_replace(job: JobContext, request: dict[str, Any]) -> Any:
    """First the new one joins: then the data of the dead one has somewhere to go. Each is a job by itself, which stays."""

    def begin() -> dict[str, Any]:
        dead, new = (job.state.store.require(Node, request[key]) for key in ("id", "node"))
        return {"joins": new.storage != "joined", "leaves": dead.storage in ("joined", "stopped"), "dead": dead.name, "new": new.name}

    begun = await job.read("nodes", begin)
    work: list[tuple[str, str, str, dict[str, Any]]] = []
    if begun["joins"]:
        work.append((f"{begun['new']} joins", "node.join-storage", request["node"], {}))
    if begun["leaves"]:
        work.append((f"{begun['dead']} is given up", "node.leave-storage", request["id"], {"dead": True}))
    for number, (text, operation, target, args) in enumerate(work):
        job.progress(100 * number / len(work), text)
        child = await job.ended(await job.child(text, operation, target, args))
        # It may have joined by itself meanwhile, as nodes do that are new in the group.
        after_all = operation == "node.join-storage" and await job.read("joined after all", partial(_has_joined, job, target))
        if child.state is not JobState.DONE and not after_all:
            why = (child.error or {}).get("message", child.reason)
            raise WrongState(
                f"{text}: its job {child.number} is {child.state}: {why}",
                hint=f"atoll job info {child.number}; then again: atoll storage replace-node {begun['dead']} {begun['new']}",
            )
    return {"node": request["node"], "instead_of": request["id"], **({} if work else {"unchanged": True})}


register(
    Operation(
        "node.replace-storage",
        NodeReplaceStorage,
        _prepare_replace,
        _run_replace,
        role="admin",
        deadline=DEADLINE,
        plan=storage_plan.replace,
    )
)
