"""Guests whose disks are in a real Ceph, on real nodes: their whole life, and that there is one writer whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rbd_support import RbdCluster, keys, runstate
from support import MIB, until

from atoll.lab import network
from atoll.lab.guest.ring import check_ring
from atoll.lab.layout import netns_name
from atoll.lab.loops import machine_id
from atoll.lab.smallceph import missing
from atoll.storage.files import loops
from ceph_support import LONG

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("cluster-rbd"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RbdCluster]:
    made = RbdCluster(f"cr{os.getpid()}", 3)
    try:
        made.add_pool("vms", isolation="volume")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def web(cluster: RbdCluster) -> str:
    """A guest with two disks in Ceph. Each test leaves it running."""
    return cluster.add("web", "node2", disks=2, pool="vms")


def test_a_guest_in_user_space_leaves_nothing_on_the_node_but_a_key_in_memory(cluster: RbdCluster, web: str) -> None:
    assert cluster.settled(web) == "node2"
    row = cluster.row("instances", "web")
    assert [disk["access"] for disk in row["disks"]] == ["userspace", "userspace"]
    assert cluster.row("pools", "vms")["writers"] == "advisory"
    node = cluster.node("node2")
    mounts = Path(f"/proc/{node.pid}/mounts").read_text()
    assert "rbd" not in mounts
    assert "fuse" not in mounts
    assert loops.mapped(machine_id(cluster.lab.name, "node2")) == {}
    assert not [line for line in cluster.argv("node2").splitlines() if "storage-daemon" in line or "rbd-nbd" in line]
    assert not (node.run_dir / "maps").exists()
    assert not [name for name in os.listdir(node.root / "dev") if name.startswith(("rbd", "nbd"))]
    assert not any(key in cluster.argv("node2") for key in keys(cluster))
    volume = row["disks"][0]["volume"]
    assert (node.run_dir / "keys" / f"{volume}.key").stat().st_mode & 0o777 == 0o400
    assert not (node.root / "etc" / "atoll" / "manager.keyring").exists()
    assert not any(key in (node.run_dir / "guests" / web / "spec.json").read_text() for key in keys(cluster))
    assert cluster.findings() == []


def test_a_pool_that_cannot_be_is_refused_and_leaves_nothing(cluster: RbdCluster) -> None:
    conf, keyring = str(cluster.ceph.conf), str(cluster.ceph.place / "client.admin.keyring")
    assert cluster.refused("POST", "/v1/pools", name="x", driver="rbd", options={"pool": "x", "features": "3"}) == "invalid_input"
    options = {"pool": "nothing", "conf": conf, "user": "admin", "keyring": keyring}
    assert cluster.refused("POST", "/v1/pools", name="x", driver="rbd", options=options) == "pool_unavailable"
    assert cluster.findings() == []


def test_migrate_while_it_writes(cluster: RbdCluster, web: str) -> None:
    source = cluster.settled(web)
    target = "node3" if source == "node2" else "node2"
    done = cluster.do("POST", "/v1/instances/web/migrate", node=target)
    assert done["result"]["node"] == target
    cluster.settled(web, on=target)
    volume = cluster.row("instances", "web")["disks"][0]["volume"]
    assert not (cluster.node(source).run_dir / "keys" / f"{volume}.key").exists()
    users = cluster.ceph.run("ceph", "auth", "ls")
    assert (f"client.atoll-{target}.{volume}" in users, f"client.atoll-{source}.{volume}" in users) == (True, False)


def test_disks_come_grow_and_go_while_it_runs(cluster: RbdCluster, web: str) -> None:
    cluster.do("POST", "/v1/volumes", name="extra", pool="vms", size=16 * MIB)
    cluster.do("POST", "/v1/instances/web/attach-disk", volume="extra")
    cluster.acks.says(web, "SIZE vdc 16777216")
    cluster.do("POST", "/v1/instances/web/grow-disk", index=2, size=32 * MIB)
    cluster.acks.says(web, "SIZE vdc 33554432")
    assert '"size":33554432' in cluster.rbd("info", cluster.image_spec(web, 2), "--format", "json")
    cluster.do("POST", "/v1/instances/web/detach-disk", volume="extra")
    cluster.do("DELETE", "/v1/volumes/extra")
    pool = cluster.row("pools", "vms")["options"]["pool"]
    assert "extra" not in cluster.rbd("ls", pool) + cluster.rbd("trash", "ls", "--all", pool)
    cluster.settled(web)


def test_nearly_full_storage_takes_no_new_volumes_until_there_is_room(cluster: RbdCluster, web: str, healing: ExitStack) -> None:
    def health() -> dict[str, Any]:
        found: dict[str, Any] = cluster.row("pools", "vms")["health"]
        return found

    until(lambda: health()["state"] == "ok", "a sample")
    cluster.do("POST", "/v1/volumes", name="early", pool="vms", size=16 * MIB)
    healing.callback(cluster.ceph.run, "ceph", "osd", "set-nearfull-ratio", "0.85")
    cluster.ceph.run("ceph", "osd", "set-nearfull-ratio", "0.000001")
    until(lambda: health()["refuses_volumes"], "Ceph calls itself nearly full")
    assert cluster.refused("POST", "/v1/volumes", name="late", pool="vms", size=16 * MIB) == "pool_unhealthy"
    assert cluster.refused("POST", "/v1/volumes/early/grow", size=32 * MIB) == "pool_unhealthy"
    said = cluster.type("atoll volume create late -p vms --size 16M")
    assert "is nearly full: an OSD of it has reached" in said
    assert "(POOL_NEARFULL)" in said
    assert "ceph osd df" in said
    assert "POOL_NEARFULL" in cluster.type("atoll storage status")
    assert "no new volumes, because Ceph pool" in cluster.type("atoll storage status vms")
    # Guests go on, and what makes room is not refused.
    cluster.settled(web)
    cluster.do("DELETE", "/v1/volumes/early")
    healing.close()
    until(lambda: not health()["refuses_volumes"], "Ceph has room again")
    cluster.do("POST", "/v1/volumes", name="late", pool="vms", size=16 * MIB)
    cluster.do("DELETE", "/v1/volumes/late")


def test_a_killed_guest_starts_again_at_once_although_ceph_still_sees_it(cluster: RbdCluster, web: str) -> None:
    """Its watch and its lock stay for half a minute. Its agent says that it is gone: so it is shut out, not waited for."""
    node = cluster.settled(web)
    before = cluster.qemu(node, web)
    cluster.kill_qemu(node, web)
    until(lambda: cluster.qemu(node, web) not in (0, before), "it has a new process")
    cluster.settled(web, on=node)
    assert cluster.ceph.run("ceph", "osd", "blocklist", "ls").count(":0/") == 2


def test_a_killed_guest_starts_on_another_node(cluster: RbdCluster, web: str) -> None:
    node = cluster.settled(web)
    target = "node3" if node == "node2" else "node2"
    cluster.do("POST", "/v1/instances/web/stop", timeout=0)
    cluster.do("POST", "/v1/instances/web/start", node=target)
    cluster.settled(web, on=target)


def test_who_else_has_the_image_open_is_told_and_left_alone(cluster: RbdCluster, healing: ExitStack) -> None:
    """Exclusive locks alone would let both run, and hand the lock to and fro."""
    instance = cluster.add("twice", "node2", pool="vms", start=False)
    argv = ["qemu-io", "-f", "raw", f"rbd:{cluster.image_spec(instance)}:id=admin:conf={cluster.ceph.conf}"]
    within = ["nsenter", f"--net={network.NETNS_DIR}/{netns_name(cluster.lab.name, 'switch')}", "--"]
    other = subprocess.Popen([*within, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    healing.callback(other.wait)
    healing.callback(other.kill)
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("write 0 4096\n")
    other.stdin.flush()
    until(lambda: "wrote 4096" in other.stdout.readline(), "it has written")
    assert cluster.refused("POST", "/v1/instances/twice/start") == "disk_in_use"
    assert f"client.atoll-node2.{cluster.row('instances', 'twice')['disks'][0]['volume']}" not in cluster.ceph.run("ceph", "auth", "ls")
    other.stdin.write("write 4096 4096\n")
    other.stdin.flush()
    until(lambda: "wrote 4096" in other.stdout.readline(), "it goes on to write")
    other.stdin.close()
    other.wait(30)
    cluster.do("POST", "/v1/instances/twice/start")
    cluster.settled(instance)
    cluster.do("DELETE", "/v1/instances/twice", timeout=0)


def entries(cluster: RbdCluster) -> set[str]:
    """The addresses that Ceph shuts out."""
    return {line.split()[0] for line in cluster.ceph.run("ceph", "osd", "blocklist", "ls").splitlines() if line.strip()}


def test_failover_shuts_out_the_guest_of_a_node_that_is_cut_off(cluster: RbdCluster, web: str, healing: ExitStack) -> None:
    """The node is not dead, as was said: its guest goes on and its storage comes back. It must not write one byte more."""
    node = cluster.settled(web)
    target = next(name for name in ("node2", "node3") if name != node)
    before = entries(cluster)
    cluster.node(node).cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node(node).heal)
    cluster.wait_silent(node)
    # Its agent stands still, so that Ceph alone keeps it from writing; and so that nobody is told of two guests, which there are.
    agent = next(service.pid for service in cluster.node(node).services() if service.name == "agent")
    os.kill(agent, signal.SIGSTOP)
    healing.callback(os.kill, agent, signal.SIGCONT)
    cluster.do("POST", "/v1/instances/web/failover", node=target, node_is_dead=True)
    until(lambda: cluster.qemu(target, web), "it runs elsewhere")
    assert cluster.qemu(node, web), "the cut-off guest still has its process"
    assert runstate(cluster, node, web) == "running"
    cluster.node(node).heal()
    until(lambda: runstate(cluster, node, web) == "io-error", "it stops with an error")
    shut_out = entries(cluster) - before
    assert shut_out, "its clients are shut out as long as its node has not said that it is gone"
    os.kill(agent, signal.SIGCONT)
    cluster.wait_alive(node)
    until(lambda: not cluster.qemu(node, web), "the stale guest is gone")
    until(lambda: not entries(cluster) & shut_out, "its entries go with the readmission")
    assert entries(cluster) == before, "and no others"
    cluster.settled(web, on=target)
    cluster.one_writer(web)


def master_point(cluster: RbdCluster, word: str, operation: str = "instance.migrate") -> str:
    """The fault point after the step of that name in the newest such job: all have the same steps."""
    job = next(job for job in cluster.items("jobs") if job["operation"] == operation and job["state"] == "done")
    steps = cluster.get(f"/v1/jobs/{job['id']}")["steps"]
    number, what = next((index, step["what"]) for index, step in enumerate(steps, 1) if step["key"].startswith(word))
    return f"master:{operation}:{number:02d}:after-{'effect' if what == 'call' else 'write'}"


def traces(cluster: RbdCluster, volume: str) -> list[str]:
    """What Ceph keeps of a volume: images, also in the trash, and users."""
    pool = cluster.row("pools", "vms")["options"]["pool"]
    found = cluster.rbd("ls", pool) + cluster.rbd("trash", "ls", "--all", pool) + cluster.ceph.run("ceph", "auth", "ls")
    return [line for line in found.splitlines() if line.strip().endswith(volume)]


@pytest.mark.parametrize(
    ("service", "point"),
    [
        ("agent", "agent:volume.create:after"),
        ("agent", "agent:disks.revoke:before"),
        ("master", "prepare the target"),
        pytest.param("agent", "agent:guest.start:after", marks=LONG),
        pytest.param("agent", "agent:guest.start:before", marks=LONG),
        pytest.param("agent", "agent:volume.delete:after", marks=LONG),
        pytest.param("master", "rights for disks", marks=LONG),
        pytest.param("master", "end rights", marks=LONG),
    ],
)
def test_whoever_dies_in_between_everything_is_done_or_undone(cluster: RbdCluster, service: str, point: str) -> None:
    """A guest's whole life, during which an agent or the master is killed once, where Ceph has just been changed or is about to be."""
    body = {"name": "life", "template": "vms", "disks": [{"size": 16 * MIB}], "memory": 128 * MIB, "node": "node2"}
    body |= {"kernel": str(cluster.image.kernel), "initrd": str(cluster.image.initrd), "append": cluster.writer(10000)}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/instances", body),
        ("POST", "/v1/instances/life/migrate", {"node": "node3"}),
        ("DELETE", "/v1/instances/life", {"timeout": 0}),
    ]
    if service == "agent":
        armed = [cluster.arm(node.name, "agent", point) for node in cluster.lab.nodes]
    else:
        armed = [cluster.arm("node1", "master", master_point(cluster, point))]
    volume = ""
    for method, path, more in steps:
        end = cluster.end_of(cluster.submit(method, path, **more))
        assert end["state"] == "done", end
        cluster.wait_alive()
        if method == "POST":
            instance = cluster.settled(cluster.row("instances", "life")["id"]) and cluster.row("instances", "life")
            volume = instance["disks"][0]["volume"]
    fired = [path for path in armed if not path.exists()]
    for path in armed:
        path.unlink(missing_ok=True)
    assert fired, f"{point} was not reached"
    assert traces(cluster, volume) == []
    assert cluster.findings() == []


