"""``jobs``: what a job costs beyond its work, and how fast a master is back with a thousand of them."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from atoll.lab.host import descendants
from atoll.lab.nodes import Node
from benchmarks.cluster import Cluster, cluster, until
from benchmarks.records import Record, record

ROUNDS, WAITING, MORE, CLIENTS = 200, 1000, 10, 4
MIB = 1 << 20


def run() -> Iterator[Record]:
    """A job that changes one record in the store, and jobs whose orders are under way when the master dies."""
    with cluster("bj") as made:
        yield from _overhead(made)
        yield from _restart(made)
        made.wait_alive()
        for node in made.lab.nodes[1:]:
            made.api.do("POST", f"/v1/nodes/{node.name}/modify", roles=["vm", "master-candidate"])
        until(lambda: sum(row["state"] == "in step" for row in made.api.get("/v1/cluster")["candidates"]) == 2, 60)
        yield from _overhead(made, " with two master candidates")


def _overhead(made: Cluster, more: str = "") -> Iterator[Record]:
    """Against as many bare durable writes to the same disk as it has transactions, between the jobs: what it must cost at least."""
    walls, bare = [], []
    with _bare(made) as commit:
        revision = made.api.get("/v1/cluster")["revision"]
        made.api.do("POST", "/v1/cluster/tags", add=["t"])
        commits = made.api.get("/v1/cluster")["revision"] - revision
        before = made.cpu()
        for number in range(ROUNDS):
            began = time.perf_counter()
            made.api.do("POST", "/v1/cluster/tags", add=[f"t{number % 7}"])
            walls.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in range(commits):
                commit()
            bare.append(time.perf_counter() - began)
        cpu = made.cpu() - before
    peer = f"{commits} bare writes with fdatasync"
    wall, least = statistics.median(walls) * 1000, statistics.median(bare) * 1000
    yield record(f"job overhead{more}", wall, "ms", peer=peer, peer_value=least, target=6)
    yield record(f"job overhead{more}, CPU of all processes", cpu / ROUNDS * 1000, "CPU ms")


@contextlib.contextmanager
def _bare(made: Cluster) -> Iterator[Callable[[], None]]:
    """Appends what a job's record takes to a file beside the master's store, and waits until it is on the disk."""
    place = made.first.root / "var/lib/atoll" if isinstance(made.first, Node) else made.lab.directory
    path = place / "bare"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def commit() -> None:
        os.write(file, b"x" * 900)
        os.fdatasync(file)

    try:
        yield commit
    finally:
        os.close(file)
        path.unlink()


def _restart(made: Cluster) -> Iterator[Record]:
    empty = _killed(made)
    yield record("master restart to serving, no jobs", empty, "s")
    made.wait_alive()
    # The agents' workers stand still: orders are under way, and the agents are heard all the same.
    with _frozen([node.service_pid("agent") for node in made.lab.nodes]):
        began = time.perf_counter()
        jobs = _submit(made)
        rows = made.api.get("/v1/jobs?fields=state")["items"]
        waiting = sum(row["state"] in ("queued", "running") for row in rows)
        print(f"  {waiting} jobs are under way after {time.perf_counter() - began:.1f} s", file=sys.stderr)
        if waiting < WAITING:
            raise RuntimeError(f"only {waiting} jobs are under way: the others ended meanwhile. The machine is too busy to measure this")
        began = time.perf_counter()
        back = _killed(made)
    yield record("master restart to serving, 1000 jobs to resume", back, "s", target=2)
    # Where all of this took long, an agent has found its pool stalled meanwhile, as it was, and refused the rest: those jobs end undone.
    ends = collections.Counter(made.api.over(job)["state"] for job in jobs)
    print(f"  of these: {dict(ends)}", file=sys.stderr)
    yield record("1000 resumed jobs ended after", time.perf_counter() - began, "s")


def _submit(made: Cluster) -> list[int]:
    """Quickly: a worker that stands still is killed by its agent after ten seconds, and another goes on."""
    nodes = [node.name for node in made.lab.nodes]

    def client(first: int) -> list[int]:
        api, found = made.connect(), []
        for number in range(first, WAITING + MORE, CLIENTS):
            wanted = {"name": f"r{number}", "pool": "local", "size": 64 * MIB, "node": nodes[number % len(nodes)]}
            found.append(api.submit("POST", "/v1/volumes", wanted))
        api.close()
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [job for found in pool.map(client, range(CLIENTS)) for job in found]


@contextlib.contextmanager
def _frozen(agents: list[int]) -> Iterator[None]:
    """The agents' workers stand still, those too that they start meanwhile."""
    done = threading.Event()

    def send(number: signal.Signals) -> None:
        for pid in [child for agent in agents for child in descendants(agent)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze() -> None:
        while not done.wait(0.02):
            send(signal.SIGSTOP)

    thread = threading.Thread(target=freeze, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        send(signal.SIGCONT)


def _killed(made: Cluster) -> float:
    """SIGKILL; seconds from its start by the node until requests that change something are taken."""
    made.first.kill_service("master", signal.SIGKILL)
    began = time.perf_counter()
    made.api.close()
    made.serving()
    return time.perf_counter() - began
