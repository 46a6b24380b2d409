"""``migration``: a live migration by Atoll against one by hand: two QEMU processes, the same machine, TLS and disk, and QMP alone."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.lab.bringup import AnyNode
from atoll.lab.guest.build import GuestImage, append, build
from atoll.lab.host import command_line, descendants
from benchmarks.cluster import Cluster, cluster, until
from benchmarks.qmp import Qmp
from benchmarks.records import Record, record

ROUNDS, MEMORY, DISK = 5, 128 << 20, 16 << 20
CACHE = Path(os.environ.get("ATOLL_TEST_CACHE", "/var/cache/atoll"))
PEER = "two QEMU processes and QMP"
#: Pause between two records of the guest's writer, in microseconds.
DELAY = 2000
_ACK = re.compile(rb"ACK (\d+)")
_TLS = {"ca.pem": ["ca-cert.pem"], "cert.pem": ["server-cert.pem", "client-cert.pem"], "key.pem": ["server-key.pem", "client-key.pem"]}


def run() -> Iterator[Record]:
    """By hand, by Atoll, by hand again; medians."""
    if os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None:
        print("  migration: needs root and qemu-system-x86_64; left out", file=sys.stderr)
        return
    image = build(CACHE)
    with cluster("bm", hypervisor="qemu", binds=[str(CACHE)]) as made:
        bare: list[tuple[float, float]] = []
        ours: list[tuple[float, float, float]] = []
        line = add(made, image, "shared")
        disk = f"{made.lab.shared}/by-hand.raw"
        made.first.exec(["sh", "-c", f"truncate -s {DISK} {disk}; chmod 666 {disk}"], check=True)

        def other(word: str) -> str:
            return re.sub(r'"filename": *"[^"]*"', f'"filename": "{disk}"', word)

        made.api.do("POST", "/v1/instances/web/stop", timeout=0)
        for number in range(ROUNDS):
            bare.append(by_hand(made, line, number, other))
        made.api.do("POST", "/v1/instances/web/start", node="node2")
        ours += [by_atoll(made, number) for number in range(2 * ROUNDS)]
        made.api.do("POST", "/v1/instances/web/stop", timeout=0)
        for number in range(ROUNDS, 2 * ROUNDS):
            bare.append(by_hand(made, line, number, other))
    for index, (what, target) in enumerate((("live migration, QEMU's total time", 1.5), ("live migration, the writer's pause", 1.5))):
        middle = statistics.median(found[index] for found in bare)
        yield record(what, statistics.median(found[index] for found in ours), "ms", peer=PEER, peer_value=middle, ratio_target=target)
    yield record("live migration, from the request to the end of its job", statistics.median(found[2] for found in ours), "ms")


class Console:
    """Notes when each acknowledgement is seen on the consoles of a guest that moves."""

    def __init__(self, logs: list[Path]) -> None:
        self._logs = {log: log.stat().st_size if log.exists() else 0 for log in logs}
        self._stop = threading.Event()
        self.seen: list[float] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(0.001):
            for log, at in self._logs.items():
                try:
                    with log.open("rb") as file:
                        file.seek(at)
                        part = file.read()
                except OSError:
                    continue
                self._logs[log] = at + len(part)
                if _ACK.search(part):
                    self.seen.append(time.monotonic())

    def __enter__(self) -> Console:
        until(lambda: len(self.seen) > 50, 60)
        return self

    def __exit__(self, *_: object) -> None:
        count = len(self.seen)
        until(lambda: len(self.seen) > count + 50, 60)
        self._stop.set()
        self._thread.join()

    def pause(self) -> float:
        """The longest silence, in ms."""
        return max(after - before for before, after in itertools.pairwise(self.seen)) * 1000


# --- by Atoll ---


def add(made: Cluster, image: GuestImage, pool: str) -> list[str]:
    """Make the guest, which writes all the time, on node2; its command line."""
    made.api.do(
        "POST", "/v1/instances", name="web", template=pool, disks=[{"size": DISK}], memory=MEMORY, node="node2",
        kernel=str(image.kernel), initrd=str(image.initrd), append=append(ctr="vda", ctrdelay=DELAY),
    )  # fmt: skip
    return command_of(made.lab.node("node2"))


def command_of(node: AnyNode) -> list[str]:
    """The command line of the guest that runs there."""
    return next(argv for pid in descendants(node.pid) if (argv := command_line(pid)) and "qemu-system" in argv[0])


def by_atoll(made: Cluster, number: int) -> tuple[float, float, float]:
    """QEMU's total time, the writer's pause, and the whole job, in ms."""
    instance = made.api.get("/v1/instances/web")["id"]
    target = ("node3", "node2")[number % 2]
    logs = [made.lab.node(name).run_dir / "logs" / instance / "console.log" for name in ("node2", "node3")]
    with Console(logs) as console:
        began = time.perf_counter()
        job = made.api.do("POST", "/v1/instances/web/migrate", node=target)
        whole = (time.perf_counter() - began) * 1000
    return float(job["result"]["total_ms"]), console.pause(), whole


# --- by hand ---


def by_hand(made: Cluster, line: list[str], number: int, other: Callable[[str], str]) -> tuple[float, float]:
    """The same machine without Atoll: QEMU's total time and the writer's pause, in ms. ``other``: a word of the command line, for another
    disk than Atoll's."""
    source, target = (made.lab.node(name) for name in (("node2", "node3"), ("node3", "node2"))[number % 2])
    line = [other(word) for word in line]
    here, there = Bare(source, line, incoming=False), Bare(target, line, incoming=True)
    try:
        with Console([here.place / "console.log", there.place / "console.log"]) as console:
            here.credentials("client")
            there.credentials("server")
            there.qmp("migrate-set-parameters", {"tls-creds": "tls0"})
            there.qmp("migrate-incoming", {"uri": f"tcp:{target.address}:4444"})
            here.qmp(
                "migrate-set-parameters",
                {"tls-creds": "tls0", "tls-hostname": target.name, "downtime-limit": 300, "max-bandwidth": 10 << 30},
            )
            here.qmp("migrate", {"uri": f"tcp:{target.address}:4444"})
            info = until(lambda: (found := here.qmp("query-migrate")).get("status") in ("completed", "failed") and found, 120)
            if info["status"] != "completed":
                raise RuntimeError(f"the migration by hand failed: {info}")
        return float(info["total-time"]), console.pause()
    finally:
        here.close()
        there.close()


