"""Disks that a node of a storage cluster gives later."""

from __future__ import annotations

from typing import Any

from atoll.deploy import registry as kinds
from atoll.deploy.contract import Member
from atoll.jobs.context import JobContext
from atoll.model.errors import NodeUnavailable, WrongState
from atoll.model.objects import Group, Node
from atoll.operations import storage_plan
from atoll.operations.common import frozen, locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.state import State
from atoll.operations.storage_join import begun_with, grow, teller_of
from atoll.operations.storage_options import member
from atoll.operations.storage_requests import NodeAddStorageDisks
from atoll.operations.storage_rest import cluster_of
from atoll.operations.storages import look, new_uuid, nil_uuid


def _prepare(state: State, target: str, request: NodeAddStorageDisks) -> Prepared:
    node = state.store.find(Node, target)
    cluster = cluster_of(state, node)
    if cluster is None or node.storage not in ("joined", "stopped"):
        raise WrongState(f"node {node.name} has no part in a storage cluster", hint=f"atoll storage join {node.name}")
    if node.storage == "stopped" or not state.answers(node.id):
        raise NodeUnavailable(f"node {node.name} {'is offline' if node.offline else 'does not answer'}", hint="atoll node list")
    if teller_of(state, cluster) is None:
        raise NodeUnavailable(f"no node that could tell of {cluster.name} answers", hint="atoll node list")
    kinds.planner(cluster.type).with_disks(cluster.layout, node.name, request.disks, nil_uuid)
    group = state.store.require(Group, node.group)
    text = f"add {', '.join(request.disks)} of node {node.name} to the storage cluster {cluster.name}"
    return Prepared(frozen(request, id=node.id), locks([group.resource], [node.resource, cluster.resource]), text)


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    def begin() -> dict[str, Any]:
        state: State = job.state
        node = state.store.require(Node, request["id"])
        found = begun_with(state, node)
        them = [member(state, found["type"], state.store.require(Group, node.group), node).model_dump(mode="json")]
        return {**found, "members": them, "name": node.name}

    begun = await job.read("storage", begin)
    planner, name = kinds.planner(begun["type"]), begun["name"]
    grown = await job.read("layout", lambda: planner.with_disks(begun["layout"], name, request["disks"], lambda: new_uuid(job.state)))
    if grown == begun["layout"]:
        return {"node": request["id"], "unchanged": True}
    members = [Member.model_validate(m) for m in begun["members"]]
    await look(job, planner, begun["type"], members, begun["layout"], disks=request["disks"])
    return await grow(job, begun, grown, request["id"])


register(Operation("node.add-storage-disks", NodeAddStorageDisks, _prepare, _run, role="admin", plan=storage_plan.add_disks))
