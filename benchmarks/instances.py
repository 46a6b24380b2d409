"""``instances``: what one operation takes, and a hundred at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.cluster import GIB, Cluster, cluster
from benchmarks.records import GANETI, Record, record

ROUNDS, TOGETHER = 20, 100
MIB = 1 << 20


def body(name: str, **more: Any) -> dict[str, Any]:
    """A small guest with one disk on shared storage."""
    return {"name": name, "template": "shared", "disks": [{"size": GIB}], "memory": 64 * MIB, **more}


def run() -> Iterator[Record]:
    """One after the other, then all together."""
    with cluster("bi") as made:
        for number in range(3):
            made.api.do("POST", "/v1/instances", **body(f"warm{number}"))
        yield from _one_by_one(made)
        yield from _together(made)


def _each(made: Cluster, method: str, path: str, more: dict[str, Any] | None = None) -> tuple[float, float]:
    """Median of the wall seconds, and CPU seconds of all processes, of one operation."""
    walls = []
    before = made.cpu()
    for number in range(ROUNDS):
        began = time.perf_counter()
        if path == "/v1/instances":
            made.api.do(method, path, **body(f"web{number}"))
        else:
            made.api.do(method, path.format(f"web{number}"), **(more or {}))
        walls.append(time.perf_counter() - began)
    return statistics.median(walls), (made.cpu() - before) / ROUNDS


def _one_by_one(made: Cluster) -> Iterator[Record]:
    wall, cpu = _each(made, "POST", "/v1/instances")
    yield record("instance add", wall, "s", peer=GANETI, peer_value=1.3, target=0.10)
    yield record("instance add, CPU of all processes", cpu, "CPU s", peer=GANETI, peer_value=1.6, target=0.10)
    command = statistics.median(made.command("instance", "info", f"web{n}") for n in range(ROUNDS))
    yield record("instance info, command", command, "s", peer=GANETI, peer_value=0.8)
    wall, cpu = _each(made, "POST", "/v1/instances/{}/migrate")
    yield record("instance migrate, fake guest", wall, "s", peer=GANETI, peer_value=1.4)
    yield record("instance migrate, CPU of all processes", cpu, "CPU s")
    wall, cpu = _each(made, "DELETE", "/v1/instances/{}", {"timeout": 0})
    yield record("instance remove", wall, "s", peer=GANETI, peer_value=1.0)
    yield record("instance remove, CPU of all processes", cpu, "CPU s")
    walls = []
    for number in range(5):
        walls.append(made.command("instance", "add", f"cli{number}", "-t", "shared", "--disk", "0:size=1G", "-B", "maxmem=64M"))
    yield record("instance add, command with its start", statistics.median(walls), "s", peer=GANETI, peer_value=1.3)


def _together(made: Cluster) -> Iterator[Record]:
    def one(number: int) -> None:
        api = made.connect()
        api.do("POST", "/v1/instances", **body(f"all{number}"))
        api.close()

    before, began = made.cpu(), time.perf_counter()
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(one, range(TOGETHER)))
    wall = time.perf_counter() - began
    yield record("100 instances at once", wall, "s", peer=GANETI, peer_value=175, target=5)
    yield record("100 instances at once, CPU of all processes", made.cpu() - before, "CPU s")
    walls = [made.command("instance", "list") for _ in range(10)]
    yield record("instance list of 100, command", statistics.median(walls), "s", peer=GANETI, peer_value=0.4)
