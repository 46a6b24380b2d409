"""``idle``: what daemons use when nothing is asked of them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.cluster import cluster, cpu_of
from benchmarks.instances import body
from benchmarks.records import Record, record

SECONDS = 60.0


def run() -> Iterator[Record]:
    """Master and three agents with their workers, with ten running guests; the guests themselves and the lab are not counted."""
    with cluster("bd") as made:
        for number in range(10):
            made.api.do("POST", "/v1/instances", **body(f"web{number}"))
        made.api.close()
        time.sleep(5)
        daemons = [node.service_pid(service.name) for node in made.lab.nodes for service in node.services()]
        before, began = _sum(daemons), time.perf_counter()
        time.sleep(SECONDS)
        share = (_sum(daemons) - before) / (time.perf_counter() - began) * 100
        yield record("idle master and three agents, ten guests", share, "% of a core", target=1)


def _sum(daemons: list[int]) -> float:
    from atoll.lab.host import descendants

    return sum(cpu_of(pid) for first in daemons for pid in (first, *descendants(first)))
