"""What lies in a pool, as its storage tells it now: other people's images included. A question, no operation."""

from __future__ import annotations

from typing import Any

from atoll.model.errors import AtollError, NotSupported, PoolNotReachable
from atoll.model.messages import ImageSeen
from atoll.model.objects import Pool, Volume
from atoll.operations.state import State
from atoll.rpc.agents import Agents


async def pool_images(state: State, agents: Agents, target: str) -> list[dict[str, Any]]:
    """All images of a pool with the volumes that they are, and who has them open; asked of the pool's nodes in turn.

    Errors: NotFound, NotSupported, PoolNotReachable; the last one's when none can tell.
    """
    pool = state.store.find(Pool, target)
    driver = state.driver(pool)
    if not driver.observe:
        raise NotSupported(f"driver {driver.name} does not tell of other people's images", hint="atoll volume list; atoll cluster verify")
    last: AtollError = PoolNotReachable(f"no node that answers can look at pool {pool.name}", hint="atoll node list")
    names = {volume.logical_id: volume.name for volume in state.store.all(Volume) if volume.pool == pool.id}
    for node in state.pool_nodes(pool):
        try:
            ref = state.ref(pool, node).model_dump(mode="json")
            told = [ImageSeen(**image) for image in await agents.ask(node.id, "pool.images", {"ref": ref}, deadline=40.0)]
        except AtollError as error:
            last = error
            continue
        return [{**image.model_dump(mode="json", exclude={"volume"}), "volume": names.get(image.name)} for image in told]
    raise last
