"""Failover: a claim leaves a node only by its agent's word or by a proof of death, and orders that come late start nothing."""

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
    pytest.mark.xdist_group("guests-failover"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(f"gf{os.getpid()}", 3)
    try:
        # A share that carries no locks: nobody can tell who writes.
        path = f"{made.lab.shared}/blind"
        made.node("node1").exec(["mkdir", path], check=True)
        added = made.do("POST", "/v1/pools", name="blind", driver="sharedfile", options={"path": path, "locking": "off"})
        assert added["result"]["writers"] == "none"
        yield made
    finally:
        made.close()


@pytest.fixture
def healing(cluster: Cluster) -> Iterator[ExitStack]:
    """Mends what a test has broken, also when it fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["shared", "blind"])
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def remove(cluster: Cluster, name: str) -> None:
    cluster.do("DELETE", f"/v1/instances/{name}", timeout=0)
    assert cluster.findings() == []


def test_a_start_that_comes_long_after_the_failover(cluster: Cluster, pool: str, healing: ExitStack) -> None:
    """The order has reached the agent, which stands still. Its node is cut off, called dead, and the guest started elsewhere; then the
    agent goes on, at first still cut off: it must not start its copy, whatever the storage would allow."""
    late = cluster.add("late", "node2", pool=pool, start=False)
    held = cluster.hold("node2", "agent", "agent:guest.start:before")
    healing.callback(held.release)
    job = cluster.submit("POST", "/v1/instances/late/start", node="node2")
    held.reached()
    cluster.node("node2").kill_service("agent", signal.SIGSTOP)
    go_on = healing.enter_context(ExitStack())
    go_on.callback(cluster.node("node2").kill_service, "agent", signal.SIGCONT)
    cluster.node("node2").cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node("node2").heal)
    cluster.wait_silent("node2")
    assert cluster.refused("POST", "/v1/instances/late/start", node="node3", node_is_dead=False) == "needs_proof"
    cluster.do("POST", "/v1/nodes/node2/declare-dead")
    assert cluster.end_of(job)["state"] == "undone"
    cluster.do("POST", "/v1/instances/late/start", node="node3")
    cluster.acks.beyond(late, 20)
    pid = cluster.qemu("node3", late)
    held.release()
    go_on.close()
    until(lambda: cluster.states(late) == {"node3": "running"}, "both agents answer, and one has it")
    cluster.acks.beyond(late, cluster.acks.last(late) + 100)
    assert not cluster.qemu("node2", late)
    cluster.node("node2").heal()
    cluster.wait_alive()
    cluster.acks.beyond(late, cluster.acks.last(late) + 100)
    cluster.settled(late, on="node3")
    assert cluster.qemu("node3", late) == pid
    remove(cluster, "late")


def test_a_start_that_comes_after_its_agents_own_word(cluster: Cluster, healing: ExitStack) -> None:
    """The order is undone while the agent still holds it; a start elsewhere then rests on the agent's promise alone."""
    late = cluster.add("late", "node2", pool="blind", start=False)
    held = cluster.hold("node2", "agent", "agent:guest.start:before")
    healing.callback(held.release)
    job = cluster.submit("POST", "/v1/instances/late/start", node="node2")
    held.reached()
    assert cluster.request("POST", f"/v1/jobs/{job}/cancel")[0] == 200
    assert cluster.end_of(job)["state"] == "undone"
    cluster.do("POST", "/v1/instances/late/start", node="node3")
    held.release()
    cluster.acks.beyond(late, 50)
    assert not cluster.qemu("node2", late)
    cluster.settled(late, on="node3")
    remove(cluster, "late")


def test_power_cut_and_failover(cluster: Cluster, healing: ExitStack) -> None:
    web = cluster.add("web", "node2")
    cluster.acks.beyond(web, 200)
    cluster.node("node2").kill()
    healing.callback(cluster.wait_alive)
    healing.callback(lambda: cluster.node("node2").running or cluster.node("node2").boot())
    promised = cluster.acks.last(web)
    assert cluster.refused("POST", "/v1/instances/web/failover", node_is_dead=True) == "node_answers", "it was heard a moment ago"
    cluster.wait_silent("node2")
    assert cluster.refused("POST", "/v1/instances/web/failover") == "needs_proof"
    done = cluster.do("POST", "/v1/instances/web/failover", node_is_dead=True)
    assert done["result"]["node"] == "node3"
    cluster.acks.beyond(web, promised)
    cluster.settled(web, on="node3")
    cluster.node("node2").boot()
    cluster.wait_alive()
    cluster.settled(web, on="node3")
    assert cluster.findings() == []
    # The proof was for that moment: now it answers.
    assert cluster.refused("POST", "/v1/nodes/node2/declare-dead") == "node_answers"
    cluster.do("POST", "/v1/instances/web/migrate", node="node2")
    cluster.settled(web, on="node2")


def test_an_answering_node_is_not_dead(cluster: Cluster) -> None:
    web = cluster.row("instances", "web")["id"]
    node = cluster.settled(web)
    pid = cluster.qemu(node, web)
    for path in ("instances/web/failover", "instances/web/start", f"nodes/{node}/failover"):
        assert cluster.refused("POST", f"/v1/{path}", node_is_dead=True) == "node_answers"
    assert cluster.refused("POST", f"/v1/nodes/{node}/declare-dead") == "node_answers"
    cluster.settled(web, on=node)
    assert cluster.qemu(node, web) == pid


def test_the_storage_contradicts_a_person(cluster: Cluster, healing: ExitStack) -> None:
    """The node is only cut off, and its guest writes: the storage sees that, and everything stays as it was."""
    web = cluster.row("instances", "web")["id"]
    node = cluster.settled(web)
    pid, since = cluster.qemu(node, web), time.monotonic()
    cluster.node(node).cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node(node).heal)
    cluster.wait_silent(node)
    assert cluster.refused("POST", "/v1/instances/web/failover", node_is_dead=True) == "disk_in_use"
    assert cluster.row("instances", "web")["claim"]["holder"] == node
    cluster.acks.beyond(web, cluster.acks.last(web) + 300)
    healing.close()
    cluster.settled(web, on=node)
    assert cluster.qemu(node, web) == pid
    assert cluster.acks.gap(web, since) < 2.5
    remove(cluster, "web")


