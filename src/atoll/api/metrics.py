"""``GET /metrics``: figures for Prometheus.

Everything but the durations of jobs is read from memory when it is asked for: nobody pays for figures that nobody reads. Durations are
counted as jobs end, since this master began to lead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from atoll import __version__
from atoll.api.events import Hub
from atoll.api.storage_figures import families
from atoll.model.messages import Space
from atoll.model.objects import Hold, Job, JobState, Stored
from atoll.operations.index import Index
from atoll.operations.instance_views import instance_state
from atoll.operations.state import State
from atoll.operations.views import node_state

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds: from a rename to the copy of a large disk.
BUCKETS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0)
#: The states that are always told, with 0 if need be: a series that comes and goes cannot be alarmed on.
NODE_STATES = ("ok", "joining", "drained", "offline", "unreachable", "dead-proved")
INSTANCE_STATES = ("running", "stopped", "starting", "stopping", "migrating", "paused", "hung", "unreachable", "error")


class JobDurations:
    """How long jobs took, by operation and end."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._taken = Histogram(
            "atoll_job_duration_seconds",
            "Seconds from a job's request to its end, since this master began to lead.",
            ("operation", "end"),
            registry=self.registry,
            buckets=BUCKETS,
        )

    def changed(self, before: Stored | None, after: Stored | None) -> None:
        """A listener of the store."""
        if isinstance(after, Job) and after.state.ended and isinstance(before, Job) and not before.state.ended and after.ended:
            # The clock may have jumped back.
            self._taken.labels(after.operation, after.state.value).observe(max(0.0, after.ended - after.created))


class Figures(Collector):
    """The figures of one moment."""

    def __init__(self, state: State, spaces: Mapping[tuple[str, str], Space], hub: Hub) -> None:
        self._state, self._hub = state, hub
        self._index = Index(state, spaces)

    def collect(self) -> Iterator[Any]:
        """All families."""
        yield InfoMetricFamily("atoll", "The master's version and cluster.", {"version": __version__, "cluster": self._state.cluster.name})
        yield _one("atoll_term", "The term of the master that leads; it grows with each change.", self._state.store.term)
        yield _one("atoll_store_revision", "Transactions in the store so far.", self._state.store.revision)
        yield _one("atoll_event_followers", "Clients that follow the event stream.", self._hub.count)
        yield from self._nodes()
        yield from self._pools()
        yield from families(self._state.pools_health, self._index.pool_name, self._state.clock.now())
        yield from self._jobs()
        states = Counter(instance_state(item, self._index)[0] for item in self._index.instances.values())
        yield _counted("atoll_instances", "Instances by state.", "state", INSTANCE_STATES, states)

    def _nodes(self) -> Iterator[Any]:
        index, state = self._index, self._state
        nodes = list(index.nodes.values())
        yield _counted("atoll_nodes", "Nodes by state.", "state", NODE_STATES, Counter(node_state(node, index) for node in nodes))
        up = GaugeMetricFamily("atoll_agent_up", "Whether the node's agent has reported lately.", labels=["node"])
        age = GaugeMetricFamily("atoll_agent_report_age_seconds", "Seconds since the agent's newest report.", labels=["node"])
        total = GaugeMetricFamily("atoll_node_memory_bytes", "Memory of the node.", labels=["node"])
        free = GaugeMetricFamily("atoll_node_memory_free_bytes", "Memory that the node has free.", labels=["node"])
        help_ = "Seconds for which a master candidate's copy of the store lacks changes."
        lag = GaugeMetricFamily("atoll_store_copy_age_seconds", help_, labels=["node"])
        for node in nodes:
            up.add_metric([node.name], float(index.alive[node.id]))
            since, report = state.health.since(node.id), state.health.report(node.id)
            if since is not None:
                age.add_metric([node.name], since)
            if report is not None:
                total.add_metric([node.name], report.memory_total)
                free.add_metric([node.name], report.memory_free)
            copy = state.replication.row(node.id, state.store.revision, state.clock.monotonic())
            if copy is not None:
                lag.add_metric([node.name], copy["seconds"] or 0.0)
        yield from (up, age, total, free, lag)

    def _pools(self) -> Iterator[Any]:
        index = self._index
        total = GaugeMetricFamily("atoll_pool_bytes", "Size of a pool; by node where it is node-local.", labels=["pool", "node"])
        free = GaugeMetricFamily("atoll_pool_free_bytes", "Free space of a pool.", labels=["pool", "node"])
        promised = GaugeMetricFamily("atoll_pool_promised_bytes", "Sum of the sizes of a pool's volumes.", labels=["pool"])
        stalled = GaugeMetricFamily("atoll_pool_stalled", "1: the pool's storage does not answer on that node.", labels=["pool", "node"])
        long = GaugeMetricFamily("atoll_pool_stalled_seconds", "For how long it has not answered.", labels=["pool", "node"])
        for (pool, node), space in index.spaces.items():
            labels = [index.pool_name(pool), str(index.node_name(node)) if node else ""]
            total.add_metric(labels, space.total)
            free.add_metric(labels, space.free)
        for pool, record in index.pools.items():
            promised.add_metric([record.name], sum(volume.size for volume in index.pool_volumes.get(pool, ())))
            for node_id, member in index.nodes.items():
                if member.group not in record.groups or not index.alive[node_id]:
                    continue
                report = self._state.health.report(node_id)
                stalled.add_metric([record.name, member.name], float(report is not None and pool in report.stalled_pools))
                if report is not None and pool in report.stalled_for:
                    long.add_metric([record.name, member.name], report.stalled_for[pool])
        yield from (total, free, promised, stalled, long)

    def _jobs(self) -> Iterator[Any]:
        store, now = self._state.store, self._state.clock.now()
        jobs = store.active(Job)
        states = [state.value for state in JobState]
        yield _counted("atoll_jobs", "Jobs that are kept, by state.", "state", states, Counter(store.states(Job)))
        oldest = min((job.created for job in jobs if job.state.active), default=now)
        yield _one("atoll_job_oldest_active_seconds", "Age of the oldest job that has not ended.", max(0.0, now - oldest))
        yield _one("atoll_holds", "Things that jobs which need attention hold.", len(store.all(Hold)))


def _one(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=value)


def _counted(name: str, help: str, label: str, always: Any, counts: Counter[str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=[label])
    for value in dict.fromkeys([*always, *counts]):
        family.add_metric([value], counts[value])
    return family


def exposition(state: State, spaces: Mapping[tuple[str, str], Space], hub: Hub, durations: JobDurations) -> bytes:
    """All of it as Prometheus reads it."""
    now = CollectorRegistry(auto_describe=False)
    now.register(Figures(state, spaces, hub))
    return generate_latest(now) + generate_latest(durations.registry)
