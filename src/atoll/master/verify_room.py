"""What ``cluster verify`` finds of room: pools that promise more than they have, and nodes whose guests would not fit elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from atoll.api.leader import Finding
from atoll.model.messages import Space
from atoll.model.objects import Instance, Node, Pool, Volume
from atoll.model.units import format_size
from atoll.operations.state import State

#: Shares of a pool that are free when it is low, and when it is nearly full.
LOW, VERY_LOW = 0.10, 0.03


def room(state: State, spaces: Mapping[tuple[str, str], Space]) -> list[Finding]:
    """All findings. ``spaces``: see ``SpaceMonitor``."""
    return [*_pools(state, spaces), *_spare(state)]


def _pools(state: State, spaces: Mapping[tuple[str, str], Space]) -> Iterator[Finding]:
    for (pool_id, node_id), space in sorted(spaces.items()):
        pool, node = state.store.get(Pool, pool_id), state.store.get(Node, node_id)
        if pool is None or not space.total:
            continue
        here = [v for v in state.store.all(Volume) if v.pool == pool_id and (not node_id or node_id in (v.node, v.secondary))]
        promised = sum(v.size for v in here)
        about = f"{pool.name} on {node.name}" if node else pool.name
        words = f"{format_size(space.free)} of {format_size(space.total)} are free, {len(here)} volumes may take {format_size(promised)}"
        commands = (f"atoll pool info {pool.name}",)
        if space.free < space.total * VERY_LOW:
            yield Finding("error", "pool is nearly full", about, f"{words}; guests stand still when it is", None, commands)
        elif space.free < space.total * LOW:
            yield Finding("warning", "pool has little room", about, words, None, commands)
        elif promised > space.total:
            yield Finding("info", "pool promises more than it has", about, f"{words}; images grow as guests write", None, commands)


def _spare(state: State) -> Iterator[Finding]:
    """Would the guests of each node fit on the others of its group? Of guests whose disks only their node has nobody asks."""
    usable = [n for n in state.store.all(Node) if "vm" in n.roles and not n.offline and not n.drained and state.answers(n.id)]
    for node in usable:
        others = [n for n in usable if n.group == node.group and n.id != node.id]
        running = [i for i in state.store.all(Instance) if state.claim(i.id).holder == node.id and i.desired == "running"]
        mine = [i for i in running if _mobile(state, i)]
        if not others or not mine:
            continue
        free = {n.id: _free(state, n) for n in others}
        left = [i for i in sorted(mine, key=lambda i: i.memory, reverse=True) if not _placed(i, free)]
        if left:
            why = f"{len(left)} of its {len(mine)} instances, such as {left[0].name}, would find no memory elsewhere"
            yield Finding("warning", "no room if the node fails", node.name, why, None, ("atoll node list",))


def _mobile(state: State, instance: Instance) -> bool:
    # Records may be broken; another finding says so.
    volumes = [state.store.get(Volume, disk.volume) for disk in instance.disks]
    pools = [state.store.get(Pool, v.pool) if v else None for v in volumes]
    return all(pool is not None and state.driver(pool).mirrored for pool in pools)


def _free(state: State, node: Node) -> int:
    report = state.health.report(node.id)
    return report.memory_free if report else 0


def _placed(instance: Instance, free: dict[str, int]) -> bool:
    """Put it where most is free; whether it fits."""
    best = max(free, key=lambda node: free[node])
    if free[best] < instance.memory:
        return False
    free[best] -= instance.memory
    return True
