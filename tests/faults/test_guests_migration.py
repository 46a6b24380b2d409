"""The table of a live migration, row by row: each part of it is killed, or cut off, in each of its phases (real guests, real daemons).

After each case exactly one copy runs, the claim names it, everything that was acknowledged is on the disk, and no record was ever
acknowledged twice.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support import Cluster, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("guests-migration"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
#: Where the phases are held: the source's agent has done it, and its answer is not yet given.
PAUSE, COMPLETED = "agent:guest.migrate_out:after", "agent:guest.migrate_continue:after"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Slow enough that the phase of the memory takes some seconds.
    made = Cluster(f"gm{os.getpid()}", 3, bandwidth=20 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> str:
    return cluster.add("web", "node2")


class Move:
    """A migration under way, and the parts that can be broken."""

    def __init__(self, cluster: Cluster, web: str) -> None:
        self.cluster, self.web = cluster, web
        self.source = cluster.settled(web)
        self.target = "node3" if self.source == "node2" else "node2"
        self.healing = ExitStack()
        self.job = 0

    def begin(self, phase: str) -> None:
        """Up to the phase: ``memory``, ``pause`` (before the switchover) or ``completed`` (before the target runs)."""
        cluster, web = self.cluster, self.web
        if phase != "memory":
            self.held = cluster.hold(self.source, "agent", PAUSE if phase == "pause" else COMPLETED)
            self.healing.callback(self.held.release)
        self.job = cluster.submit("POST", "/v1/instances/web/migrate", node=self.target)
        if phase == "memory":
            until(lambda: cluster.migrating(self.source, web) == "active", "memory is on its way")
        else:
            self.held.reached()
        if phase == "completed":
            assert cluster.states(web) == {self.source: "migrated", self.target: "paused"}

    def strike(self, victim: str) -> None:
        cluster = self.cluster
        if victim == "master":
            cluster.node("node1").kill_service("master", signal.SIGKILL)
            return
        what, _, where = victim.partition(" of ")
        node = {"source": self.source, "target": self.target}[where]
        if what == "guest":
            cluster.kill_qemu(node, self.web)
        elif what == "agent":
            cluster.node(node).kill_service("agent", signal.SIGKILL)
        elif what == "watchdog":
            pid = cluster.watchdog(node, self.web)
            assert pid
            os.kill(pid, signal.SIGKILL)
        else:
            assert what == "link"
            cluster.node(node).cut()
            self.healing.callback(cluster.node(node).heal)

    def end(self) -> dict[str, object]:
        """Everything is mended; the job's end, after what it asked a person to type."""
        self.healing.close()
        found = self.cluster.end_of(self.job)
        assert found["state"] != "needs-attention", found
        return found


@pytest.fixture
def move(cluster: Cluster, web: str) -> Iterator[Move]:
    made = Move(cluster, web)
    yield made
    made.healing.close()


#: (phase, victim) -> how the job ends, and where the guest runs then (``cold``: it was started anew, somewhere).
TABLE = {
    ("memory", "guest of source"): ("undone", "source"),
    ("memory", "guest of target"): ("undone", "source"),
    ("memory", "agent of source"): ("done", "target"),
    ("memory", "agent of target"): ("done", "target"),
    ("memory", "watchdog of source"): ("done", "target"),
    ("memory", "master"): ("done", "target"),
    ("pause", "guest of source"): ("done", "cold"),
    ("pause", "guest of target"): ("undone", "source"),
    ("pause", "agent of source"): ("done", "target"),
    ("pause", "agent of target"): ("done", "target"),
    ("pause", "watchdog of source"): ("done", "target"),
    ("pause", "master"): ("done", "target"),
    ("completed", "guest of source"): ("done", "target"),
    ("completed", "guest of target"): ("done", "cold"),
    ("completed", "agent of source"): ("done", "target"),
    ("completed", "agent of target"): ("done", "target"),
    ("completed", "master"): ("done", "target"),
}


