"""A cluster to measure: three nodes with real daemons and the fake hypervisor. As root real nodes (namespaces, disks of their own),
else plain processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.lab.bringup import ATOLL, AnyLab, AnyNode, make_cluster
from atoll.lab.find import remove
from atoll.lab.host import descendants
from atoll.lab.lab import Lab
from atoll.lab.process import ProcessLab
from benchmarks.api import Api, Refused

TICKS = os.sysconf("SC_CLK_TCK")
GIB = 1 << 30


class Cluster:
    """The lab, and what is asked of it."""

    def __init__(self, lab: AnyLab) -> None:
        self.lab = lab
        self.api = self.connect()

    @property
    def first(self) -> AnyNode:
        """The master's node."""
        return self.lab.nodes[0]

    @property
    def socket(self) -> Path:
        """The master's."""
        return self.first.run_dir / "api.sock"

    def connect(self) -> Api:
        """Another connection to the master."""
        return Api(self.socket)

    def pids(self) -> set[int]:
        """Every process of every node: first processes, daemons, workers, guests."""
        found = set()
        for node in self.lab.nodes:
            found |= {node.pid, *descendants(node.pid)}
        return found

    def cpu(self) -> float:
        """CPU seconds that the nodes have used so far, in all processes living and dead."""
        return sum(cpu_of(pid) for pid in self.pids())

    def environment(self) -> dict[str, str]:
        """For the command line on this machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
        return {**kept, "ATOLL_SOCKET": str(self.socket)}

    def command(self, *words: str) -> float:
        """Seconds that a command of the command line takes, with its start."""
        began = time.perf_counter()
        quiet = subprocess.DEVNULL
        subprocess.run([*CLI, *words], check=True, stdout=quiet, stderr=quiet, env=self.environment(), timeout=120)
        return time.perf_counter() - began

    def stop_master(self) -> None:
        """In order."""
        self.api.close()
        self.first.stop_service("master")

    def start_master(self) -> float:
        """Start it; seconds until a request that changes something is accepted."""
        began = time.perf_counter()
        self.first.start_service("master")
        self.serving()
        return time.perf_counter() - began

    def serving(self, seconds: float = 120.0) -> None:
        """Until the master takes jobs: a request that only checks is answered when a job would be taken."""
        end = time.monotonic() + seconds
        while True:
            try:
                status, _ = self.api.request("POST", "/v1/cluster/tags?dry_run=true", {"add": ["x"]})
                if status == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > end:
                raise TimeoutError("the master does not serve")
            time.sleep(0.005)

    def wait_alive(self, seconds: float = 60.0) -> None:
        """Until every node has been heard."""
        until(lambda: all(row["alive"] for row in self.api.get("/v1/nodes")["items"]), seconds)

    def rss(self, pid: int) -> float:
        """Resident memory of a process (VmRSS: with the libraries that it shares with others), in MB."""
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0

    def in_node(self, node: AnyNode, argv: list[str], **more: Any) -> str:
        """What a Python module of this repository says in the node."""
        source = f"{Path(__file__).parents[1]}:{Path(__file__).parents[1] / 'src'}"
        done = node.exec([sys.executable, *argv], check=True, env={"PYTHONPATH": source}, timeout=300, **more)
        return str(done.stdout)


#: As installed, not ``python -m``: what people type.
CLI = [str(Path(sys.executable).parent / "atoll")] if (Path(sys.executable).parent / "atoll").exists() else ATOLL


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended; 0 when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / TICKS


def until(condition: Callable[[], Any], seconds: float) -> Any:
    """Poll what nothing tells us of."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError("it did not come true in time")
        time.sleep(0.01)


@contextmanager
def cluster(
    name: str, *, pools: bool = True, hypervisor: str = "fake", binds: list[str] | None = None, disks: int = 0
) -> Iterator[Cluster]:
    """Make one with the pools ``shared`` (sharedfile) and ``local`` (file), and remove it. ``disks``: spare ones of each node, as root."""
    name = f"{name}{os.getpid()}"
    remove(name)
    lab: AnyLab = Lab.create(name, 3, binds=binds or [], disks=disks) if os.geteuid() == 0 else ProcessLab.create(name, 3)
    try:
        make_cluster(lab, hypervisor)
        made = Cluster(lab)
        made.serving()
        made.wait_alive()
        if pools:
            _pools(made)
        yield made
    finally:
        lab.down()


def _pools(made: Cluster) -> None:
    # Plain processes see this machine's directories, which are no mounts.
    more = {} if isinstance(made.lab, Lab) else {"mount": "none"}
    local = LOCAL if isinstance(made.lab, Lab) else str(made.lab.directory / "local")
    for node in made.lab.nodes:
        node.exec(["mkdir", "-p", local], check=True)
    made.api.do("POST", "/v1/pools", name="shared", driver="sharedfile", options={"path": made.lab.shared, **more})
    made.api.do("POST", "/v1/pools", name="local", driver="file", options={"path": local, **more})


#: Node-local images, on the node's own disk.
LOCAL = "/var/lib/atoll/volumes"

__all__ = ["CLI", "GIB", "Api", "Cluster", "Refused", "cluster", "cpu_of", "until"]
