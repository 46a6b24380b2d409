"""Choose a node: the rules, then the most free memory."""

from __future__ import annotations

from atoll.model.errors import NodeUnavailable, NoPlace
from atoll.model.objects import Node
from atoll.placement.rules import Cluster, Needs, judge


def choose(cluster: Cluster, needs: Needs, wanted: Node | None = None) -> Node:
    """The node for an instance; ``wanted`` is checked instead of chosen. Errors: NodeUnavailable (wanted), NoPlace."""
    candidates = judge(cluster, needs)
    if wanted is not None:
        refusal = next(c.refusal for c in candidates if c.node.id == wanted.id)
        if refusal:
            raise NodeUnavailable(f"node {wanted.name} {refusal}")
        return wanted
    fit = [c for c in candidates if not c.refusal]
    if not fit:
        reasons = "; ".join(f"{c.node.name} {c.refusal}" for c in candidates) or "the cluster has no nodes"
        raise NoPlace(f"no node can take it: {reasons}")
    return max(fit, key=lambda c: (c.free, c.node.id)).node
