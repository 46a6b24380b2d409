"""Runs every fault test and says how many cases it was, and how long it took. For ``make faults``; needs root for the last two groups.

A case is one cluster that was brought up, hurt, and checked: a simulated one (a test of the matrix runs hundreds), or a test by itself.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
#: Steps of the state machine of random operations and faults, unless ATOLL_FAULT_STEPS says otherwise.
STEPS = "10000"


@dataclass(frozen=True)
class Group:
    """Tests that are run together. ``jobs``: side by side; labs and guests take turns."""

    name: str
    text: str
    paths: tuple[str, ...]
    jobs: bool = True


_RBD = ("storage_rbd", "storage_rbd_snapshots", "storage_rbd_mapping", "cluster_rbd", "cluster_rbd_devices", "rbd_trouble", "rbd_kills")
_NODES = ("ceph_health", "ceph_deploy", "ceph_life", "kernel_nodes")
CEPH = tuple(f"tests/integration/test_{name}.py" for name in (*_RBD, *_NODES))
_STORE = ("store_sqlite", "power_cut", "store_trouble", "store_full_master", "backup", "replica", "worker", "logs")
STORE = tuple(f"tests/unit/test_{name}.py" for name in _STORE)
API = tuple(f"tests/unit/test_{name}.py" for name in ("rest_fuzz", "rest_roles", "rest_abuse", "httpserver"))
PROCESSES = ("tests/faults/test_kill_steps.py", "tests/faults/test_masters.py")
GROUPS = (
    Group("simulation", "every operation x step x fault, and random ones, in one process", ("tests/simulation",)),
    Group("conformance", "stores, drivers and hypervisors keep their contracts", ("tests/conformance",)),
    Group("store", "kill -9, power cuts, full and failing disks, damage, backups", STORE),
    Group("api", "made-up requests, every credential, clients that mean ill", API),
    Group("processes", "real masters and agents, killed at each step", PROCESSES, False),
    Group("ceph", "guests and disks in a real Ceph, whose nodes come, go and die", CEPH, False),
    Group("guests", "real guests: start, migrate, failover, power cuts", ("tests/faults",), False),
)


@dataclass
class Outcome:
    """What became of a group."""

    tests: int = 0
    cases: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def read(report: Path) -> Outcome:
    """The figures in a report of pytest (JUnit's format)."""
    found = Outcome()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found.tests += 1
        if case.find("failure") is not None or case.find("error") is not None:
            found.failed += 1
        elif case.find("skipped") is not None:
            found.skipped += 1
            continue
        clusters = [int(p.get("value", "0")) for p in case.iter("property") if p.get("name") == "clusters"]
        found.cases += max(1, sum(clusters))
    return found


def run(group: Group, jobs: int, more: list[str]) -> tuple[Outcome, int]:
    """Run a group; its figures, and pytest's exit status."""
    others = {path for other in GROUPS if other is not group for path in other.paths}
    ignored = [f"--ignore={path}" for path in sorted(others) if path not in group.paths]
    with tempfile.TemporaryDirectory(prefix="atoll-faults-") as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *ignored, *group.paths]
        command += ["-n", str(jobs)] if group.jobs else []
        began = time.monotonic()
        status = subprocess.run([*command, *more], cwd=TOP, check=False).returncode
        found = read(report) if report.exists() else Outcome(failed=1)
        found.seconds = time.monotonic() - began
    return found, status


def main() -> int:
    """Exit status 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=", ".join(group.name for group in GROUPS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pytest", default="", help="more options for pytest")
    given = parser.parse_args()
    os.environ.setdefault("ATOLL_FAULT_STEPS", STEPS)
    os.environ.setdefault("ATOLL_EVERY_MOMENT", "1")
    known = {group.name: group for group in GROUPS}
    unknown = set(given.groups) - set(known)
    missing = [path for group in GROUPS for path in group.paths if not (TOP / path).exists()]
    if missing:
        parser.error(f"these tests are gone: {', '.join(missing)}")
    if unknown:
        parser.error(f"there is no group {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    table: list[tuple[str, str, Outcome]] = []
    bad = False
    for group in GROUPS:
        if given.groups and group.name not in given.groups:
            continue
        print(f"\n=== {group.name}: {group.text}", flush=True)
        outcome, status = run(group, given.jobs, shlex.split(given.pytest))
        bad = bad or status != 0
        table.append((group.name, group.text, outcome))
    total = Outcome()
    print(f"\n{'group':<12} {'cases':>7} {'tests':>6} {'failed':>6} {'skipped':>7} {'time':>8}")
    for name, text, one in table:
        print(f"{name:<12} {one.cases:>7} {one.tests:>6} {one.failed:>6} {one.skipped:>7} {one.seconds:>6.0f} s  {text}")
        for field in ("cases", "tests", "failed", "skipped", "seconds"):
            setattr(total, field, getattr(total, field) + getattr(one, field))
    print(f"{'all':<12} {total.cases:>7} {total.tests:>6} {total.failed:>6} {total.skipped:>7} {total.seconds:>6.0f} s")
    if total.skipped:
        print("Skipped tests need root, or programs that are not here.")
    print(f"{'RED' if bad else 'green'}: {total.cases} cases in {total.seconds / 60:.1f} minutes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
