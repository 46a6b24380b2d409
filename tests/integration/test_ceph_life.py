"""The long trial of nodes that come and go, for ``make faults``: who writes meanwhile waits no longer than Ceph by itself lets it wait, and
the master and every agent die at every step of every change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import until

from ceph_trial import DISK, MORE, PROGRAMS, Trial, Writer, killed_and_back

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.xdist_group("ceph-life"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS), reason="Ceph is not installed"),
    pytest.mark.skipif("ATOLL_FAULT_STEPS" not in os.environ, reason="make faults ONLY=ceph"),
]
#: Seconds that a writer waits in Ceph without us: an OSD that goes, one that comes, a monitor, a host that falls silent.
OSD, COMES, MON, HOST = 0.66, 0.24, 0.05, 22.2


@pytest.fixture
def trial() -> Iterator[Trial]:
    made = Trial(f"cl{os.getpid()}")
    try:
        made.atoll("cluster", "modify", "-S", f"ceph:disk={DISK},profile=small")
        yield made
    finally:
        made.lab.down()


def test_a_writer_goes_through_everything(trial: Trial) -> None:
    trial.atoll("storage", "init", "-s", "ceph", "default")
    writer = Writer(trial)
    with writer.during("nothing"):
        # With what every event has besides: commands that ask how it is.
        end = time.monotonic() + 30
        until(lambda: trial.healthy() and time.monotonic() > end, "nothing happens")
    allowed = {"nothing": 0.0}

    bare = by_ceph_alone(trial, writer)
    bare[OSD + COMES] = bare[OSD] + bare[COMES]

    def event(what: str, value: float) -> Any:
        allowed[what] = value
        return writer.during(what)

    for turn in ("", " again"):
        trial.atoll("node", "modify", "node4", "--offline", "yes")
        if not turn:
            trial.atoll("group", "assign-nodes", "default", "node4")
        with event(f"node added{turn}", COMES):
            trial.atoll("node", "add", "node4", "--readd")
            until(lambda: trial.row("node4")["storage"] == "joined", "node4 has joined", 300)
            until(trial.healthy, "Ceph is well", 300)
        for node in ("node2", "node3"):
            with event(f"{node} offline{turn}", OSD):
                trial.atoll("node", "modify", node, "--offline", "yes")
            with event(f"{node} back{turn}", OSD):
                trial.atoll("node", "add", node, "--readd")
                until(trial.healthy, "Ceph is well", 300)
        for node in ("node1", "node2", "node3"):
            # It is started again at once, so it also comes.
            allowed[f"OSD of {node} killed{turn}"], allowed[f"monitor of {node} killed{turn}"] = OSD + COMES, MON
            killed_and_back(trial, writer, f"OSD of {node} killed{turn}", node, "osd.")
            killed_and_back(trial, writer, f"monitor of {node} killed{turn}", node, "mon.")
        with event(f"disk added{turn}", COMES):
            trial.atoll("storage", "add-disks", "node4", MORE)
            until(trial.healthy, "Ceph is well", 300)
        with event(f"disk removed{turn}", COMES):
            trial.atoll("storage", "remove-disks", "node4", MORE)
        with event(f"node drained{turn}", COMES):
            trial.atoll("node", "modify", "node4", "--drain")
    with event("power cut", HOST):
        trial.node("node3").kill()
        until(lambda: not trial.row("node3")["alive"], "node3 is missed", 300)
    with event("node replaced", HOST):
        trial.atoll("storage", "replace-node", "node3", "node4")
        until(trial.healthy, "Ceph is well, and misses nothing", 300)
    writer.end()
    quiet = writer.pauses["nothing"]
    most = {what: 2 * bare.get(value, value) + quiet for what, value in allowed.items()}
    late = {what: f"{pause:.2f} s > {most[what]:.2f} s" for what, pause in writer.pauses.items() if pause > most[what]}
    assert not late, f"with {quiet:.2f} s when nothing happens, and by Ceph alone {bare}: {late}"


def by_ceph_alone(trial: Trial, writer: Writer) -> dict[float, float]:
    """What a writer waits on this machine as busy as it is now when nobody but Ceph acts: the longest of three times, or what is known."""
    here, first = trial.node("node3"), trial.node("node1")
    for _ in range(3):
        for kind in ("osd.", "mon."):
            here.stop_service("agent")
            with writer.during(f"bare {kind}"):
                os.kill(next(pid for name, pid in trial.daemons("node3").items() if name.startswith(kind)), signal.SIGKILL)
                until(lambda: not trial.healthy(), "Ceph misses it")
            here.start_service("agent")
            until(trial.healthy, "Ceph is well", 300)
        with writer.during("bare out and in"):
            for word in ("out", "in"):
                first.exec(["ceph", "osd", word, "2"], check=True, timeout=60)
                until(lambda: trial.ask("storage", "status", "ceph")["placement_groups"], "it tells", 60)
            until(trial.healthy, "Ceph is well", 300)
    found = {OSD: "bare osd.", MON: "bare mon.", COMES: "bare out and in"}
    return {value: max(value, writer.pauses.pop(what)) for value, what in found.items()}


# --- kill -9 at every step ---


class Points:
    """Fault points of one operation, as an undisturbed run has reached them."""

    def __init__(self, trial: Trial, operation: str) -> None:
        self.trial, self.operation = trial, operation
        self.services = [(node.name, service.name) for node in trial.lab.nodes for service in node.services()]

    def trace(self, state: str, *words: str, until_step: str = "") -> list[tuple[str, str, str]]:
        """Run it; (node, service, point) in the order in which they were reached. ``until_step``: cancel it there."""
        files = [(node, service, self.trial.arm(node, service, "trace")) for node, service in self.services]
        for _ in range(5):
            number = self._submit(words)
            if until_step:
                until(lambda number=number: until_step in self._steps(number), f"it comes to {until_step}", 300)
                self.trial.atoll("job", "cancel", number)
            end, told = self._end(number), self.trial.atoll("job", "info", number).stdout
            if end == state or "storage_would_stop" not in told:
                break
            # What is known of Ceph's health is some seconds old: data may still be on its way.
            until(self.trial.healthy, "Ceph is well", 300)
        assert end == state, told
        seen: dict[tuple[str, str, str], float] = {}
        for node, service, path in files:
            path.unlink()
            trace = path.with_name(f"{path.name}.trace")
            for line in trace.read_text().splitlines() if trace.exists() else ():
                at, _, point = line.partition(" ")
                if point.startswith((f"master:{self.operation}:", "agent:ceph.")) and not point.endswith("undo"):
                    seen.setdefault((node, service, point), float(at))
            trace.unlink(missing_ok=True)
        assert len(seen) > 4, seen
        return sorted(seen, key=lambda item: seen[item])

    def _submit(self, words: tuple[str, ...]) -> str:
        """The job's number. An agent that has just died may not be heard again yet."""

        def taken() -> str:
            done = self.trial.atoll(*words, "--submit", check=False)
            assert done.returncode == 0 or "does not answer" in done.stderr, done.stderr
            return str(done.stdout).strip() if done.returncode == 0 else ""

        number: str = until(taken, f"{' '.join(words)} is taken", 120)
        return number

    def _steps(self, number: str) -> list[str]:
        return [step["key"] for step in self.trial.ask("job", "info", number)["steps"]]

    def _state(self, number: str) -> str:
        done = self.trial.atoll("job", "info", number, "--format", "json", check=False)
        return str(json.loads(done.stdout)["state"]) if done.returncode == 0 else ""

    def _ended(self, number: str) -> str:
        """How; empty: it has not."""
        state = self._state(number)
        return state if state in ("done", "undone", "needs-attention") else ""

    def _end(self, number: str) -> str:
        state: str = until(lambda: self._ended(number), "the job has ended", 600)
        assert state != "needs-attention", self.trial.atoll("job", "info", number).stdout
        return state

    def kill_at_each(self, points: list[tuple[str, str, str]], *words: str) -> None:
        """Run it while every process dies once at each of its points. What is undone is asked for again, until it is done."""
        files = {}
        for node, service in self.services:
            mine = [point for n, s, point in points if (n, s) == (node, service)]
            if mine:
                files[node, service] = self.trial.arm(node, service, "\n".join(mine))
        end = ""
        while end != "done":
            number = self._submit(words)
            end = self._end(number)
            left = [f"{node}: {point}" for (node, _), path in files.items() if path.exists() for point in path.read_text().split("\n")]
            print(f"{' '.join(words)}: {end}, {len(points) - len(left)} of {len(points)} died")
            self.trial.wait_nodes()
        for path in files.values():
            path.unlink(missing_ok=True)
        assert len(left) <= len(points) // 10, f"never reached: {left}"


