"""Operations: fail an instance over, and move one with node-local disks."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Settled, Undo
from atoll.model.errors import InvalidInput, NodeAnswers, NotMobile, WrongState
from atoll.model.objects import Instance, Node, Pool, Volume
from atoll.operations.common import PlacementView, check_pool_open, check_usable, frozen, needs_of
from atoll.operations.instance_migrate import migrate
from atoll.operations.instance_power import after_proof, bring_claim, instance_locks, plan_start, proof_of_death
from atoll.operations.parameters import access_of
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceFailover, InstanceMove
from atoll.operations.running import check_connections, check_runs, connect_disks, start_on, stop_on
from atoll.operations.state import State
from atoll.placement.choose import choose


def _check_mobile(state: State, instance: Instance) -> None:
    for _, volume in state.volumes_of(instance):
        if not state.driver(state.store.require(Pool, volume.pool)).mirrored:
            raise NotMobile(f"disk {volume.name} of {instance.name} is only on its node")


def plan_failover(state: State, instance: Instance, wanted: str | None, node_is_dead: bool) -> dict[str, Any]:
    """Stop where it runs (``stop``), or leave a dead node by proof, and start elsewhere. Errors: NotMobile, NeedsProof, NodeAnswers."""
    _check_mobile(state, instance)
    claim = state.claim(instance.id)
    holder = state.store.get(Node, claim.holder) if claim.holder else None
    if holder is None:
        if node_is_dead:
            raise NodeAnswers(f"instance {instance.name} is not held by any node; leave --node-is-dead away")
        return {**plan_start(state, instance, wanted, False, exclude=(instance.home,) if instance.home else ()), "stop": None}
    if not state.health.alive(holder.id):
        proof_of_death(state, instance, holder, node_is_dead)
        return {**plan_start(state, instance, wanted, True, exclude=(holder.id,)), "stop": None}
    if node_is_dead:
        raise NodeAnswers(f"node {holder.name} answers; it is not dead")
    target = state.store.find(Node, wanted) if wanted else None
    if target is not None and target.id == holder.id:
        raise InvalidInput(f"instance {instance.name} is on node {holder.name} already", hint="name another node")
    chosen = choose(PlacementView(state), needs_of(state, instance, exclude=[holder.id]), target)
    return {"release": None, "proof": None, "stop": holder.id, "node": chosen.id}


def _prepare_failover(state: State, target: str, request: InstanceFailover) -> Prepared:
    instance = state.store.find(Instance, target)
    plan = plan_failover(state, instance, request.node, request.node_is_dead)
    node = state.store.require(Node, plan["node"])
    return Prepared(
        frozen(request, id=instance.id, node=node.id),
        instance_locks(state, instance, node.id),
        f"fail instance {instance.name} over to {node.name}",
    )


async def _run_failover(job: JobContext, request: dict[str, Any]) -> Any:
    instance = request["id"]
    plan = await job.read(
        "plan",
        lambda: plan_failover(job.state, job.state.store.require(Instance, instance), request["node"], request["node_is_dead"]),
    )
    if plan["stop"]:
        job.progress(5, "stopping the guest")
        await stop_on(job, instance, plan["stop"], request["timeout"])
    else:
        job.progress(5, "making sure that it runs nowhere")
        await bring_claim(job, instance, plan)
    job.progress(50, "starting the guest")
    await start_on(job, instance, plan["node"], **after_proof(plan))
    name = await job.read("node name", lambda: job.state.store.require(Node, plan["node"]).name)
    return {"instance": instance, "node": name}


register(Operation("instance.failover", InstanceFailover, _prepare_failover, _run_failover))


# --- move: node-local disks go along ---


def plan_move(state: State, instance: Instance, node: str, pool: str | None) -> dict[str, Any]:
    """Which disks are copied where. Errors: WrongState, NodeUnavailable, PoolNotReachable."""
    target = check_usable(state, state.store.find(Node, node))
    claim = state.claim(instance.id)
    running = claim.holder is not None
    if running:
        source = check_runs(state, instance)
    else:
        homes = {v.node for _, v in state.volumes_of(instance) if v.node}
        if len(homes) != 1:
            raise WrongState(f"instance {instance.name} has no node-local disks", hint=f"atoll instance start {instance.name} -n NODE")
        source = check_usable(state, state.store.require(Node, homes.pop()))
    if source.id == target.id:
        raise InvalidInput(f"instance {instance.name} is on node {target.name} already", hint="name another node")
    chosen = state.resolve_pool(pool, target.group) if pool else None
    copies = []
    for _, volume in state.volumes_of(instance):
        old = state.store.require(Pool, volume.pool)
        if not state.driver(old).node_local:
            if target.group not in old.groups:
                check_pool_open(state, old, target.group)
            continue
        new = chosen or old
        check_pool_open(state, new, target.group)
        if not state.driver(new).node_local:
            raise InvalidInput(f"pool {new.name} is shared; move copies to node-local pools", hint="leave --pool away")
        copies.append(
            {
                "volume": volume.id,
                "name": volume.name,
                "size": volume.size,
                "old": volume.logical_id,
                "old_ref": state.ref(old, source).model_dump(mode="json"),
                "new_ref": state.ref(new, target).model_dump(mode="json"),
                "access": access_of(state, new, target.id),
            }
        )
    if not copies:
        raise WrongState(f"instance {instance.name} has no node-local disks", hint=f"atoll instance migrate {instance.name}")
    return {
        "source": source.id,
        "source_name": source.name,
        "target": target.id,
        "target_name": target.name,
        "generation": claim.generation + 1,
        "running": running,
        "copies": copies,
    }


def _prepare_move(state: State, target: str, request: InstanceMove) -> Prepared:
    instance = state.store.find(Instance, target)
    plan = plan_move(state, instance, request.node, request.pool)
    return Prepared(
        frozen(request, id=instance.id, node=plan["target"]),
        instance_locks(state, instance, plan["source"], plan["target"]),
        f"move instance {instance.name} with its disks from {plan['source_name']} to {plan['target_name']}",
    )


async def _run_move(job: JobContext, request: dict[str, Any]) -> Any:
    instance = request["id"]
    plan = await job.read(
        "plan", lambda: plan_move(job.state, job.state.store.require(Instance, instance), request["node"], request["pool"])
    )
    new_ids = {}
    for copy in plan["copies"]:
        spec = {"volume": copy["volume"], "name": copy["name"], "size": copy["size"], "options": {}}
        undo = Undo("volume.uncreate", {"ref": copy["new_ref"], "volume": copy["volume"]}, node=plan["target"], local=True)
        args = {"ref": copy["new_ref"], "spec": spec}
        new_ids[copy["volume"]] = await job.call(f"create copy/{copy['volume']}", plan["target"], "volume.create", args, undo=undo)
    if plan["running"]:
        try:
            result = await _move_running(job, instance, plan, new_ids)
        except Settled:
            await _drop_copies(job, plan)
            raise
        if result.get("cold_start"):
            # Both sides were lost before the target had run: the old copies are the disks, and it runs on them.
            await _drop_copies(job, plan)
            return result
    else:
        result = await _move_stopped(job, instance, plan, new_ids)

    def record() -> Changes:
        state: State = job.state
        put: list[Any] = []
        for copy in plan["copies"]:
            volume = state.store.require(Volume, copy["volume"])
            update = {"node": plan["target"], "logical_id": new_ids[volume.id], "pool": copy["new_ref"]["id"]}
            put.append(volume.model_copy(update=update))
        found = state.store.require(Instance, instance)
        put.append(found.model_copy(update={"home": plan["target"], "group": state.store.require(Node, plan["target"]).group}))
        return Changes(put=put)

    await job.write("record the disks' new place", record)
    for copy in plan["copies"]:
        args = {"ref": copy["old_ref"], "logical_id": copy["old"]}
        await job.call(f"delete old copy/{copy['volume']}", plan["source"], "volume.delete", args, deadline=120.0)
    return result


async def _drop_copies(job: JobContext, plan: dict[str, Any]) -> None:
    for copy in plan["copies"]:
        args = {"ref": copy["new_ref"], "volume": copy["volume"]}
        await job.call(f"drop copy/{copy['volume']}", plan["target"], "volume.uncreate", args, deadline=120.0)


async def _move_running(job: JobContext, instance: str, plan: dict[str, Any], new_ids: dict[str, str]) -> Any:
    """Alive: the hypervisor mirrors the disks while it moves the memory."""
    shared = await connect_disks(job, instance, plan["target"], suffix=" (shared)", expect_writer=True)
    moved = {copy["volume"]: copy for copy in plan["copies"]}
    disks = [disk for disk in shared if disk["connection"]["volume"] not in moved]
    request = [
        {"ref": c["new_ref"], "volume": v, "logical_id": new_ids[v], "size": c["size"], "access": c["access"]} for v, c in moved.items()
    ]
    answer = await job.look("connect copies", plan["target"], "disks.connect", {"disks": request}, accept=check_connections)
    disks += [{"pool": f["pool"], "connection": f["connection"], "access": moved[f["volume"]]["access"]} for f in answer]
    return await migrate(job, instance, plan, disks=disks, copy=sorted(moved))


async def _move_stopped(job: JobContext, instance: str, plan: dict[str, Any], new_ids: dict[str, str]) -> Any:
    """Not running: the images are copied over TLS, one after the other."""
    address = await job.read("target address", lambda: job.state.store.require(Node, plan["target"]).address)
    for number, copy in enumerate(plan["copies"]):
        volume = copy["volume"]
        serve = {"ref": copy["new_ref"], "logical_id": new_ids[volume], "volume": volume, "peer": plan["source_name"]}
        undo = Undo("copy.unserve", {"volume": volume}, node=plan["target"], dies=True)
        port = await job.call(f"serve copy/{volume}", plan["target"], "copy.serve", serve, undo=undo)
        push = {
            "ref": copy["old_ref"],
            "logical_id": copy["old"],
            "volume": volume,
            "host": address,
            "port": port,
            "server": plan["target_name"],
        }
        low = 5 + 85 * number / len(plan["copies"])
        span = (low, low + 85 / len(plan["copies"]))
        undo = Undo("copy.unpush", {"volume": volume}, node=plan["source"], dies=True)
        await job.call(f"copy/{volume}", plan["source"], "copy.push", push, undo=undo, deadline=3000.0, span=span)
        await job.call(f"end of copy/{volume}", plan["target"], "copy.unserve", {"volume": volume})
    await job.commit()
    return {"instance": instance, "node": plan["target_name"]}


register(Operation("instance.move", InstanceMove, _prepare_move, _run_move))