class Bare:
    """A QEMU process in a node, with the machine of ``line``."""

    def __init__(self, node: AnyNode, line: list[str], *, incoming: bool) -> None:
        self._node = node
        self.place = node.run_dir / "by-hand"
        inside = "/run/atoll/by-hand"
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self._tls()
        self._process = subprocess.Popen(
            node.command([*_machine(line, inside), *(["-incoming", "defer"] if incoming else [])]),
            env=node.environ(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.qmp = Qmp(self.place / "qmp")

    def _tls(self) -> None:
        where = self._node.root / "etc/atoll/tls"
        for name, copies in _TLS.items():
            for copy in copies:
                shutil.copy(where / name, self.place / copy)

    def credentials(self, endpoint: str) -> None:
        """As Atoll's guests have them."""
        self.qmp(
            "object-add",
            {"qom-type": "tls-creds-x509", "id": "tls0", "dir": "/run/atoll/by-hand", "endpoint": endpoint, "verify-peer": True},
        )

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(30)
        self.qmp.close()


def _machine(line: list[str], inside: str) -> list[str]:
    """Atoll's command line with other sockets, and without what only Atoll needs."""
    argv, skip = [], False
    for word in line:
        if skip:
            skip = False
            continue
        if word in ("-pidfile", "-incoming", "-runas", "-chardev", "-mon", "-name", "-run-with"):
            skip = True
            continue
        if word in ("-S", "-daemonize"):
            continue
        argv.append(word)
    argv += ["-qmp", f"unix:{inside}/qmp,server=on,wait=off"]
    return [*argv, "-chardev", f"file,id=serial0,path={inside}/console.log"]
