"""Guests whose storage stopped them: in words, and what to type. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.model.messages import GuestStatus
from atoll.model.objects import Instance

if TYPE_CHECKING:
    from atoll.operations.index import Index

#: What the reasons of all such guests begin with.
IO_ERROR = "io-error"


def failed_pools(guest: GuestStatus, index: Index) -> dict[str, str]:
    """The pools whose storage stopped the guest, by name: ``full`` or ``failed``."""
    found: dict[str, str] = {}
    for volume, what in guest.disk_errors.items():
        record = index.volumes.get(volume)
        name = index.pool_name(record.pool) if record else ""
        if name and found.get(name) != "failed":
            found[name] = what
    return found


def why(guest: GuestStatus, index: Index) -> str:
    """The reason of a guest that stands still: with the pool's name, where its storage stopped it."""
    if not guest.disk_errors:
        return guest.reason
    pools = failed_pools(guest, index)
    words = [f"pool {name} is full" if what == "full" else f"pool {name} refused a read or write" for name, what in sorted(pools.items())]
    volumes = [index.volumes[v].name if v in index.volumes else v for v in sorted(guest.disk_errors)]
    return f"{IO_ERROR}: {' and '.join(words) or 'its storage failed'} (volume {', '.join(volumes)})"


def commands(item: Instance, guest: GuestStatus, index: Index) -> list[str]:
    """What to type for a guest that its storage stopped; nothing for any other."""
    if not guest.disk_errors and not guest.reason.startswith(IO_ERROR):
        return []
    pools = failed_pools(guest, index)
    looks = [f"atoll pool info {name}" if what == "full" else f"atoll pool check {name}" for name, what in sorted(pools.items())]
    return [*looks, f"atoll instance resume {item.name}"]


def stalled(item: Instance, node: str, index: Index) -> str:
    """Which of the pools that an instance's disks are in do not answer on the node with this id, in words; empty if all do."""
    report = index.state.health.report(node)
    if report is None or not report.stalled_pools:
        return ""
    pools = {record.pool for disk in item.disks if (record := index.volumes.get(disk.volume))}
    names = sorted(index.pool_name(pool) for pool in pools if pool in report.stalled_pools)
    return f"pool {', '.join(names)} does not answer on its node" if names else ""