def test_nothing_starts_elsewhere_without_a_proof(cluster: Cluster, healing: ExitStack) -> None:
    """A guest on storage that cannot tell who writes, and a node that cannot be asked: every way to start it again is refused."""
    web = cluster.add("web", "node2", pool="blind", disks=2)
    other = cluster.add("other", "node3", pool="blind", start=False)
    row = cluster.row("instances", "web")
    pid, since = cluster.qemu("node2", web), time.monotonic()
    image = cluster.row("volumes", row["disks"][0]["volume"])["logical_id"]
    cluster.node("node2").cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node("node2").heal)
    cluster.wait_silent("node2")
    for path, body in [
        ("instances/web/failover", {}),
        ("instances/web/failover", {"node": "node3"}),
        ("instances/web/start", {}),
        ("instances/web/start", {"node": "node3"}),
    ]:
        status, problem = cluster.request("POST", f"/v1/{path}", body)
        assert (status, problem["code"]) == (409, "needs_proof"), (path, problem)
        assert "cannot even tell who writes" in problem["detail"]
        assert "--node-is-dead" in problem["hint"]
    for method, path, body, code in [
        ("POST", "instances/web/migrate", {"node": "node3"}, "node_unavailable"),
        ("POST", "instances/web/move", {"node": "node3"}, "node_unavailable"),
        ("POST", "instances/web/reboot", {"type": "full"}, "node_unavailable"),
        ("POST", "instances/web/stop", {"timeout": 0}, "node_unavailable"),
        ("DELETE", "instances/web", {"keep_disks": True}, "wrong_state"),
        ("POST", "instances/web/recreate", {}, "in_use"),
        ("POST", "instances/web/activate-disks", {"node": "node3"}, "in_use"),
        ("POST", "instances/web/deactivate-disks", {"node": "node3"}, "in_use"),
        ("POST", "instances/web/rename", {"new_name": "shop"}, "in_use"),
        ("POST", "instances/web/detach-disk", {"index": 1}, "node_unavailable"),
        ("POST", "instances/web/grow-disk", {"index": 1, "increment": 1 << 20}, "node_unavailable"),
        ("POST", "instances/other/attach-disk", {"volume": "web-disk1"}, "in_use"),
        ("POST", "volumes", {"pool": "blind", "adopt": image}, "wrong_state"),
        ("DELETE", "volumes/web-disk1", {}, "in_use"),
        ("POST", "volumes/web-disk1/grow", {"increment": 1 << 20}, "in_use"),
        ("POST", "nodes/node2/migrate", {"target": "node3"}, "node_unavailable"),
        ("POST", "nodes/node2/evacuate", {"target": "node3"}, "node_unavailable"),
        ("POST", "nodes/node2/failover", {"target": "node3"}, "wrong_state"),
        ("DELETE", "nodes/node2", {}, "in_use"),
    ]:
        assert cluster.refused(method, f"/v1/{path}", **body) == code, path
    # Nor does a new master, which knows the node from its records alone, nor its loop that restarts missing guests.
    cluster.node("node1").kill_service("master", signal.SIGKILL)
    until(lambda: cluster.row("nodes", "node3")["alive"], "the new master hears of the nodes")
    cluster.acks.beyond(web, cluster.acks.last(web) + 300)
    assert cluster.row("instances", "web")["claim"] == row["claim"]
    assert not cluster.qemu("node3", web)
    assert not cluster.qemu("node1", web)
    assert cluster.qemu("node2", web) == pid
    healing.close()
    cluster.settled(web, on="node2")
    assert cluster.acks.gap(web, since) < 2.5
    # (a): it answers again, so that it can be asked, and gives its word.
    cluster.do("POST", "/v1/instances/web/failover", timeout=0)
    cluster.settled(web, on="node3")
    cluster.do("DELETE", "/v1/instances/other")
    assert not cluster.acks.text(other)
    remove(cluster, "web")


def test_a_node_returns_with_a_stale_guest(cluster: Cluster, healing: ExitStack) -> None:
    """A person was wrong, on storage that cannot tell who writes: what was lost by that is lost, but the stale copy ends, and only it."""
    web = cluster.add("web", "node2", pool="blind")
    cluster.node("node2").cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node("node2").heal)
    cluster.wait_silent("node2")
    cluster.do("POST", "/v1/instances/web/failover", node="node3", node_is_dead=True)
    pid, stale = cluster.qemu("node3", web), cluster.qemu("node2", web)
    assert pid
    assert stale
    until(lambda: cluster.sight.both(web), "both copies are seen, so that all these tests can see two writers")
    healing.close()
    until(lambda: not cluster.qemu("node2", web), "the stale copy is ended")
    assert cluster.qemu("node3", web) == pid
    assert cluster.row("instances", "web")["claim"]["holder"] == "node3"
    last = cluster.acks.last(web)
    cluster.acks.beyond(web, last + 20)
    assert cluster.states(web) == {"node3": "running"}
    # What it cannot do any more is start again: its node refuses the old generation for ever.
    cluster.node("node2").kill_service("agent", signal.SIGKILL)
    cluster.wait_alive()
    assert not cluster.qemu("node2", web)
    cluster.do("DELETE", "/v1/instances/web", timeout=0)