@pytest.mark.parametrize(
    ("service", "point"),
    [
        ("agent", "agent:snapshot.create:after"),
        ("master", "volume.create create image"),
        pytest.param("agent", "agent:volume.clone:after", marks=LONG),
        pytest.param("agent", "agent:snapshot.delete:after", marks=LONG),
        pytest.param("agent", "agent:volume.delete:after", marks=LONG),
        pytest.param("master", "snapshot.create make snapshot", marks=LONG),
        pytest.param("master", "snapshot.delete delete snapshot", marks=LONG),
    ],
)
def test_a_snapshot_of_a_guest_that_writes_whoever_dies_in_between(cluster: RbdCluster, web: str, service: str, point: str) -> None:
    """Its disk is copied by the snapshot, the guest goes on, and the copy stays when the snapshot is deleted."""
    source = cluster.row("instances", "web")["disks"][0]["volume"]
    before = cluster.acks.last(web)
    if service == "master":
        operation, _, word = point.partition(" ")
        point = master_point(cluster, word, operation)
    armed = cluster.arm("node1", service, point)
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/snapshots", {"volume": source, "name": "then"}),
        ("POST", "/v1/volumes", {"name": "copy", "snapshot": "then"}),
        ("DELETE", "/v1/snapshots/then", {}),
        # QEMU opens it as the volume's own user, who may read what it was made from.
        ("POST", "/v1/instances/web/attach-disk", {"volume": "copy"}),
        ("POST", "/v1/instances/web/detach-disk", {"volume": "copy"}),
    ]
    for method, path, more in steps:
        end = cluster.end_of(cluster.submit(method, path, **more))
        assert end["state"] == "done", end
        cluster.wait_alive()
    volume = cluster.row("volumes", "copy")
    copy = cluster.place / "copy.raw"
    copy.unlink(missing_ok=True)
    cluster.rbd("export", "--no-progress", f"{cluster.row('pools', 'vms')['options']['pool']}/{volume['logical_id']}", str(copy))
    report = check_ring(copy, before)
    assert report.ok, f"what the guest had flushed by then ({before}) is not in it: {report}"
    cluster.one_writer(web)
    end = cluster.end_of(cluster.submit("DELETE", "/v1/volumes/copy"))
    assert end["state"] == "done", end
    cluster.wait_alive()
    fired = not armed.exists()
    armed.unlink(missing_ok=True)
    assert fired, f"{point} was not reached"
    assert traces(cluster, volume["id"]) == []
    assert cluster.findings() == []


