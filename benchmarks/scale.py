"""``scale``: how time grows with the number of instances."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

from benchmarks.cluster import Cluster, cluster
from benchmarks.instances import body
from benchmarks.records import Record, record

SIZES = (100, 1_000, 10_000)
#: What Atoll promises for so many instances: what -> (size, seconds).
TARGETS = {"list": {1_000: 0.3}}


def run() -> Iterator[Record]:
    """Stopped instances with a disk each, and the jobs that made them; the exponent is that of time = c * instances ** exponent."""
    seen: dict[str, dict[int, float]] = {"list": {}, "list over REST": {}, "add": {}, "verify": {}, "restart": {}}
    with cluster("bs") as made:
        have = 0
        for size in SIZES:
            made.stop_master()
            made.in_node(made.first, ["-m", "benchmarks.seed", str(have), str(size - have)])
            have = size
            restarts = []
            for number in range(3):
                if number:
                    made.stop_master()
                restarts.append(made.start_master())
            made.wait_alive()
            measured = {"restart": min(restarts), **_measure(made)}
            for what, value in measured.items():
                seen[what][size] = value
                unit = "s" if what != "memory" else "MB"
                yield record(f"{what} with {size:,} instances", value, unit, target=TARGETS.get(what, {}).get(size))
            yield record(f"memory of the master with {size:,} instances", made.rss(made.first.service_pid("master")), "MB")
    for what, values in seen.items():
        yield record(f"{what}: exponent from 100 to 1,000", _exponent(values, 100, 1_000), "")
        yield record(f"{what}: exponent from 1,000 to 10,000", _exponent(values, 1_000, 10_000), "")


def _measure(made: Cluster) -> dict[str, float]:
    def add(number: int) -> None:
        made.api.do("POST", "/v1/instances", **body(f"more{number}"))

    found = {
        "list": _median(lambda _: made.command("instance", "list"), 5),
        "list over REST": _median(lambda _: made.api.get("/v1/instances"), 5),
        "add": _median(add, 9),
        "verify": _median(lambda _: made.api.get("/v1/cluster/verify"), 3),
    }
    for number in range(9):
        made.api.do("DELETE", f"/v1/instances/more{number}", timeout=0)
    return found


def _median(work: Callable[[int], object], rounds: int) -> float:
    walls = []
    for number in range(rounds):
        began = time.perf_counter()
        work(number)
        walls.append(time.perf_counter() - began)
    return statistics.median(walls)


def _exponent(values: dict[int, float], small: int, large: int) -> float:
    return math.log(values[large] / values[small]) / math.log(large / small)
