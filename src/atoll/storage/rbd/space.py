"""The space of a Ceph pool, in bytes that guests can use: its copies are taken off already."""

from __future__ import annotations

from typing import Any

from atoll.model.errors import PoolFull, PoolUnavailable
from atoll.model.messages import Space
from atoll.storage.rbd import connections
from atoll.storage.rbd.connections import Link
from atoll.storage.rbd.options import RbdOptions


def ask(link: Link, prefix: str, **more: str) -> Any:
    """A question to the monitors. Raises rados.Error."""
    return connections.ask(link.cluster, prefix, **more)


def space(link: Link, options: RbdOptions) -> Space:
    """Total and free bytes of the pool that takes the data; a quota counts. Errors: PoolUnavailable (Ceph has no figures)."""
    told = link.recent("df", lambda: ask(link, "df", detail="detail"))
    data = options.data_pool or options.pool
    stats = next((pool["stats"] for pool in told["pools"] if pool["name"] == data), None)
    if stats is None or not told["stats"]["total_bytes"]:
        raise PoolUnavailable(f"Ceph has no figures of pool {data}: no manager is active, or it is new", hint="ceph -s")
    used, free = int(stats["stored"]), int(stats["max_avail"])
    if quota := int(stats.get("quota_bytes", 0)):
        free = min(free, max(0, quota - used))
    return Space(total=used + free, free=free)


def refuse_full(link: Link, options: RbdOptions) -> None:
    """Who opens an image of a full pool for writing waits until there is room: say so instead. Errors: PoolFull."""
    pools = [pool for pool in ask(link, "osd dump")["pools"] if pool["pool_name"] in (options.pool, options.data_pool)]
    if full := [pool["pool_name"] for pool in pools if "full" in pool["flags_names"].split(",")]:
        raise PoolFull(f"Ceph pool {full[0]} is full: nobody can open an image to write it", hint="ceph df; docs/howto/full-pool.md")


def details(link: Link, options: RbdOptions) -> dict[str, str]:
    """Health, copies, and which other pools take their space from the same OSDs."""
    found = {"health": str(link.recent("health", lambda: ask(link, "health"))["status"]), "Ceph user": f"client.{options.user}"}
    pools = link.recent("osd dump", lambda: ask(link, "osd dump"))["pools"]
    data = next((p for p in pools if p["pool_name"] == (options.data_pool or options.pool)), None)
    if data is not None:
        found["copies"] = f"{data['size']}, at least {data['min_size']} to write"
        same = sorted(p["pool_name"] for p in pools if p["crush_rule"] == data["crush_rule"] and p["pool"] != data["pool"])
        found["shares its OSDs with"] = ", ".join(same) or "no other pool"
    return found
