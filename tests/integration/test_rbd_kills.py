"""kill -9 of the master and of agents at every step of what is done on a real Ceph: each job ends by itself, done or undone; Ceph has the
images that the store has, nobody watches one who should not, each guest has one writer, and no key was ever in a command line."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kill_support import points
from rbd_eyes import Sampling, quiet
from rbd_support import RbdCluster, keys
from support import MIB, until

from atoll.lab.smallceph import missing
from ceph_support import LONG

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.xdist_group("rbd-kills"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
Request = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RbdCluster]:
    """``web`` runs, ``idle`` is stopped, ``base`` is a snapshot, ``source`` its volume."""
    made = RbdCluster(f"ck{os.getpid()}", 2)
    try:
        made.add_pool("vms", isolation="volume")
        made.add("web", "node2", pool="vms")
        made.add("idle", "node2", pool="vms", start=False)
        made.do("POST", "/v1/volumes", name="source", pool="vms", size=8 * MIB)
        made.do("POST", "/v1/snapshots", volume="source", name="base")
        yield made
    finally:
        made.close()


def _volume(cluster: RbdCluster, *, there: bool) -> None:
    """``k`` exists and no instance has it, or it does not exist."""
    found = next((volume for volume in cluster.items("volumes") if volume["name"] == "k"), None)
    if found and found["instance"]:
        cluster.do("POST", "/v1/instances/web/detach-disk", volume="k")
    if found and not there:
        cluster.do("DELETE", "/v1/volumes/k")
    if there and not found:
        cluster.do("POST", "/v1/volumes", name="k", pool="vms", size=8 * MIB)


def _snapshot(cluster: RbdCluster, *, there: bool) -> None:
    found = any(snapshot["name"] == "ks" for snapshot in cluster.items("snapshots"))
    if found and not there:
        cluster.do("DELETE", "/v1/snapshots/ks")
    if there and not found:
        cluster.do("POST", "/v1/snapshots", volume="source", name="ks")


def _idle(cluster: RbdCluster) -> None:
    if cluster.row("instances", "idle")["state"] != "stopped":
        cluster.do("POST", "/v1/instances/idle/stop", timeout=0)


def _elsewhere(cluster: RbdCluster) -> dict[str, Any]:
    return {"node": "node1" if cluster.row("instances", "web")["node"] == "node2" else "node2"}


#: What brings the cluster to the beginning of an operation, and the request.
STORIES: dict[str, tuple[Callable[[RbdCluster], object], Callable[[RbdCluster], Request]]] = {
    "volume.create": (
        lambda c: _volume(c, there=False),
        lambda c: ("POST", "/v1/volumes", {"name": "k", "pool": "vms", "size": 8 * MIB}),
    ),
    "volume.delete": (lambda c: _volume(c, there=True), lambda c: ("DELETE", "/v1/volumes/k", {})),
    "from a snapshot": (lambda c: _volume(c, there=False), lambda c: ("POST", "/v1/volumes", {"name": "k", "snapshot": "base"})),
    "snapshot.create": (lambda c: _snapshot(c, there=False), lambda c: ("POST", "/v1/snapshots", {"volume": "source", "name": "ks"})),
    "snapshot.delete": (lambda c: _snapshot(c, there=True), lambda c: ("DELETE", "/v1/snapshots/ks", {})),
    "instance.attach-disk": (lambda c: _volume(c, there=True), lambda c: ("POST", "/v1/instances/web/attach-disk", {"volume": "k"})),
    "instance.start": (_idle, lambda c: ("POST", "/v1/instances/idle/start", {})),
    "instance.migrate": (lambda c: c.settled(_web(c)), lambda c: ("POST", "/v1/instances/web/migrate", _elsewhere(c))),
}
SHORT = ("volume.delete",)


def _web(cluster: RbdCluster) -> str:
    return str(cluster.row("instances", "web")["id"])


def watched_wrongly(cluster: RbdCluster) -> list[str]:
    """Images of which more or fewer have it open than one running guest, or anybody at all where no guest runs."""
    pool = cluster.row("pools", "vms")["options"]["pool"]
    runs = {row["id"] for row in cluster.items("instances") if row["state"] == "running"}
    wrong = []
    for volume in cluster.items("volumes"):
        if volume["pool"] not in ("vms", cluster.row("pools", "vms")["id"]):
            continue
        owner = volume["instance"]
        wanted = int(any(owner in (row["id"], row["name"]) and row["id"] in runs for row in cluster.items("instances")))
        seen = cluster.rbd("status", f"{pool}/{volume['logical_id']}").count("watcher=")
        if seen != wanted:
            wrong.append(f"{volume['name']} is open {seen} times, not {wanted}")
    return wrong


@pytest.mark.parametrize("operation", [pytest.param(name, marks=() if name in SHORT else LONG) for name in STORIES])
def test_kill_at_every_step_on_a_real_ceph(cluster: RbdCluster, operation: str, record_property: Callable[[str, object], None]) -> None:
    begin, request = STORIES[operation]
    begin(cluster)
    secrets = set(keys(cluster))
    with Sampling() as sampling:
        method, path, body = request(cluster)
        undisturbed = cluster.do(method, path, **body)
        cases = points(cluster, cluster.get(f"/v1/jobs/{undisturbed['id']}"))
        assert len(cases) > 2, "the journal tells no steps"
        if "ATOLL_FAULT_STEPS" not in os.environ:
            cases = random.Random(f"{os.environ.get('ATOLL_FAULT_SEED', '1')} {operation}").sample(cases, 2)
        for _, service, point in cases:
            _one(cluster, begin, request, service, point)
            secrets |= set(keys(cluster))
    record_property("clusters", len(cases))
    assert sampling.saw("atoll.runtime.workermain")
    assert sampling.told(secrets) == []


def _one(
    cluster: RbdCluster, begin: Callable[[RbdCluster], object], request: Callable[[RbdCluster], Request], service: str, point: str
) -> None:
    begin(cluster)
    method, path, body = request(cluster)
    nodes = ["node1"] if service == "master" else [node.name for node in cluster.lab.nodes]
    armed = [cluster.arm(node, service, point) for node in nodes]
    try:
        end = cluster.end_of(cluster.submit(method, path, **body), 300)
        fired = [path for path in armed if not path.exists()]
    finally:
        for path_ in armed:
            path_.unlink(missing_ok=True)
    print(f"{point}: {end['state']}")
    assert fired, f"{point} was not reached: {end}"
    assert end["state"] in ("done", "undone"), f"killed at {point}: {end}"
    cluster.wait_alive()
    quiet(cluster, "vms")
    cluster.settled(_web(cluster))
    wrong: list[str] = []

    def right() -> bool:
        wrong[:] = watched_wrongly(cluster)
        return not wrong

    try:
        # A worker that was killed counts for half a minute.
        until(right, "the images are watched by whom they should be")
    except AssertionError:
        raise AssertionError(f"killed at {point}: {wrong}") from None
    assert cluster.findings() == [], f"killed at {point}"
