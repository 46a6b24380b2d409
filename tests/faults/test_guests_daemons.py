"""Daemons that die or stand still never stop, pause or harm a running guest (real guests, real daemons)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from support import Cluster, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("guests-daemons"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
#: Longest silence of a writer that nothing has paused, in seconds; generous, for others use this machine too.
CALM = 2.5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(f"gd{os.getpid()}", 3, bandwidth=20 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> str:
    return cluster.add("web", "node2")


def holder(cluster: Cluster, web: str) -> str:
    return cluster.settled(web)


@pytest.mark.parametrize("service", ["agent", "master"])
def test_a_killed_daemon(cluster: Cluster, web: str, service: str) -> None:
    node = holder(cluster, web)
    place = node if service == "agent" else "node1"
    pid, since = cluster.qemu(node, web), time.monotonic()
    dead = cluster.node(place).kill_service(service, signal.SIGKILL)
    until(lambda: cluster.node(place).service_pid(service) not in (0, dead), f"{service} is started again")
    cluster.wait_alive()
    until(lambda: cluster.states(web) == {node: "running"}, "the agents say so")
    assert cluster.wait_state("web", "running")["node"] == node
    cluster.settled(web, on=node)
    assert cluster.qemu(node, web) == pid
    assert cluster.acks.gap(web, since) < CALM
    assert not cluster.findings("web")


@pytest.mark.parametrize("service", ["agent", "master"])
def test_a_daemon_that_stands_still(cluster: Cluster, web: str, service: str) -> None:
    node = holder(cluster, web)
    place = node if service == "agent" else "node1"
    pid, since = cluster.qemu(node, web), time.monotonic()
    cluster.node(place).kill_service(service, signal.SIGSTOP)
    try:
        if service == "agent":
            cluster.wait_silent(node)
            assert cluster.row("instances", "web")["state"] == "unreachable"
        else:
            # Longer than a master waits before it calls nodes silent.
            cluster.acks.beyond(web, cluster.acks.last(web) + 500)
    finally:
        cluster.node(place).kill_service(service, signal.SIGCONT)
    cluster.wait_alive()
    assert cluster.wait_state("web", "running")["node"] == node
    cluster.settled(web, on=node)
    assert cluster.qemu(node, web) == pid
    assert cluster.acks.gap(web, since) < CALM
    assert [j["summary"] for j in cluster.items("jobs") if "restart" in j["summary"] or "readmit" in j["summary"]] == []


def test_the_master_dies_in_the_middle_of_a_migration(cluster: Cluster, web: str) -> None:
    source = holder(cluster, web)
    target = "node3" if source == "node2" else "node2"
    job = cluster.submit("POST", "/v1/instances/web/migrate", node=target)
    until(lambda: cluster.migrating(source, web) == "active", "memory is on its way")
    cluster.node("node1").kill_service("master", signal.SIGKILL)
    ended = cluster.end_of(job)
    assert ended["state"] == "done", ended
    cluster.settled(web, on=target)
    assert cluster.row("instances", "web")["reason"] == ""


def test_every_daemon_at_once(cluster: Cluster, web: str) -> None:
    node = holder(cluster, web)
    pid, since = cluster.qemu(node, web), time.monotonic()
    for each in cluster.lab.nodes:
        for service in each.services():
            each.kill_service(service.name, signal.SIGKILL)
    cluster.wait_alive()
    cluster.settled(web, on=node)
    assert cluster.qemu(node, web) == pid
    assert cluster.acks.gap(web, since) < CALM
