"""Figures of storage that tells how it is, for ``/metrics``: one series a pool, from the newest sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from atoll.model.health import Health
from atoll.operations.health import Seen

LEVELS = {"ok": 0.0, "warning": 1.0, "error": 2.0}
#: Name (after ``atoll_storage_``), help, and where it stands in a sample; None: the storage does not tell.
_GAUGES: tuple[tuple[str, str, Callable[[Health], float | None]], ...] = (
    ("health", "What the pool's storage says of itself: 0 well, 1 warning, 2 error.", lambda s: LEVELS[s.status]),
    ("monitors", "Its monitors.", lambda s: s.monitors),
    ("monitors_in_quorum", "Its monitors that take part.", lambda s: len(s.quorum) if s.monitors is not None else None),
    ("pgs_inactive", "Placement groups that nobody can use now.", lambda s: s.pgs_inactive),
    ("degraded_ratio", "Share of the copies that are missing.", lambda s: s.degraded),
    ("bytes", "Its raw size, copies included.", lambda s: s.total),
    ("used_bytes", "Of that, used.", lambda s: s.used),
    ("nearfull_ratio", "The share of a disk at which it is nearly full, and takes no new volumes.", lambda s: s.nearfull_ratio),
    ("full_ratio", "The share of a disk at which it takes no more writes.", lambda s: s.full_ratio),
    ("slow_ops", "Reads and writes that have taken more than half a minute and still wait.", lambda s: s.slow_ops),
    ("manager_up", "Whether somebody keeps its figures; without, many of these are old.", lambda s: s.manager),
    ("client_read_bytes_per_second", "Bytes read from the pool in a second.", lambda s: s.client.read_bytes if s.client else None),
    ("client_write_bytes_per_second", "Bytes written to the pool in a second.", lambda s: s.client.write_bytes if s.client else None),
    ("client_reads_per_second", "Reads of the pool in a second.", lambda s: s.client.reads if s.client else None),
    ("client_writes_per_second", "Writes to the pool in a second.", lambda s: s.client.writes if s.client else None),
    ("recovery_bytes_per_second", "Bytes that the whole storage copies in a second to be safe again.", lambda s: s.recovery_bytes),
    ("recovery_objects_per_second", "Objects that the whole storage copies in a second to be safe again.", lambda s: s.recovery_objects),
    ("commit_latency_seconds", "Seconds until a write is durable, on the slowest of its daemons.", lambda s: s.commit_latency),
    ("apply_latency_seconds", "Seconds until a write can be read, on the slowest of its daemons.", lambda s: s.apply_latency),
    ("sample_seconds", "What the newest sample took.", lambda s: s.seconds),
    ("sample_cpu_seconds", "What the newest sample took of processor time on the node.", lambda s: s.cpu_seconds),
)


def families(known: Mapping[str, Seen], name_of: Callable[[str], str], now: float) -> Iterator[Any]:
    """All families, also without pools."""
    samples = {name_of(pool): seen.sample for pool, seen in known.items() if seen.sample is not None and not seen.problem}
    for name, help_, value in _GAUGES:
        family = GaugeMetricFamily(f"atoll_storage_{name}", help_, labels=["pool"])
        for pool, sample in samples.items():
            found = value(sample)
            if found is not None:
                family.add_metric([pool], float(found))
        yield family
    yield from _states(known, samples, name_of, now)
    check = GaugeMetricFamily(
        "atoll_storage_check", "1: the storage complains of this, and nobody has muted it.", labels=["pool", "check", "severity"]
    )
    osds = GaugeMetricFamily("atoll_storage_osds", "Its daemons that keep data.", labels=["pool", "state"])
    groups = GaugeMetricFamily("atoll_storage_pgs", "Its placement groups by state.", labels=["pool", "state"])
    for pool, sample in samples.items():
        for item in sample.checks:
            if not item.muted:
                check.add_metric([pool, item.code, item.severity], 1.0)
        for state, count in (("all", sample.osds), ("up", sample.osds_up), ("in", sample.osds_in)):
            if count is not None:
                osds.add_metric([pool, state], count)
        for state, count in sample.pgs.items():
            groups.add_metric([pool, state], count)
    yield from (check, osds, groups)


def _states(known: Mapping[str, Seen], samples: Mapping[str, Health], name_of: Callable[[str], str], now: float) -> Iterator[Any]:
    failed = GaugeMetricFamily("atoll_storage_sample_failed", "1: the newest look at the pool's storage had no answer.", labels=["pool"])
    age = GaugeMetricFamily("atoll_storage_sample_age_seconds", "Age of the newest sample.", labels=["pool"])
    refuses = GaugeMetricFamily("atoll_storage_refuses_volumes", "1: the pool takes no new volumes, and none grows.", labels=["pool"])
    for pool, seen in known.items():
        failed.add_metric([name_of(pool)], float(bool(seen.problem)))
        if seen.at:
            age.add_metric([name_of(pool)], max(0.0, now - seen.at))
        if name_of(pool) in samples:
            refuses.add_metric([name_of(pool)], float(seen.refusal() is not None))
    yield from (failed, age, refuses)
