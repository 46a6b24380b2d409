"""What must hold on a real Ceph after a fault, and eyes on all command lines and on the API."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from rbd_support import RbdCluster
from support import Cluster, until


def stored(cluster: RbdCluster, pool: str) -> tuple[set[str], set[str]]:
    """What is in the Ceph pool beside Atoll's probe, the trash included; and what the store knows to be there."""
    row = cluster.row("pools", pool)
    ceph = row["options"]["pool"]
    names = cluster.rbd("ls", ceph).split() + [line.split()[1] for line in cluster.rbd("trash", "ls", "--all", ceph).splitlines()]
    known = {volume["logical_id"] for volume in cluster.items("volumes") if volume["pool"] in (row["id"], row["name"])}
    return {name for name in names if not name.startswith("atoll-probe.")}, known


def quiet(cluster: RbdCluster, pool: str) -> None:
    """Wait until every job has ended by itself; then nothing is half made, and Ceph has what the store has."""

    def unsettled() -> list[str]:
        jobs = cluster.items("jobs")
        found = [f"job {j['id']} {j['operation']} is {j['state']}: {j.get('reason')}" for j in jobs if j["state"] not in ("done", "undone")]
        found += [f"volume {v['name']} is {v['state']}" for v in cluster.items("volumes") if v["state"] not in ("available", "in-use")]
        found += [f"snapshot {s['name']} is {s['state']}" for s in cluster.items("snapshots") if s["state"] != "completed"]
        return found

    said: list[str] = []

    def calm() -> bool:
        said[:] = unsettled()
        return not said

    try:
        until(calm, "all is settled", 180)
    except AssertionError:
        raise AssertionError(f"not settled: {said}") from None
    images, known = stored(cluster, pool)
    assert images == known, f"only in Ceph: {images - known}, only in the store: {known - images}"


class Sampling(threading.Thread):
    """Every command line and environment on this machine, again and again: in ``seen``, as bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        times: dict[str, int] = {}
        turn = 0
        while not self._stop_asked.wait(0.03):
            turn += 1
            present = set(filter(str.isdigit, os.listdir("/proc")))
            times = {pid: times.get(pid, 0) + 1 for pid in present}
            for pid in present:
                # Who lives long is looked at now and then only.
                if times[pid] < 10 or turn % 20 == 0:
                    for part in ("cmdline", "environ"):
                        try:
                            self.seen.add(Path(f"/proc/{pid}/{part}").read_bytes())
                        except OSError:
                            continue

    def __enter__(self) -> Sampling:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_asked.set()
        self.join()

    def told(self, secrets: set[str]) -> list[bytes]:
        """The command lines and environments in which one of these is."""
        return [text[:200] for text in self.seen if any(secret.encode() in text for secret in secrets)]

    def saw(self, word: str) -> bool:
        return any(word.encode() in text for text in self.seen)


class Polling(threading.Thread):
    """Asks the API all the time, and remembers the longest answer."""

    PATHS = ("/v1/instances", "/v1/pools", "/v1/nodes", "/v1/volumes", "/v1/jobs")

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._cluster = cluster
        self.longest, self.asked, self.failed = 0.0, 0, ""
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.05):
            path = self.PATHS[self.asked % len(self.PATHS)]
            begin = time.monotonic()
            try:
                self._cluster.get(path)
            except (AssertionError, OSError) as error:
                self.failed = f"{path}: {error}"
            self.longest = max(self.longest, time.monotonic() - begin)
            self.asked += 1

    def __enter__(self) -> Polling:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_asked.set()
        self.join()
