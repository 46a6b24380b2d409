"""A node that was dead is back: storage that has shut out its guests lets them in again."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.model.errors import UNKNOWN_OUTCOME, HostError, NodeUnavailable, NotFound, PoolUnavailable
from atoll.model.objects import Instance, Node, Pool
from atoll.operations.state import State


async def let_in_again(job: JobContext, node: str) -> tuple[list[str], dict[str, str]]:
    """For the job that readmits the node, when it has ended all that others may run now. The entries would stand for years, and go only
    after the node has said once more that nothing runs there which is not its own. Who was let in; and pools whose entries stay, with
    the reason: that harms nobody, and keeps no node away.
    """

    def plan() -> dict[str, Any]:
        state: State = job.state
        pools = []
        for pool in state.store.all(Pool):
            if state.driver(pool).fencing and not pool.observed:
                workers = state.pool_nodes(pool)
                ref = state.ref(pool, workers[0]).model_dump(mode="json") if workers else None
                pools.append((pool.name, workers[0].id if workers else "", ref))
        own = [i.id for i in state.store.all(Instance) if node in state.claim(i.id).nodes]
        return {"name": state.store.require(Node, node).name, "pools": pools, "own": own}

    decided = await job.read("pools that fence", plan)
    if not decided["pools"]:
        return [], {}
    guests = await job.look("what runs", node, "guest.list", {}, accept=lambda _: None, deadline=30.0, even_dead=True)
    there = {g["instance"] for g in guests if g["state"] != "gone"}
    try:
        there |= set(await job.look("what is mapped", node, "disks.mapped", {}, accept=lambda _: None, deadline=30.0, even_dead=True))
    except NotFound:
        pass  # an agent one version behind maps nothing
    if left := sorted(there - set(decided["own"])):
        words = f"{', '.join(left)} has disks open on {decided['name']}, and is not known to be its own"
        return [], {pool: words for pool, _, _ in decided["pools"]}
    let_in: list[str] = []
    kept: dict[str, str] = {}
    for pool, worker, ref in decided["pools"]:
        if not worker:
            kept[pool] = "no node that manages it answers"
            continue
        try:
            let_in += await job.call(f"let in/{pool}", worker, "pool.readmit", {"ref": ref, "node": decided["name"]}, deadline=40.0)
        except (NotFound, PoolUnavailable, HostError, NodeUnavailable, *UNKNOWN_OUTCOME) as error:
            kept[pool] = error.message
    return let_in, kept
