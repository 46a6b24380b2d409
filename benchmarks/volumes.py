"""``volumes``: creations a second with 32 clients, and what ten thousand volumes weigh."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.cluster import Cluster, cluster
from benchmarks.records import Record, record

CLIENTS, TOTAL, WARM = 32, 10_000, 200
MIB = 1 << 20


def run() -> Iterator[Record]:
    """Driver ``file``, three agents, everything durable before it is answered."""
    with cluster("bv") as made:
        master = made.first.service_pid("master")
        yield record("memory of the master, empty cluster", made.rss(master), "MB")
        create(made, "w", WARM)
        before, began = made.cpu(), time.perf_counter()
        create(made, "a", 3000)
        wall = time.perf_counter() - began
        yield record("volume creations completed, 32 clients", 3000 / wall, "/s", target=300)
        yield record("volume creation, CPU of all processes", (made.cpu() - before) / 3000 * 1000, "CPU ms")
        began = time.perf_counter()
        create(made, "b", TOTAL - WARM - 3000)
        wall = time.perf_counter() - began
        yield record("volume creations completed, up to 10,000 volumes", (TOTAL - WARM - 3000) / wall, "/s")
        yield record("memory of the master at 10,000 volumes", made.rss(master), "MB", target=150)
        agents = [made.rss(node.service_pid("agent")) for node in made.lab.nodes]
        yield record("memory of an agent at 10,000 volumes", max(agents), "MB", target=150)
        walls = []
        for _ in range(5):
            began = time.perf_counter()
            made.api.get("/v1/volumes")
            walls.append(time.perf_counter() - began)
        yield record("list of 10,000 volumes over REST", min(walls), "s")


def create(made: Cluster, prefix: str, total: int) -> None:
    """So many volumes, over the nodes in turn, by 32 clients each of which waits for its own."""
    numbers, lock = itertools.count(), threading.Lock()
    nodes = [node.name for node in made.lab.nodes]

    def client(_: int) -> None:
        api = made.connect()
        while True:
            with lock:
                number = next(numbers)
            if number >= total:
                break
            api.do("POST", "/v1/volumes", name=f"{prefix}{number}", pool="local", size=64 * MIB, node=nodes[number % len(nodes)])
        api.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
