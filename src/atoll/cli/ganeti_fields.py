"""Ganeti's field names, titles and status words for our rows (``gnt-instance list -o name,pnode,status``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from atoll.cli.output import Column, Row, Table
from atoll.model.errors import InvalidInput


class GanetiTable(Table):
    """A table that also knows fields with a number, such as ``disk.size/0``."""

    def column(self, name: str, sample: Row | None) -> Column:
        match = re.fullmatch(r"(disk|nic)\.(\w+)/(\d+)", name)
        if match:
            kind = "size" if match[2] == "size" else "text"
            return Column(
                f"{match[1].capitalize()}_{match[2]}/{match[3]}",
                _numbered(match[1] + "s", _INNER.get(match[2], match[2]), int(match[3])),
                kind,
            )
        if name not in self.columns:
            raise InvalidInput(f"there is no field {name!r}", hint=f"fields: {', '.join(sorted(self.columns))}")
        return self.columns[name]


_INNER = {"uuid": "volume"}


def _numbered(many: str, field: str, number: int) -> Callable[[Row], Any]:
    def get(row: Row) -> Any:
        items = row[many]
        return items[number].get(field) if number < len(items) else None

    return get


def _field(name: str, title: str, kind: str = "text") -> Column:
    return Column(title, lambda row: row.get(name), kind)


def _each(many: str, field: str) -> Callable[[Row], list[Any]]:
    return lambda row: [item.get(field) for item in row[many]]


def instance_status(row: Row) -> str:
    """Ganeti's status of an instance."""
    state, wanted = row["state"], row["desired"] == "running"
    if state == "unreachable":
        return "ERROR_nodedown"
    if state in ("running", "starting", "migrating", "paused", "hung", "stopping"):
        return "running" if wanted else "ERROR_up"
    if state == "stopped":
        return "USER_down" if row["reason"] == "by the guest" else "ADMIN_down"
    return "ERROR_down"


def _template(row: Row) -> str:
    drivers = list(dict.fromkeys(disk["driver"] for disk in row["disks"]))
    return {0: "diskless", 1: str(drivers[0]) if drivers else ""}.get(len(drivers), "mixed")


def _up(row: Row) -> bool:
    return row["state"] in ("running", "migrating", "paused", "hung", "stopping")


INSTANCE = GanetiTable(
    {
        "name": _field("name", "Instance"),
        "uuid": _field("id", "UUID"),
        "hypervisor": _field("hypervisor", "Hypervisor"),
        "os": _field("os", "OS"),
        "pnode": _field("node", "Primary_node"),
        "snodes": Column("Secondary_Nodes", lambda row: [row["secondary"]] if row["secondary"] else []),
        "pnode.group": _field("group", "PrimaryNodeGroup"),
        "status": Column("Status", instance_status),
        "admin_state": Column("InstanceState", lambda row: "up" if row["desired"] == "running" else "down"),
        "oper_state": Column("Running", _up),
        "be/memory": _field("memory", "ConfigMaxMem", "size"),
        "be/maxmem": _field("memory", "ConfigMaxMem", "size"),
        "be/vcpus": _field("vcpus", "ConfigVCPUs", "number"),
        "oper_ram": Column("Memory", lambda row: row["memory"] if _up(row) else None, "size"),
        "memory": Column("Memory", lambda row: row["memory"] if _up(row) else None, "size"),
        "oper_vcpus": Column("VCPUs", lambda row: row["vcpus"] if _up(row) else None, "number"),
        "vcpus": _field("vcpus", "VCPUs", "number"),
        "disk_template": Column("Disk_template", _template),
        "disk_usage": _field("disk_size", "DiskUsage", "size"),
        "disk.count": Column("Disks", lambda row: len(row["disks"]), "number"),
        "disk.sizes": Column("Disk_sizes", _each("disks", "size"), "size"),
        "disk.names": Column("Disk_names", _each("disks", "name")),
        "disk.uuids": Column("Disk_UUIDs", _each("disks", "volume")),
        "nic.count": Column("NICs", lambda row: len(row["nics"]), "number"),
        "nic.macs": Column("NIC_MACs", _each("nics", "mac")),
        "nic.modes": Column("NIC_modes", _each("nics", "mode")),
        "nic.links": Column("NIC_links", _each("nics", "link")),
        "tags": _field("tags", "Tags"),
        "ctime": _field("created", "CTime", "time"),
    },
    ("name", "hypervisor", "os", "pnode", "status", "oper_ram"),
)


