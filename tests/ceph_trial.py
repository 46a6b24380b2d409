"""A lab whose nodes become a Ceph cluster by our own commands, a client that writes all the time, and a look at every command line."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import until

from atoll.lab.bringup import ATOLL, make_cluster
from atoll.lab.lab import Lab
from atoll.lab.nodes import Node
from ceph_writer import SLOTS

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "monmaptool", "rbd")
DISK, MORE, KINDS = "/dev/disk1", "/dev/disk2", ("mon", "mgr", "osd")
#: Given as text: a working copy under /tmp is not to be seen in nodes.
SCRIPT = Path(__file__).with_name("ceph_writer.py")


class Trial:
    """A lab of four nodes with an Atoll cluster, and its command line on node1. node4 is in a group of its own at first."""

    def __init__(self, name: str) -> None:
        self.lab = Lab.create(name, 4, disks=2)
        self.seen: set[str] = set()
        try:
            make_cluster(self.lab, "fake")
            for node in self.lab.nodes:
                for service in node.services():
                    node.set_service(service.name, service.argv, {"ATOLL_FAULT_FILE": f"/run/atoll/fault-{service.name}"})
                    node.stop_service(service.name)
                    node.start_service(service.name)
            self.wait_nodes()
            self.atoll("group", "add", "later")
            self.atoll("group", "assign-nodes", "later", "node4")
        except BaseException:
            self.lab.down()
            raise

    def node(self, name: str) -> Node:
        return self.lab.node(name)

    def atoll(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.node("node1").exec([*ATOLL, *words], timeout=240, check=check)

    def ask(self, *words: str) -> Any:
        return json.loads(self.atoll(*words, "--format", "json").stdout)

    def row(self, node: str) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.ask("node", "list") if row["name"] == node)
        return found

    def wait_nodes(self) -> None:
        def fine() -> bool:
            done = self.atoll("node", "list", "--format", "json", check=False)
            return done.returncode == 0 and all(row["state"] in ("ok", "offline") for row in json.loads(done.stdout))

        until(fine, "all nodes are well")

    def daemons(self, node: str) -> dict[str, int]:
        """Name, such as ``osd.0`` -> pid as this machine sees it."""
        found = {}
        here = self.node(node)
        within = os.readlink(f"/proc/{here.pid}/ns/pid") if here.running else ""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                argv = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
                kind = os.path.basename(argv[0]).removeprefix("ceph-")
                if kind in KINDS and "--mkfs" not in argv and os.readlink(f"/proc/{entry}/ns/pid") == within:
                    found[f"{kind}.{argv[argv.index('-i') + 1]}"] = int(entry)
            except (OSError, ValueError):
                continue
        return found

    def has(self, node: str, path: str) -> bool:
        return self.node(node).exec(["test", "-e", path]).returncode == 0

    def arm(self, node: str, service: str, point: str) -> Path:
        path = self.node(node).run_dir / f"fault-{service}"
        path.write_text(point)
        return path

    def healthy(self) -> bool:
        done = self.atoll("storage", "status", "ceph", "--format", "json", check=False)
        return done.returncode == 0 and json.loads(done.stdout)["health"] == "HEALTH_OK"


class Watching:
    """Every command line on this machine, again and again."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            for entry in filter(str.isdigit, os.listdir("/proc")):
                try:
                    self.seen.add(Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace"))
                except OSError:
                    continue

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


class Writer:
    """A client on node1 that writes from beginning to end. ``pauses``: what -> the longest time that a record took meanwhile."""

    def __init__(self, trial: Trial, image: str = "busy") -> None:
        self.pauses: dict[str, float] = {}
        self._trial, self._image = trial, image
        here = trial.node("node1")
        self._log = here.run_dir / f"{image}.log"
        argv = [sys.executable, "-c", SCRIPT.read_text(), "write", image, f"/run/atoll/{image}.log"]
        self._errors = here.log_dir / f"{image}.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(here.command(argv), env=here.environ(), stdout=errors, stderr=errors)
        try:
            until(lambda: len(self.acks()) > 10 or self._process.poll() is not None, "it writes")
        finally:
            if len(self.acks()) <= 10:
                status = here.exec(["ceph", "-s"], capture_output=True, text=True, timeout=30).stdout
                print(f"writer: exit status {self._process.poll()}, {len(self.acks())} records, {self._errors.read_text()}\n{status}")
        self.check()

    def acks(self) -> list[tuple[int, float]]:
        """Record and when it was acknowledged."""
        text = self._log.read_text() if self._log.exists() else ""
        lines = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
        return [(int(number), float(at)) for number, at in lines]

    def check(self) -> None:
        """It is at it, and had no error."""
        assert self._process.poll() is None, self._errors.read_text()
        assert self._errors.read_text() == ""

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Measure the pauses until it writes on after what is done here."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.check()
        until(lambda: self.acks()[-1][1] > ended, f"it writes on after: {what}", 120)
        at = [when for _, when in self.acks()]
        gaps = [after - before for before, after in itertools.pairwise(at) if after > began and before < ended]
        self.pauses[what] = max(self.pauses.get(what, 0.0), *gaps)
        print(f"{what}: {ended - began:.1f} s, longest pause {self.pauses[what]:.2f} s")
        self.check()

    def end(self) -> None:
        """Let it end by itself; no record that was acknowledged is missing, and none is broken."""
        self.check()
        self._process.terminate()
        assert self._process.wait(timeout=120) in (0, -15), self._errors.read_text()
        last: dict[int, int] = {}
        for number, _ in self.acks():
            last[number % SLOTS] = number
        assert len(last) > 10
        words = (
            self._trial.node("node1").exec([sys.executable, "-c", SCRIPT.read_text(), "read", self._image], check=True, timeout=120).stdout
        )
        found = json.loads(words)
        assert -1 not in found, "a broken record"
        lost = {slot: (number, found[slot]) for slot, number in last.items() if found[slot] < number}
        assert not lost, f"acknowledged and lost: {lost}"
        print(f"{self.acks()[-1][0]} records, pauses: {self.pauses}")


def killed_and_back(trial: Trial, writer: Writer, what: str, node: str, kind: str) -> None:
    """kill -9 of a daemon, until its agent has started it again and Ceph is well."""
    pid = next(pid for found, pid in trial.daemons(node).items() if found.startswith(kind))
    with writer.during(what):
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in trial.daemons(node).values(), "it has ended")
        until(lambda: any(found.startswith(kind) for found in trial.daemons(node)), "the agent has started it again")
    until(trial.healthy, "Ceph is well", 150)


def keys_of(trial: Trial) -> set[str]:
    """Every key of the cluster, as its files have them."""
    found: set[str] = set()
    for node in trial.lab.nodes:
        files = "cat /etc/ceph/*.keyring /etc/atoll/ceph/*.keyring /var/lib/ceph/*/*/keyring"
        found |= set(re.findall(r"key = (\S+)", node.exec(["sh", "-c", files]).stdout))
    return found
