"""What can be asked of the storage clusters that Atoll makes."""

from __future__ import annotations

from pydantic import Field

from atoll.operations.requests import Name, Ref, Request


class NodeJoinStorage(Request):
    """Let the node have a part in its group's storage cluster. Its disks (-S of cluster, group and node) are erased."""


class NodeLeaveStorage(Request):
    """Take the node's part out of its storage cluster for good: its data moves to the other nodes first, then its disks are erased.

    ``dead``: it died and will not come back; what it had is given up. Refused where a last copy, or the monitors' majority, would go.
    """

    dead: bool = False


class NodeReplaceStorage(Request):
    """Let another node of the group take the place, in its storage cluster, of this one, which died for good."""

    node: Ref


class NodeAddStorageDisks(Request):
    """Let the node give more disks to its storage cluster. They are erased."""

    disks: list[str] = Field(min_length=1)


class NodeRemoveStorageDisks(Request):
    """Take disks of the node out of its storage cluster; their data moves to others first. ``dead``: they have failed."""

    disks: list[str] = Field(min_length=1)
    dead: bool = False


class StorageInit(Request):
    """Make a storage cluster of the nodes of a group; a group without nodes is only marked."""

    type: Name
