"""What ``cluster verify`` finds of nodes themselves: versions and clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from atoll import __version__
from atoll.api.leader import Finding
from atoll.model.messages import PROTOCOL, compatible
from atoll.model.objects import Node

if TYPE_CHECKING:
    from atoll.operations.state import State

#: Seconds by which a node's clock may differ from the master's. Certificates allow an hour; logs that are minutes apart tell nothing.
SKEW, BAD_SKEW = 5.0, 600.0


class NodeFindings:
    """Looks at the newest reports."""

    def __init__(self, state: State, busy: Callable[[str], bool]) -> None:
        self._state, self._busy = state, busy

    def look(self) -> list[Finding]:
        """All findings."""
        found = []
        for node in self._state.store.all(Node):
            if not node.offline and self._state.health.alive(node.id):
                found += [*self._version(node), *self._clock(node), *self._unready(node)]
        return found

    def _version(self, node: Node) -> list[Finding]:
        report = self._state.health.report(node.id)
        if report is None or report.protocol == PROTOCOL:
            return []
        behind = report.protocol < PROTOCOL
        way = "behind" if behind else "ahead"
        why = f"it runs {report.version or '?'} (protocol {report.protocol}), this master {__version__} (protocol {PROTOCOL})"
        if compatible(report.protocol):
            commands = (f"on {node.name}: upgrade the package, then restart atoll-agent" if behind else "upgrade the master",)
            return [Finding("warning", f"agent is one version {way}", node.name, why, None, commands)]
        what = f"agent is more than one version {way}"
        commands = (f"{f'on {node.name}: upgrade the agent' if behind else 'upgrade the master'}, one version at a time",)
        return [Finding("error", what, node.name, f"{why}; nothing is asked of it but to keep its guests", None, commands)]

    def _unready(self, node: Node) -> list[Finding]:
        if node.ready or self._busy(node.resource):
            return []
        why = "the pools of its group are not prepared on it, so nothing is started there"
        return [Finding("warning", "node is not ready", node.name, why, None, ("atoll job list", f"atoll node info {node.name}"))]

    def _clock(self, node: Node) -> list[Finding]:
        report = self._state.health.report(node.id)
        age = self._state.health.since(node.id)
        if report is None or report.clock is None or age is None:
            return []
        ahead = report.clock - (self._state.clock.now() - age)
        if abs(ahead) <= SKEW:
            return []
        why = f"it is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the master's"
        severity = "error" if abs(ahead) > BAD_SKEW else "warning"
        commands = (f"on {node.name}: timedatectl timesync-status, or chronyc tracking",)
        return [Finding(severity, "clock differs", node.name, why, None, commands)]