@pytest.mark.parametrize(("phase", "victim"), TABLE, ids=lambda word: str(word).replace(" ", "-"))
def test_killed(cluster: Cluster, web: str, move: Move, phase: str, victim: str) -> None:
    state, place = TABLE[phase, victim]
    move.begin(phase)
    move.strike(victim)
    ended = move.end()
    assert ended["state"] == state, ended
    node = {"source": move.source, "target": move.target}.get(place, "")
    cluster.settled(web, on=node)
    result = ended["result"] or {}
    assert isinstance(result, dict)
    assert result.get("cold_start", False) is (place == "cold"), ended
    assert not cluster.findings("web"), cluster.findings("web")


@pytest.mark.parametrize("side", ["source", "target"])
def test_cut_off_while_memory_travels(cluster: Cluster, web: str, move: Move, side: str) -> None:
    """The guest goes on where it is, all the time."""
    move.begin("memory")
    since = time.monotonic()
    move.strike(f"link of {side}")
    cluster.wait_silent(move.source if side == "source" else move.target)
    assert cluster.acks.gap(web, since) < 2.5
    ended = move.end()
    cluster.wait_alive()
    assert ended["state"] in ("done", "undone")
    cluster.settled(web, on=move.target if ended["state"] == "done" else move.source)


@pytest.mark.parametrize("side", ["source", "target"])
def test_cut_off_at_the_pause(cluster: Cluster, web: str, move: Move, side: str) -> None:
    """Nobody can tell the source to go on: its watchdog lets the guest run on, still cut off."""
    move.begin("pause")
    paused = cluster.acks.last(web)
    move.strike(f"link of {side}")
    move.held.release()
    cluster.acks.beyond(web, paused + 1, 40)
    assert cluster.states(web)[move.source] == "running"
    ended = move.end()
    assert (ended["state"], ended["error"]["code"]) == ("undone", "migration_failed"), ended  # type: ignore[index]
    cluster.wait_alive()
    cluster.settled(web, on=move.source)


def test_nobody_drives_it_any_more(cluster: Cluster, web: str, move: Move) -> None:
    """Master and agent stand still at the pause: the watchdog, a process of its own, lets the guest run on."""
    move.begin("pause")
    paused = cluster.acks.last(web)
    for node, service in (("node1", "master"), (move.source, "agent")):
        cluster.node(node).kill_service(service, signal.SIGSTOP)
        move.healing.callback(cluster.node(node).kill_service, service, signal.SIGCONT)
    cluster.acks.beyond(web, paused + 1, 40)
    ended = move.end()
    assert ended["state"] == "undone", ended
    cluster.wait_alive()
    cluster.settled(web, on=move.source)


@pytest.mark.parametrize("side", ["source", "target"])
def test_cut_off_when_completed(cluster: Cluster, web: str, move: Move, side: str) -> None:
    """Who has the guest cannot be asked: nothing runs until a person has mended it and typed what is printed."""
    move.begin("completed")
    node = move.source if side == "source" else move.target
    move.strike(f"link of {side}")
    move.held.release()
    ended = cluster.end_of(move.job, 200)
    assert ended["state"] == "needs-attention", ended
    assert node in ended["reason"], ended
    assert "running" not in cluster.states(web).values()
    assert cluster.refused("POST", "/v1/instances/web/start") == "held"
    assert cluster.refused("POST", "/v1/instances/web/failover") == "held"
    assert ended["commands"][0] in {c for f in cluster.findings() for c in f["commands"]}
    move.healing.close()
    cluster.wait_alive()
    said = cluster.type(ended["commands"][0])
    assert "done" in said, said
    cluster.settled(web, on=move.target)


@pytest.mark.parametrize("side", ["source", "target"])
def test_dead_when_completed(cluster: Cluster, web: str, move: Move, side: str) -> None:
    """The same, but the node has lost power, and a person says so with the other command that is printed."""
    move.begin("completed")
    node = move.source if side == "source" else move.target
    cluster.node(node).kill()
    move.healing.callback(cluster.wait_alive, node)
    move.healing.callback(cluster.node(node).boot)
    move.held.release()
    ended = cluster.end_of(move.job, 200)
    assert ended["state"] == "needs-attention", ended
    command = next(c for c in ended["commands"] if "--node-is-dead" in c)
    said = cluster.type(command)
    assert "done" in said, said
    other = move.target if side == "source" else move.source
    cluster.settled(web, on=other)
    move.healing.close()
    cluster.settled(web, on=other)
