"""Operations on node groups, and the cluster's own settings."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes
from atoll.model.errors import InUse, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Cluster, Group, Instance, MachinePin, Node, Pool, StorageCluster
from atoll.operations.common import check_new_name, frozen, locks, name_lock, prepare_tags, run_tags
from atoll.operations.parameters import answer, split
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import AssignNodes, ClusterModify, GroupAdd, GroupModify, Nothing, Rename, TagsChange
from atoll.operations.state import State
from atoll.operations.storage_options import check_cluster, check_group, merged
from atoll.storage import registry as drivers


def _prepare_add(state: State, target: str, request: GroupAdd) -> Prepared:
    check_new_name(state, Group, request.name)
    split(request.driver_options, pools=False)
    return Prepared(frozen(request), locks(exclusive=[name_lock(Group, request.name)]), f"add group {request.name}")


async def _run_add(job: JobContext, request: dict[str, Any]) -> Any:
    ident = await job.read("id", lambda: new_id("group", job.state.rng))
    pin = {"cpu_model": request["cpu_model"], "accelerator": request["accelerator"], "machine": request["machine"]}
    parameters = merged({}, request.get("driver_options", {}))
    new = Group(id=ident, name=request["name"], pin=MachinePin(**{k: v for k, v in pin.items() if v}), disk_parameters=parameters)
    await job.commit()
    await job.write("record", lambda: Changes(put=[new]))
    return {"group": ident, "name": request["name"]}


register(Operation("group.add", GroupAdd, _prepare_add, _run_add, role="admin"))


def _prepare_modify(state: State, target: str, request: GroupModify) -> Prepared:
    group = state.store.find(Group, target)
    pools = {}
    for driver, name in request.default_pools.items():
        drivers.info(driver)
        pools[driver] = state.resolve_pool(name).id if name else ""
    split(request.driver_options, pools=False)
    check_group(state, group, request.storage_options)
    return Prepared(frozen(request, id=group.id, default_pools=pools), locks(exclusive=[group.resource]), f"modify group {group.name}")


async def _run_modify(job: JobContext, request: dict[str, Any]) -> Any:
    def change() -> Changes:
        group = job.state.store.require(Group, request["id"])
        pin = {k: request[k] for k in ("cpu_model", "accelerator", "machine") if request[k] is not None}
        pools = {k: v for k, v in {**group.default_pools, **request["default_pools"]}.items() if v}
        options = merged(group.storage_options, request.get("storage_options", {}))
        parameters = merged(group.disk_parameters, request.get("driver_options", {}))
        update = {"default_pools": pools, "storage_options": options, "disk_parameters": parameters}
        return Changes(put=[group.model_copy(update={"pin": group.pin.model_copy(update=pin), **update})])

    await job.commit()
    await job.write("change", change)
    told = await job.read("what it means", lambda: answer(job.state, request.get("driver_options", {})))
    return {"group": request["id"], **told}


register(Operation("group.modify", GroupModify, _prepare_modify, _run_modify, role="admin"))


def _prepare_remove(state: State, target: str, request: Nothing) -> Prepared:
    group = state.store.find(Group, target)
    nodes = state.nodes_of_group(group.id)
    if nodes:
        names = ", ".join(node.name for node in nodes)
        raise InUse(f"group {group.name} has nodes: {names}", hint=f"atoll group assign-nodes OTHER {nodes[0].name}")
    if len(state.store.all(Group)) == 1:
        raise InUse("the last group cannot be removed", hint="atoll group add OTHER")
    if group.storage:
        made = state.store.get(StorageCluster, group.storage)
        if made is not None and made.layout:
            raise InUse(f"group {group.name} has the storage cluster {made.name}", hint=f"atoll storage info {made.name}")
    pools = [pool for pool in state.store.all(Pool) if group.id in pool.groups]
    held = [group.resource, *(pool.resource for pool in pools)]
    return Prepared({"id": group.id}, locks(exclusive=held), f"remove group {group.name}")


async def _run_remove(job: JobContext, request: dict[str, Any]) -> Any:
    def remove() -> Changes:
        state: State = job.state
        pools = [p for p in state.store.all(Pool) if request["id"] in p.groups]
        cleared = [p.model_copy(update={"groups": tuple(g for g in p.groups if g != request["id"])}) for p in pools]
        group = state.store.require(Group, request["id"])
        marked = state.store.get(StorageCluster, group.storage) if group.storage else None
        return Changes(put=[*cleared], delete=[group, *([marked] if marked else [])])

    await job.commit()
    await job.write("remove", remove)
    return {"group": request["id"]}


register(Operation("group.remove", Nothing, _prepare_remove, _run_remove, role="admin"))


def _prepare_rename(state: State, target: str, request: Rename) -> Prepared:
    group = state.store.find(Group, target)
    check_new_name(state, Group, request.new_name)
    held = [group.resource, name_lock(Group, request.new_name)]
    return Prepared(frozen(request, id=group.id), locks(exclusive=held), f"rename group {group.name} to {request.new_name}")


async def _run_rename(job: JobContext, request: dict[str, Any]) -> Any:
    def rename() -> Changes:
        return Changes(put=[job.state.store.require(Group, request["id"]).model_copy(update={"name": request["new_name"]})])

    await job.commit()
    await job.write("rename", rename)
    return {"group": request["id"], "name": request["new_name"]}


register(Operation("group.rename", Rename, _prepare_rename, _run_rename, role="admin"))


def _prepare_assign(state: State, target: str, request: AssignNodes) -> Prepared:
    group = state.store.find(Group, target)
    # Somebody may be named twice, by name and by id.
    nodes = list({node.id: node for node in (state.store.find(Node, name) for name in request.nodes)}.values())
    for node in nodes:
        for instance in state.store.all(Instance):
            if node.id in state.claim(instance.id).nodes and node.group != group.id:
                raise InUse(f"node {node.name} runs instance {instance.name} of another group", hint=f"atoll node evacuate {node.name}")
        if node.group == group.id:
            continue
        if node.storage in ("joined", "stopped"):
            raise InUse(f"node {node.name} has a part in its group's storage cluster", hint=f"atoll node modify {node.name} --drain")
        if group.storage and not node.offline:
            raise WrongState(
                f"group {group.name} has a storage cluster: only a node that is offline can be put into it",
                hint=f"atoll node modify {node.name} --offline yes",
            )
    held = [group.resource, *(node.resource for node in nodes)]
    return Prepared(
        {"id": group.id, "nodes": [n.id for n in nodes]},
        locks(exclusive=held),
        f"assign {', '.join(n.name for n in nodes)} to group {group.name}",
    )


async def _run_assign(job: JobContext, request: dict[str, Any]) -> Any:
    def assign() -> Changes:
        nodes = [job.state.store.require(Node, n) for n in request["nodes"]]
        # A node that changes its group prepares the pools of the new one before it takes instances.
        moved = [n for n in nodes if n.group != request["id"]]
        return Changes(put=[n.model_copy(update={"group": request["id"], "ready": False, "storage": ""}) for n in moved])

    await job.commit()
    await job.write("assign", assign)
    return {"group": request["id"], "nodes": request["nodes"]}


register(Operation("group.assign-nodes", AssignNodes, _prepare_assign, _run_assign, role="admin"))
register(Operation("group.tags", TagsChange, prepare_tags(Group), run_tags(Group), role="admin"))


def _prepare_cluster(state: State, target: str, request: ClusterModify) -> Prepared:
    split(request.driver_options, pools=True)
    check_cluster(state, request.storage_options)
    if request.hypervisor and request.hypervisor != state.cluster.hypervisor and state.store.all(Instance):
        raise WrongState("the hypervisor can change only while there are no instances", hint="atoll instance list")
    return Prepared(frozen(request), locks(exclusive=["cluster:cluster"]), "modify the cluster")


async def _run_cluster(job: JobContext, request: dict[str, Any]) -> Any:
    def change() -> Changes:
        cluster = job.state.cluster
        defaults, parameters = split(request["driver_options"], pools=True)
        update: dict[str, Any] = {"driver_options": merged(cluster.driver_options, defaults)}
        update["disk_parameters"] = merged(cluster.disk_parameters, parameters)
        update["storage_options"] = merged(cluster.storage_options, request.get("storage_options", {}))
        if request["hypervisor"]:
            update["hypervisor"] = request["hypervisor"]
        return Changes(put=[cluster.model_copy(update=update)])

    await job.commit()
    await job.write("change", change)

    def told() -> dict[str, Any]:
        return answer(job.state, split(request["driver_options"], pools=True)[1])

    return {"cluster": "cluster", **await job.read("what it means", told)}


register(Operation("cluster.modify", ClusterModify, _prepare_cluster, _run_cluster, role="admin"))
register(Operation("cluster.tags", TagsChange, prepare_tags(Cluster), run_tags(Cluster), role="admin"))
