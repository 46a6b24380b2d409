"""Where an instance may run. Every refusal has its reason, so that "no place" explains itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from atoll.model.objects import Node, Pool
from atoll.model.units import format_size


@dataclass(frozen=True)
class Needs:
    """What an instance needs of a node. Memory in bytes; ``pools`` must be reachable; ``nodes``: only these (node-local disks)."""

    memory: int
    pools: tuple[Pool, ...] = ()
    group: str | None = None
    nodes: frozenset[str] | None = None
    exclude: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Candidate:
    """A node with what is free on it; ``refusal`` says why it cannot take the instance, empty if it can."""

    node: Node
    free: int
    refusal: str


class Cluster(Protocol):
    """What placement must know of the present state."""

    def nodes(self) -> Iterable[Node]:
        """All nodes."""

    def alive(self, node: str) -> bool:
        """Whether the node answers."""

    def speaks(self, node: str) -> bool:
        """Whether its agent is at most one version away."""

    def stalled(self, node: str) -> frozenset[str]:
        """The pools (ids) whose storage does not answer on the node."""

    def free_memory(self, node: str) -> int:
        """Memory that no instance uses or was promised, in bytes."""


def judge(cluster: Cluster, needs: Needs) -> list[Candidate]:
    """Every node, with the reason why not."""
    found = []
    for node in cluster.nodes():
        free = cluster.free_memory(node.id)
        found.append(Candidate(node, free, _refusal(cluster, needs, node, free)))
    return found


def _refusal(cluster: Cluster, needs: Needs, node: Node, free: int) -> str:
    if node.id in needs.exclude:
        return "is excluded"
    if needs.nodes is not None and node.id not in needs.nodes:
        return "cannot reach its node-local disks"
    if needs.group is not None and node.group != needs.group:
        return "is in another group"
    missing = [pool.name for pool in needs.pools if node.group not in pool.groups]
    if missing:
        return f"its group does not reach pool {', '.join(missing)}"
    if node.offline:
        return "is offline"
    if node.drained:
        return "is drained"
    if "vm" not in node.roles:
        return "does not have the role vm"
    if not cluster.alive(node.id):
        return "does not answer"
    if not cluster.speaks(node.id):
        return "runs an agent that is more than one version away from this master"
    silent = [pool.name for pool in needs.pools if pool.id in cluster.stalled(node.id)]
    if silent:
        return f"gets no answer from the storage of pool {', '.join(silent)}"
    if not node.ready:
        return "has not prepared its pools yet"
    if free < needs.memory:
        return f"has only {format_size(max(free, 0))} of memory free, {format_size(needs.memory)} are needed"
    return ""