def _used(row: Row) -> int | None:
    return None if row["memory_total"] is None or row["memory_free"] is None else row["memory_total"] - row["memory_free"]


def _role(row: Row) -> str:
    if row["offline"]:
        return "O"
    if row["drained"]:
        return "D"
    return "C" if "master-candidate" in row["roles"] else "R"


NODE = GanetiTable(
    {
        "name": _field("name", "Node"),
        "uuid": _field("id", "UUID"),
        "group": _field("group", "Group"),
        "dtotal": _field("disk_total", "DTotal", "size"),
        "dfree": _field("disk_free", "DFree", "size"),
        "mtotal": _field("memory_total", "MTotal", "size"),
        "mnode": Column("MNode", _used, "size"),
        "mfree": _field("memory_free", "MFree", "size"),
        "ctotal": _field("cpus", "CTotal", "number"),
        "pinst_cnt": _field("claims", "Pinst", "number"),
        "sinst_cnt": _field("secondaries", "Sinst", "number"),
        "pip": _field("address", "PrimaryIP"),
        "role": Column("Role", _role),
        "offline": Column("Offline", lambda row: "Y" if row["offline"] else "N"),
        "drained": Column("Drained", lambda row: "Y" if row["drained"] else "N"),
        "tags": _field("tags", "Tags"),
    },
    ("name", "dtotal", "dfree", "mtotal", "mnode", "mfree", "pinst_cnt", "sinst_cnt"),
)

GROUP = GanetiTable(
    {
        "name": _field("name", "Group"),
        "uuid": _field("id", "UUID"),
        "node_cnt": Column("Nodes", lambda row: len(row["nodes"]), "number"),
        "node_list": _field("nodes", "NodeList"),
        "pinst_cnt": _field("instances", "Instances", "number"),
        "alloc_policy": Column("AllocPolicy", lambda row: "preferred"),
        "tags": _field("tags", "Tags"),
    },
    ("name", "node_cnt", "pinst_cnt", "alloc_policy"),
)

_JOB_STATUS = {"queued": "waiting", "running": "running", "undoing": "canceling", "done": "success", "needs-attention": "error"}


def job_status(row: Row) -> str:
    """Ganeti's status of a job."""
    if row["state"] == "undone":
        return "canceled" if row["cancel_asked"] and (row["error"] or {}).get("code") in (None, "cancelled") else "error"
    return _JOB_STATUS[str(row["state"])]


JOB = GanetiTable(
    {
        "id": _field("id", "ID", "number"),
        "status": Column("Status", job_status),
        "summary": _field("summary", "Summary"),
        "received_ts": _field("created", "Received", "time"),
        "start_ts": _field("started", "Start", "time"),
        "end_ts": _field("ended", "End", "time"),
        "opresult": _field("result", "OpCode_result"),
    },
    ("id", "status", "summary"),
)

STORAGE = GanetiTable(
    {
        "node": _field("node", "Node"),
        "type": _field("type", "Type"),
        "name": _field("name", "Name"),
        "size": _field("size", "Size", "size"),
        "used": _field("used", "Used", "size"),
        "free": _field("free", "Free", "size"),
        "allocatable": _field("allocatable", "Allocatable"),
    },
    ("node", "type", "name", "size", "used", "free", "allocatable"),
)

TABLES: Mapping[str, GanetiTable] = {"instance": INSTANCE, "node": NODE, "group": GROUP, "job": JOB}
