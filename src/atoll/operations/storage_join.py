"""A node that joins the storage cluster of its group, while guests go on reading and writing."""

from __future__ import annotations

from typing import Any

from atoll.deploy import registry as kinds
from atoll.deploy.contract import Member
from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes
from atoll.model.errors import AlreadyExists, NodeUnavailable, WrongState
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations import storage_plan
from atoll.operations.common import locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.state import State
from atoll.operations.storage_requests import NodeJoinStorage
from atoll.operations.storage_rest import cluster_of
from atoll.operations.storages import carry_out, look, members_of, new_uuid, opened, seal


def _prepare(state: State, target: str, request: NodeJoinStorage) -> Prepared:
    node = state.store.find(Node, target)
    group = state.store.require(Group, node.group)
    cluster = cluster_of(state, node)
    if cluster is None:
        raise WrongState(f"group {group.name} has no storage cluster", hint=f"atoll storage init -s TYPE {group.name}")
    if node.storage in ("joined", "stopped"):
        roles = ", ".join(node.storage_roles)
        raise AlreadyExists(f"node {node.name} has a part in {cluster.name} already: {roles}", hint="atoll node list")
    if node.offline or not state.answers(node.id):
        raise NodeUnavailable(f"node {node.name} {'is offline' if node.offline else 'does not answer'}")
    if teller_of(state, cluster) is None:
        raise NodeUnavailable(f"no node that could tell of {cluster.name} answers")
    held = [node.resource, cluster.resource]
    return Prepared({"id": node.id}, locks([group.resource], held), f"let node {node.name} join the storage cluster {cluster.name}")


def teller_of(state: State, cluster: StorageCluster) -> str | None:
    """The id of a node that can tell how the storage cluster is, and let others in."""
    tellers = kinds.planner(cluster.type).tellers(cluster.layout)
    able = [n for n in state.nodes_of_group(cluster.group) if n.name in tellers and n.storage == "joined" and state.answers(n.id)]
    return able[0].id if able else None


def _joining(state: State, node: str, cluster: StorageCluster) -> list[Member]:
    """The node, those that are in the storage cluster already and answer, and clients."""
    group = state.store.require(Group, cluster.group)
    found = members_of(state, cluster.type, group)
    return [m for m in found if m.id == node or not m.inside or (m.name in cluster.layout["hosts"] and state.answers(m.id))]


def begun_with(state: State, node: Node) -> dict[str, Any]:
    """What a job that lets something join works with. Errors: NodeUnavailable."""
    cluster = cluster_of(state, node)
    teller = teller_of(state, cluster) if cluster else None
    if cluster is None or teller is None:
        raise NodeUnavailable("no node that could tell of the storage cluster answers")
    return {"id": cluster.id, "type": cluster.type, "layout": cluster.layout, "keys": cluster.keys, "teller": teller}


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    def begin() -> dict[str, Any]:
        state: State = job.state
        node = state.store.require(Node, request["id"])
        found, cluster = begun_with(state, node), cluster_of(state, node)
        assert cluster is not None
        return {**found, "members": [m.model_dump(mode="json") for m in _joining(state, request["id"], cluster)]}

    begun = await job.read("storage", begin)
    planner = kinds.planner(begun["type"])
    members = [Member.model_validate(m) for m in begun["members"]]
    facts = await look(job, planner, begun["type"], members, begun["layout"])
    grown = await job.read("layout", lambda: planner.grown(begun["layout"], members, facts, lambda: new_uuid(job.state)))
    return await grow(job, begun, grown, request["id"])


async def grow(job: JobContext, begun: dict[str, Any], grown: dict[str, Any], node: str) -> dict[str, Any]:
    """The storage cluster becomes what ``grown`` says. Passes the job's commit: what is new gets data only when it is sure to stay."""
    kind, planner, context = begun["type"], kinds.planner(begun["type"]), f"storage:{begun['id']}"
    members, layouts = [Member.model_validate(m) for m in begun["members"]], (begun["layout"], grown)
    sealed = await job.read("keys", lambda: seal(job.state, planner.more_secrets(*layouts), context))
    secrets = {**opened(job.state, begun["keys"], context), **opened(job.state, sealed, context)}
    results: dict[str, Any] = {}
    for number, phase in enumerate(planner.grow(members, layouts, secrets, results, begun["teller"])):
        await carry_out(job, kind, phase, results, (min(10 + 8 * number, 92), min(18 + 8 * number, 95)))
    layout = planner.finished(grown, results)
    await job.commit()
    for phase in planner.enter(layouts, results, begun["teller"]):
        await carry_out(job, kind, phase, results, (95, 98))
    roles = planner.roles(layout)

    def record() -> Changes:
        state: State = job.state
        cluster = state.store.require(StorageCluster, begun["id"])
        changed = [n for n in state.nodes_of_group(cluster.group) if n.name in roles and (n.id == node or n.storage)]
        nodes = [
            n.model_copy(update={"storage": "joined" if n.id == node else n.storage, "storage_roles": tuple(roles[n.name])})
            for n in changed
        ]
        return Changes(put=[cluster.model_copy(update={"layout": layout}), *nodes])

    await job.write("record", record)
    name = next(m.name for m in members if m.id == node)
    return {"node": node, "storage": begun["id"], "roles": roles[name], **results.get("health", {})}


register(Operation("node.join-storage", NodeJoinStorage, _prepare, _run, role="admin", plan=storage_plan.join))
