"""What ``cluster verify`` finds of how guests reach their disks."""

from __future__ import annotations

from collections.abc import Iterator

from atoll.api.leader import Finding
from atoll.model.objects import Instance, Node
from atoll.operations.state import State


def access(state: State) -> Iterator[Finding]:
    """What the storage drivers warn of on the nodes where guests are."""
    for node in state.store.all(Node):
        report = state.health.report(node.id)
        for guest in report.guests if report else ():
            instance = state.store.get(Instance, guest.instance)
            if instance is None:
                continue
            commands = (f"atoll instance info {instance.name}", "atoll group modify GROUP -D DRIVER:access=userspace")
            about, what = f"{instance.name} on {node.name}", "how a guest reaches its disks is risky"
            yield from (Finding("warning", what, about, warning, None, commands) for warning in guest.warnings)
