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
