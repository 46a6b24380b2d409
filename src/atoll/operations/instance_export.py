"""Operation: write a stopped instance into one file of a node."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Settled, Undo
from atoll.model.errors import AlreadyExists, InUse, NodeUnavailable, NotFound, NotSupported, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Instance, Node, Pool
from atoll.model.units import format_size
from atoll.operations.common import frozen, locks
from atoll.operations.importing import DAY, LONG
from atoll.operations.instance_power import instance_locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceExport
from atoll.operations.running import check_runs, connect_disks, start_on, stop_on
from atoll.operations.state import State


def check_exportable(state: State, pool: Pool) -> None:
    """Errors: NotSupported where exports can neither be made of a pool's disks nor filled into them."""
    if not state.driver(pool).files:
        raise NotSupported(
            f"pool {pool.name} has no files, which exports are made of: its driver is {pool.driver}",
            hint="-t POOL of another driver for an import; to copy what is there: atoll snapshot create VOLUME",
        )


def _check_reach(state: State, instance: Instance, node: Node) -> None:
    """The node must reach every disk: what is written passes through no other. Errors: WrongState, NodeUnavailable, NotSupported."""
    if node.offline or not state.answers(node.id):
        raise NodeUnavailable(f"node {node.name} {'is offline' if node.offline else 'does not answer'}", hint="atoll node list")
    for _, volume in state.volumes_of(instance):
        pool = state.store.require(Pool, volume.pool)
        check_exportable(state, pool)
        if state.driver(pool).node_local and node.id not in (volume.node, volume.secondary):
            owner = state.store.require(Node, volume.node or "").name
            raise WrongState(f"volume {volume.name} is on node {owner}, and cannot be read on {node.name}", hint=f"export to {owner}:PATH")
        if node.group not in pool.groups:
            raise WrongState(f"node {node.name} cannot reach pool {pool.name}", hint="export to a node that can; atoll pool info")


def _runs(state: State, instance: Instance, shutdown: bool) -> Node | None:
    """Where it runs and must be stopped; None if it is stopped. Errors: InUse."""
    if state.claim(instance.id).holder is None and instance.desired == "stopped":
        return None
    if instance.desired == "stopped":
        raise InUse(f"the disks of {instance.name} are in use on its node", hint=f"atoll instance deactivate-disks {instance.name}")
    if not shutdown:
        raise InUse(
            f"instance {instance.name} runs: what is on its disks is not consistent",
            hint=f"--shutdown stops it for the export, or: atoll instance stop {instance.name}",
        )
    return check_runs(state, instance)


def _prepare(state: State, target: str, request: InstanceExport) -> Prepared:
    instance = state.store.find(Instance, target)
    node = state.store.find(Node, request.node)
    _check_reach(state, instance, node)
    where = _runs(state, instance, request.shutdown)
    held = instance_locks(state, instance, node.id, where.id if where else None)
    size = format_size(sum(volume.size for _, volume in state.volumes_of(instance)))
    return Prepared(
        frozen(request, id=instance.id, node=node.id),
        locks(held.shared, [*held.exclusive, f"export:{node.id}:{request.path}"]),
        f"export instance {instance.name} ({size}) to {node.name}:{request.path}",
        deadline=DAY,
    )


def _plan(state: State, request: dict[str, Any]) -> dict[str, Any]:
    instance, node = state.store.require(Instance, request["id"]), state.store.require(Node, request["node"])
    _check_reach(state, instance, node)
    where = _runs(state, instance, request["shutdown"])
    disks, kept = [], []
    for disk, volume in state.volumes_of(instance):
        pool = state.store.require(Pool, volume.pool)
        ref = state.ref(pool, node).model_dump(mode="json")
        disks.append({"ref": ref, "logical_id": volume.logical_id, "volume": volume.id})
        kept.append({"name": volume.name, "size": volume.size, "mode": disk.mode, "pool": pool.name})
    fields = {"name", "memory", "vcpus", "nics", "boot", "os", "os_parameters", "os_scripts", "tags"}
    what = instance.model_dump(mode="json", include=fields)
    manifest = {"id": new_id("export", state.rng), "created": state.clock.now(), "instance": what, "disks": kept}
    return {"manifest": manifest, "disks": disks, "stop": where.id if where else None, "node_name": node.name}


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    instance, node, path = request["id"], request["node"], request["path"]
    plan = await job.read("plan", lambda: _plan(job.state, request))
    ident = plan["manifest"]["id"]
    check = {"path": path, "overwrite": request["overwrite"]}
    await job.look("look at the place", node, "export.check", check, accept=lambda answer: None)
    if plan["stop"]:
        job.progress(1, "stopping the guest for the export")
        await stop_on(job, instance, plan["stop"], request["timeout"])
    # Refuses a disk that somebody writes.
    await connect_disks(job, instance, node, suffix=" for the export")
    undo = Undo("export.discard", {"path": path, "id": ident}, node=node, local=True, deadline=90.0)
    args = {"path": path, "manifest": plan["manifest"], "disks": plan["disks"]}
    written = await job.call("write the export", node, "export.write", args, undo=undo, deadline=LONG, span=(5.0, 90.0))
    if plan["stop"]:
        job.progress(90, "starting the guest again")
        await start_on(job, instance, plan["stop"], span=(90.0, 98.0))
    await job.commit()
    try:
        await job.call("give it its name", node, "export.place", {**check, "id": ident})
    except (AlreadyExists, NotFound) as refusal:
        await job.call("remove it", node, "export.discard", {"path": path, "id": ident})
        raise Settled(refusal) from refusal
    return {"instance": instance, "node": plan["node_name"], "path": path, "size": written["size"]}


register(Operation("instance.export", InstanceExport, _prepare, _run))
