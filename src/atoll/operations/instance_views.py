"""What people and programs see of instances: the wish, the claim and the node's report, made one."""

from __future__ import annotations

from atoll.model.messages import GuestStatus
from atoll.model.objects import Disk, Instance, Job
from atoll.operations import trouble
from atoll.operations.index import Index, Row
from atoll.operations.parameters import access_in


def instance_state(item: Instance, index: Index) -> tuple[str, str]:
    """One word and a reason: what was asked for, who may run it, and what its node says, together.

    running, stopped, starting, stopping, migrating, paused, hung, unreachable (its node does not answer) or error.
    """
    claim = index.state.claim(item.id)
    job = index.busy.get(item.resource)
    wanted = item.desired == "running"
    if claim.migration:
        return "migrating", f"to {index.node_name(claim.migration.target)}, job {claim.migration.job}"
    if claim.holder is None:
        if job and wanted:
            return "starting", f"job {job.number}"
        return ("error", "should run, but no node runs it") if wanted else ("stopped", item.stopped_by)
    if index.state.proved_dead(claim.holder):
        return "unreachable", f"its node {index.node_name(claim.holder)} is dead"
    if not index.alive.get(claim.holder, False):
        return "unreachable", f"its node {index.node_name(claim.holder)} does not answer"
    guest = index.guests.get((claim.holder, item.id))
    return _guest_state(item, guest, index, job)


def _guest_state(item: Instance, guest: GuestStatus | None, index: Index, job: Job | None) -> tuple[str, str]:
    holder, wanted = index.state.claim(item.id).holder or "", item.desired == "running"
    state = guest.state if guest else "gone"
    reason = guest.reason if guest else ""
    if state == "running":
        if wanted:
            return "running", trouble.stalled(item, holder, index)
        return ("stopping", f"job {job.number}") if job else ("running", "should be stopped")
    if state in ("paused", "hung"):
        return state, trouble.why(guest, index) if guest else reason
    if state in ("incoming", "migrated"):
        return "migrating", reason
    if job and wanted:
        return "starting", f"job {job.number}"
    if state == "shutdown":
        return "stopped", item.stopped_by or "by the guest"
    return ("error", f"should run on {index.node_name(holder)}, but does not") if wanted else ("stopped", item.stopped_by)


def instance(item: Instance, index: Index) -> Row:
    """An instance with its disks, network cards and claim. ``node`` runs it, or ran it last."""
    claim = index.state.claim(item.id)
    state, reason = instance_state(item, index)
    job = index.busy.get(item.resource)
    running = index.guests.get((claim.holder, item.id)) if claim.holder else None
    guest = running if state == "paused" else None
    disks = [_disk(number, disk, index, item, running) for number, disk in enumerate(item.disks)]
    return {
        "name": item.name,
        "id": item.id,
        "state": state,
        "reason": reason,
        "desired": item.desired,
        "node": index.node_name(claim.holder or item.home),
        "secondary": index.node_name(item.secondary),
        "group": index.groups[item.group].name if item.group in index.groups else item.group,
        "memory": item.memory,
        "vcpus": item.vcpus,
        "hypervisor": item.hypervisor,
        "os": item.os,
        "os_parameters": item.os_parameters,
        "os_scripts": item.os_scripts,
        "boot": item.boot.model_dump(mode="json"),
        "pin": item.pin.model_dump(mode="json"),
        "disks": disks,
        "disk_size": sum(disk["size"] or 0 for disk in disks),
        "nics": [nic.model_dump(mode="json") for nic in item.nics],
        "generation": claim.generation,
        "claim": {
            "holder": index.node_name(claim.holder),
            "generation": claim.generation,
            "migration": {"target": index.node_name(claim.migration.target), "job": claim.migration.job} if claim.migration else None,
        },
        "job": job.number if job else None,
        "created": item.created,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
        "commands": trouble.commands(item, guest, index) if guest else [],
    }


def _disk(number: int, disk: Disk, index: Index, item: Instance, guest: GuestStatus | None) -> Row:
    """``access``: how it is attached now (None: it is not, or its node does not tell), ``access_way`` by what, and ``access_next`` how it
    will be at the next start in the group."""
    record = index.volumes.get(disk.volume)
    driver = index.driver(record.pool) if record else None
    return {
        "index": number,
        "volume": disk.volume,
        "name": record.name if record else None,
        "pool": index.pool_name(record.pool) if record else None,
        "driver": driver.name if driver else None,
        "size": record.size if record else None,
        "access": guest.access.get(disk.volume) if guest else None,
        "access_way": guest.ways.get(disk.volume) if guest else None,
        "access_next": access_in(index.state, driver, item.group) if driver else None,
        "mode": disk.mode,
        "slot": disk.slot,
        "node": index.node_name(record.node) if record else None,
    }