@pytest.mark.parametrize("where", ["node1", "node3"], ids=["the controller's image", "another node's image"])
def test_a_disk_is_made_from_an_image(cluster: RbdCluster, where: str) -> None:
    """Written into Ceph by QEMU's tools, with the key by a file, and over TLS from a node that has no keys of the pool's."""
    path = cluster.node(where).root / "var" / "lib" / "atoll" / "source.raw"
    path.write_bytes(os.urandom(MIB) + bytes(6 * MIB) + os.urandom(MIB))
    image = {"node": where, "path": "/var/lib/atoll/source.raw"}
    cluster.do("POST", "/v1/volumes", name="made", pool="vms", image=image)
    volume = cluster.row("volumes", "made")
    copy = cluster.place / "made.raw"
    copy.unlink(missing_ok=True)
    cluster.rbd("export", "--no-progress", f"{cluster.row('pools', 'vms')['options']['pool']}/{volume['logical_id']}", str(copy))
    assert copy.read_bytes() == path.read_bytes()
    assert not list((cluster.node("node1").run_dir / "keys").glob("*.key"))
    cluster.do("DELETE", "/v1/volumes/made")


def test_nothing_is_left(cluster: RbdCluster, web: str) -> None:
    cluster.do("DELETE", "/v1/instances/web", timeout=0)
    pool = cluster.row("pools", "vms")["options"]["pool"]
    assert cluster.rbd("ls", pool).split() == [f"atoll-probe.{cluster.row('pools', 'vms')['id']}"]
    assert cluster.rbd("trash", "ls", "--all", pool) == ""
    assert cluster.findings() == []
    cluster.do("DELETE", "/v1/pools/vms")
    assert cluster.rbd("ls", pool) == ""
