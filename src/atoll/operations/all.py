"""Importing this registers every operation."""

from atoll.operations import (
    certificates,
    groups,
    instance_add,
    instance_admin,
    instance_disks,
    instance_export,
    instance_failover,
    instance_import,
    instance_migrate,
    instance_power,
    instance_recreate,
    instance_reinstall,
    instance_resume,
    instance_settle,
    nodes,
    pools,
    volumes,
)
from atoll.operations.registry import OPERATIONS

__all__ = [
    "OPERATIONS",
    "certificates",
    "groups",
    "instance_add",
    "instance_admin",
    "instance_disks",
    "instance_export",
    "instance_failover",
    "instance_import",
    "instance_migrate",
    "instance_power",
    "instance_recreate",
    "instance_reinstall",
    "instance_resume",
    "instance_settle",
    "nodes",
    "pools",
    "volumes",
]
