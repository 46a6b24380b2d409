"""Nodes that shall have a part in their group's storage cluster: each is let in once by itself; after that a person looks."""

from __future__ import annotations

from collections.abc import Callable

from atoll.api.leader import Finding
from atoll.model.objects import Node
from atoll.operations.state import State
from atoll.operations.storage_rest import cluster_of


class StorageNodes:
    """``busy``: whether a job has a resource for itself."""

    def __init__(self, state: State, busy: Callable[[str], bool]) -> None:
        self._state, self._busy = state, busy
        self._asked: set[str] = set()

    def may_join(self, node: Node) -> bool:
        """Whether a job shall let it in now; true once each time it is wanted, in the life of this master."""
        if node.storage != "wanted":
            self._asked.discard(node.id)
        cluster = cluster_of(self._state, node)
        if node.storage != "wanted" or node.offline or node.id in self._asked or cluster is None or self._busy(cluster.resource):
            return False
        self._asked.add(node.id)
        return True

    def findings(self) -> list[Finding]:
        """What ``cluster verify`` tells of nodes that could not join."""
        found = []
        for node in self._state.store.all(Node):
            cluster = cluster_of(self._state, node)
            if node.storage == "wanted" and node.id in self._asked and cluster is not None and not self._busy(node.resource):
                why = f"it could not join {cluster.name}; its job says why"
                commands = ("atoll job list", f"atoll storage join {node.name}")
                found.append(Finding("warning", "node has no part in the storage cluster yet", node.name, why, None, commands))
        return found
