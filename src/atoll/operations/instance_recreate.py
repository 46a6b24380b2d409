"""Operation: make missing images of an instance's disks again."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo
from atoll.model.errors import InUse
from atoll.model.objects import Instance, Pool, Volume, VolumeState
from atoll.operations.common import find_disk, frozen
from atoll.operations.instance_power import instance_locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Recreate
from atoll.operations.state import State


def _prepare_recreate(state: State, target: str, request: Recreate) -> Prepared:
    instance = state.store.find(Instance, target)
    if state.claim(instance.id).holder is not None:
        raise InUse(f"instance {instance.name} runs, or a node holds its claim", hint=f"atoll instance stop {instance.name}")
    chosen = request.disks or list(range(len(instance.disks)))
    volumes = [instance.disks[find_disk(state, instance, index, None)].volume for index in chosen]
    return Prepared(
        frozen(request, id=instance.id, volumes=volumes), instance_locks(state, instance), f"make missing disks of {instance.name} again"
    )


async def _run_recreate(job: JobContext, request: dict[str, Any]) -> Any:
    made = []
    for volume in request["volumes"]:

        def where(volume: str = volume) -> dict[str, Any]:
            state: State = job.state
            find_disk(state, state.store.require(Instance, request["id"]), None, volume)
            found = state.store.require(Volume, volume)
            pool = state.store.require(Pool, found.pool)
            worker = state.pool_node(pool, owner=found.node)
            ref = state.ref(pool, worker).model_dump(mode="json")
            return {
                "worker": worker.id,
                "ref": ref,
                "name": found.name,
                "size": found.size,
                "logical_id": found.logical_id,
                "local": state.driver(pool).node_local,
            }

        found = await job.read(f"where/{volume}", where)
        args = {"ref": found["ref"], "logical_id": found["logical_id"]}
        if await job.call(f"look/{volume}", found["worker"], "volume.stat", args) is not None:
            continue
        spec = {"volume": volume, "name": found["name"], "size": found["size"], "options": {}}
        undo = Undo("volume.uncreate", {"ref": found["ref"], "volume": volume}, node=found["worker"], local=found["local"])
        logical_id = await job.call(
            f"create image/{volume}", found["worker"], "volume.create", {"ref": found["ref"], "spec": spec}, undo=undo, deadline=3600.0
        )

        def record(volume: str = volume, logical_id: str = logical_id) -> Changes:
            kept = job.state.store.require(Volume, volume)
            return Changes(put=[kept.model_copy(update={"logical_id": logical_id, "state": VolumeState.IN_USE})])

        await job.write(f"record/{volume}", record)
        made.append(volume)
    return {"instance": request["id"], "made": made}


register(Operation("instance.recreate", Recreate, _prepare_recreate, _run_recreate))
