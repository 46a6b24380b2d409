"""Operation of a new master: settle a migration that the old one left behind, by looking at both sides (PROTOCOLS 1).

The journal of the job that began it may lack its last steps, so it is neither repeated nor undone: what counts is who has the guest.
"""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes
from atoll.model.errors import InvalidInput
from atoll.model.objects import Claim, Instance, Job, Migration, Node, Pool, Stored, Volume
from atoll.operations.instance_migrate import settle
from atoll.operations.instance_power import instance_locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import Nothing
from atoll.operations.state import State

OPERATION = "instance.settle"


def settle_job(state: State, number: int, instance: Instance, claim: Claim, source: str, target: str, now: float) -> tuple[Claim, Job]:
    """The claim that holds both sides, and the job that settles it; to be written together. ``claim`` has its new generation."""
    plan = {
        "source": source,
        "source_name": _name(state, source),
        "target": target,
        "target_name": _name(state, target),
        "generation": claim.generation,
    }
    job = Job(
        id=f"{number:010d}",
        operation=OPERATION,
        request={"id": instance.id, "plan": plan},
        locks=instance_locks(state, instance, source, target),
        who="master",
        created=now,
        summary=f"settle the migration of instance {instance.name} from {plan['source_name']} to {plan['target_name']}",
    )
    shared = claim.model_copy(update={"holder": source, "migration": Migration(target=target, job=number)})
    return shared, job


def _name(state: State, node: str) -> str:
    found = state.store.get(Node, node)
    return found.name if found else node


def _prepare(state: State, target: str, request: Nothing) -> Prepared:
    raise InvalidInput("only a new master begins this")


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    instance, plan = request["id"], request["plan"]
    await job.commit()
    local = await job.read("local disks", lambda: [v.id for v in _local(job.state, instance)])
    result = await settle(job, instance, plan, bool(local), go_on=False)
    if local and not result.get("cold_start"):

        def follow() -> Changes:
            put: list[Stored] = [v.model_copy(update={"node": plan["target"]}) for v in _local(job.state, instance) if v.id in local]
            return Changes(put=put)

        await job.write("the disks' new place", follow)
    return result


def _local(state: State, instance: str) -> list[Volume]:
    """Its disks that exist on one node only."""
    found = state.store.require(Instance, instance)
    return [v for _, v in state.volumes_of(found) if v.node and not state.driver(state.store.require(Pool, v.pool)).mirrored]


register(Operation(OPERATION, Nothing, _prepare, _run, public=False))
