"""Which columns the lists have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atoll.cli.output import Column, Row, Table


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


def _column(title: str, name: str, kind: str = "text", *, if_any: bool = False) -> Column:
    return Column(title, _field(name), kind, if_any)


def _held(row: Row) -> str | None:
    return f"job {row['hold']['job']}" if row.get("hold") else None


def _disks(key: str) -> Callable[[Row], list[Any]]:
    return lambda row: [disk.get(key) for disk in row.get("disks") or []]


def _once(key: str) -> Callable[[Row], list[Any]]:
    return lambda row: list(dict.fromkeys(disk.get(key) for disk in row.get("disks") or []))


HELD = Column("Held by", _held, if_any=True)

INSTANCES = Table(
    {
        "name": _column("Instance", "name"),
        "state": _column("State", "state"),
        "node": _column("Node", "node"),
        "secondary": _column("Secondary", "secondary", if_any=True),
        "memory": _column("Memory", "memory", "size"),
        "vcpus": _column("VCPUs", "vcpus", "number"),
        "disks": Column("Disks", _disks("size"), "size"),
        "pools": Column("Pool", _once("pool")),
        "drivers": Column("Driver", _once("driver")),
        "volumes": Column("Volumes", _disks("volume")),
        "disk_size": _column("Disk size", "disk_size", "size"),
        "reason": _column("Reason", "reason", "prose", if_any=True),
        "job": _column("Job", "job", "number"),
        "held": HELD,
        "tags": _column("Tags", "tags", if_any=True),
        "created": _column("Created", "created", "time"),
    },
    ("name", "state", "node", "secondary", "memory", "vcpus", "disks", "pools", "reason", "held"),
)

NODES = Table(
    {
        "name": _column("Node", "name"),
        "group": _column("Group", "group"),
        "state": _column("State", "state"),
        "memory_total": _column("Memory", "memory_total", "size"),
        "memory_free": _column("Free", "memory_free", "size"),
        "disk_total": _column("Disk", "disk_total", "size"),
        "disk_free": _column("DFree", "disk_free", "size"),
        "guests": _column("Guests", "guests", "number"),
        "address": _column("Address", "address"),
        "roles": _column("Roles", "roles"),
        "storage": _column("Storage", "storage_roles", if_any=True),
        "replica": _column("Copy of the store", "replica", if_any=True),
        "certificate": _column("Certificate", "certificate_expires", "day", if_any=True),
        "last_seen": _column("Last seen", "last_seen", "age"),
        "stalled": _column("Stalled pools", "stalled_pools", if_any=True),
        "held": HELD,
    },
    (
        "name",
        "group",
        "state",
        "memory_total",
        "memory_free",
        "disk_total",
        "disk_free",
        "guests",
        "address",
        "roles",
        "storage",
        "replica",
        "certificate",
        "stalled",
        "held",
    ),
)

GROUPS = Table(
    {
        "name": _column("Group", "name"),
        "nodes": _column("Nodes", "nodes"),
        "instances": _column("Instances", "instances", "number"),
        "pools": _column("Pools", "pools"),
        "accelerator": _column("Accelerator", "accelerator"),
        "cpu_model": _column("CPU model", "cpu_model"),
        "machine": _column("Machine", "machine"),
        "held": HELD,
    },
    ("name", "nodes", "instances", "pools", "accelerator", "cpu_model", "machine", "held"),
)

POOLS = Table(
    {
        "name": _column("Pool", "name"),
        "driver": _column("Driver", "driver"),
        "state": _column("State", "state"),
        "groups": _column("Groups", "groups"),
        "writers": _column("Writers", "writers"),
        "volumes": _column("Volumes", "volumes", "number"),
        "promised": _column("Promised", "promised", "size"),
        "total": _column("Total", "total", "size"),
        "free": _column("Free", "free", "size"),
        "reason": _column("Reason", "state_reason", "prose", if_any=True),
        "stalled": _column("Stalled on", "stalled", if_any=True),
        "held": HELD,
    },
    ("name", "driver", "state", "groups", "writers", "volumes", "promised", "total", "free", "reason", "stalled", "held"),
)

IMAGES = Table(
    {
        "name": _column("Image", "name"),
        "size": _column("Size", "size", "size"),
        "volume": _column("Volume", "volume"),
        "modified": _column("Modified", "modified", "time"),
        "writers": _column("Open for writing", "writers"),
        "snapshots": _column("Snapshots", "snapshots"),
        "parent": _column("Reads of", "parent", if_any=True),
    },
    ("name", "size", "volume", "modified", "writers", "snapshots", "parent"),
)

SNAPSHOTS = Table(
    {
        "name": _column("Snapshot", "name"),
        "id": _column("Id", "id"),
        "state": _column("State", "state"),
        "size": _column("Size", "size", "size"),
        "volume": Column("Volume", lambda row: f"{row['volume']} (deleted)" if row.get("volume_deleted") else row.get("volume")),
        "pool": _column("Pool", "pool"),
        "driver": _column("Driver", "driver"),
        "created": _column("Made", "created", "time"),
        "tags": _column("Tags", "tags", if_any=True),
        "held": HELD,
    },
    ("name", "id", "state", "size", "volume", "pool", "created", "held"),
)

VOLUMES = Table(
    {
        "name": _column("Volume", "name"),
        "id": _column("Id", "id"),
        "state": _column("State", "state"),
        "size": _column("Size", "size", "size"),
        "pool": _column("Pool", "pool"),
        "driver": _column("Driver", "driver"),
        "instance": _column("Instance", "instance"),
        "node": _column("Node", "node", if_any=True),
        "snapshot": _column("Made from", "snapshot", if_any=True),
        "tags": _column("Tags", "tags", if_any=True),
        "held": HELD,
    },
    ("name", "id", "state", "size", "pool", "instance", "node", "held"),
)


def _job_note(row: Row) -> str | None:
    if row.get("reason"):
        return str(row["reason"])
    error = row.get("error") or {}
    return error.get("message")


JOBS = Table(
    {
        "id": _column("Job", "id", "number"),
        "state": _column("State", "state"),
        "age": _column("Age", "age", "age"),
        "took": Column("Took", lambda row: row["ended"] - row["started"] if row.get("ended") and row.get("started") else None, "age"),
        "who": _column("Who", "who"),
        "summary": _column("What", "summary"),
        "operation": _column("Operation", "operation"),
        "note": Column("Note", _job_note, "prose", if_any=True),
    },
    ("id", "state", "age", "took", "who", "summary", "note"),
)

TOKENS = Table(
    {
        "name": _column("Token", "name"),
        "role": _column("Role", "role"),
        "created": _column("Made", "created", "time"),
        "expires": _column("Ends", "expires", "time"),
    },
    ("name", "role", "created", "expires"),
)


def _asked(row: Row) -> str:
    if row.get("event") == "job":
        return str(row.get("summary", ""))
    if row.get("event"):
        return f"{row.get('entries')} entries were {row['event']}: {row.get('why')}"
    return f"{row.get('method')} {row.get('path')}"


def _came(row: Row) -> str:
    return f"{row.get('state') or row.get('status') or ''}{' ' + str(row['code']) if row.get('code') else ''}"


AUDIT = Table(
    {
        "at": _column("When (UTC)", "at"),
        "who": _column("Who", "who"),
        "role": _column("Role", "role"),
        "from": _column("From", "from"),
        "what": Column("What", _asked),
        "result": Column("Result", _came),
        "job": _column("Job", "job", "number"),
        "request": _column("Request", "request"),
    },
    ("at", "who", "from", "what", "result", "job"),
)

STORAGES = Table(
    {
        "name": _column("Storage cluster", "name"),
        "type": _column("Type", "type"),
        "state": _column("State", "state"),
        "group": _column("Group", "group"),
        "nodes": _column("Nodes", "nodes"),
        "created": _column("Made", "created", "time"),
        "held": HELD,
    },
    ("name", "type", "state", "group", "nodes", "held"),
)

TABLES = {
    "storage": STORAGES,
    "instance": INSTANCES,
    "node": NODES,
    "group": GROUPS,
    "pool": POOLS,
    "image": IMAGES,
    "volume": VOLUMES,
    "snapshot": SNAPSHOTS,
    "job": JOBS,
}
