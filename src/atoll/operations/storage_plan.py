"""What a change of a storage cluster's nodes and disks would make, in words, for dry runs. Nobody is asked, and nothing is changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from atoll.deploy import registry as kinds
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations.requests import NodeRemove
from atoll.operations.state import State
from atoll.operations.storage_options import member
from atoll.operations.storage_requests import NodeAddStorageDisks, NodeJoinStorage, NodeLeaveStorage, NodeRemoveStorageDisks
from atoll.operations.storage_requests import NodeReplaceStorage as Replace
from atoll.operations.storage_rest import cluster_of

Layout = Mapping[str, Any]
Lines = dict[str, list[str]]


def _told(state: State, target: str, change: Callable[[Node, StorageCluster], Layout]) -> Lines:
    node = state.store.find(Node, target)
    cluster = cluster_of(state, node)
    if cluster is None:
        return {"lines": ["it has no part in a storage cluster"], "survives": [], "warnings": []}
    return kinds.planner(cluster.type).changed((cluster.layout, change(node, cluster))).model_dump()


def _grown(state: State, node: Node, cluster: StorageCluster) -> Layout:
    group = state.store.require(Group, cluster.group)
    others = [n for n in state.nodes_of_group(group.id) if n.id == node.id or (n.name in cluster.layout["hosts"] and state.answers(n.id))]
    count = itertools.count()
    members = [member(state, cluster.type, group, n) for n in others]
    return kinds.planner(cluster.type).grown(cluster.layout, members, {}, lambda: f"new-{next(count)}")


def _shrunk(node: Node, cluster: StorageCluster, layout: Layout, disks: list[str], *, dead: bool) -> Layout:
    return kinds.planner(cluster.type).shrunk(layout, node.name, disks, dead=dead) if node.storage in ("joined", "stopped") else layout


def join(state: State, target: str, request: NodeJoinStorage) -> Lines:
    """A node that joins."""
    return _told(state, target, lambda node, cluster: _grown(state, node, cluster))


def leave(state: State, target: str, request: NodeLeaveStorage | NodeRemove) -> Lines:
    """A node that leaves."""
    return _told(state, target, lambda node, cluster: _shrunk(node, cluster, cluster.layout, [], dead=request.dead))


def add_disks(state: State, target: str, request: NodeAddStorageDisks) -> Lines:
    """More disks."""
    count = itertools.count()

    def change(node: Node, cluster: StorageCluster) -> Layout:
        return kinds.planner(cluster.type).with_disks(cluster.layout, node.name, request.disks, lambda: f"new-{next(count)}")

    return _told(state, target, change)


def remove_disks(state: State, target: str, request: NodeRemoveStorageDisks) -> Lines:
    """Fewer disks."""
    return _told(state, target, lambda node, cluster: _shrunk(node, cluster, cluster.layout, request.disks, dead=request.dead))


def replace(state: State, target: str, request: Replace) -> Lines:
    """One node in the place of another."""

    def change(dead: Node, cluster: StorageCluster) -> Layout:
        new = state.store.find(Node, request.node)
        grown = cluster.layout if new.name in cluster.layout["hosts"] else _grown(state, new, cluster)
        return _shrunk(dead, cluster, grown, [], dead=True)

    return _told(state, target, change)