def test_everybody_dies_at_every_step(trial: Trial) -> None:
    init = Points(trial, "storage.init")
    words = ("storage", "init", "-s", "ceph", "default")
    found = init.trace("undone", *words, until_step="health")
    assert not any(trial.daemons(node.name) for node in trial.lab.nodes)
    init.kill_at_each(found, *words)
    until(trial.healthy, "Ceph is well", 300)
    writer = Writer(trial)
    trial.atoll("node", "modify", "node4", "--offline", "yes")
    trial.atoll("group", "assign-nodes", "default", "node4")
    trial.atoll("node", "add", "node4", "--readd")
    until(lambda: trial.row("node4")["storage"] == "joined", "node4 has joined", 300)
    offline, online = ("node", "modify", "node3", "--offline", "yes"), ("node", "modify", "node3", "--offline", "no")
    pairs = [
        ("node.modify", offline, online),
        ("node.add-storage-disks", ("storage", "add-disks", "node4", MORE), ("storage", "remove-disks", "node4", MORE)),
        ("node.leave-storage", ("node", "modify", "node4", "--drain"), ("storage", "join", "node4")),
    ]
    there = {
        "node.modify": "node.modify",
        "node.add-storage-disks": "node.remove-storage-disks",
        "node.leave-storage": "node.join-storage",
    }
    for operation, one, other in pairs:
        first, second = Points(trial, operation), Points(trial, there[operation])
        until(trial.healthy, "Ceph is well", 300)
        to, back = first.trace("done", *one), second.trace("done", *other)
        until(trial.healthy, "Ceph is well", 300)
        first.kill_at_each(to, *one)
        second.kill_at_each(back, *other)
        writer.check()
    until(trial.healthy, "Ceph is well", 300)
    assert {name: sorted(trial.daemons(name)) for name in ("node3", "node4")} == {"node3": ["mon.node3", "osd.2"], "node4": ["osd.3"]}
    writer.end()
