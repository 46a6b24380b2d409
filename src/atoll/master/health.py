"""What the master knows of its nodes from their heartbeats. Kept in memory: it is true only as long as they repeat it."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.model.messages import NodeReport
from atoll.runtime.clock import Clock

#: Seconds without a heartbeat after which a node counts as silent. It decides nothing by itself: no claim moves by a timeout.
GRACE = 6.0


@dataclass(frozen=True)
class _Heard:
    report: NodeReport
    at: float


class HealthMonitor:
    """The newest report of each node."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._began = clock.monotonic()

    def hear(self, node: str, report: NodeReport) -> None:
        """A heartbeat."""
        self._heard[node] = _Heard(report, self._clock.monotonic())

    def forget(self, node: str) -> None:
        """The node has left the cluster."""
        self._heard.pop(node, None)

    def alive(self, node: str) -> bool:
        """Whether it has been heard lately."""
        since = self.since(node)
        return since is not None and since < GRACE

    def doubt(self, node: str) -> float:
        """Seconds until this master has been without the node for the whole grace, its own beginning included; 0 = it has.

        Before that a person's word counts for nothing: the node may have been answered by the master before this one a moment ago, and
        may still begin what that one ordered (see ``agent.contact``).
        """
        return max(0.0, max(self._began, self.heard_at(node)) + GRACE - self._clock.monotonic())

    def report(self, node: str) -> NodeReport | None:
        """The newest report, however old."""
        heard = self._heard.get(node)
        return heard.report if heard else None

    def since(self, node: str) -> float | None:
        """Seconds since the newest report."""
        heard = self._heard.get(node)
        return self._clock.monotonic() - heard.at if heard else None

    def heard_at(self, node: str) -> float:
        """When the newest report came, on the monotonic clock; 0 = never."""
        heard = self._heard.get(node)
        return heard.at if heard else 0.0
