"""Guests whose disks are block devices of their nodes, made of images in a real Ceph: their whole life, and back to user space."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rbd_support import RbdCluster, keys, runstate
from support import MIB, until

from atoll.lab.loops import machine_id
from atoll.lab.smallceph import missing
from atoll.storage.files import loops
from ceph_support import LONG

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("cluster-rbd-devices"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
KERNEL, USER = {"rbd": {"access": "kernelspace"}}, {"rbd": {"access": "userspace"}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RbdCluster]:
    made = RbdCluster(f"cd{os.getpid()}", 2)
    try:
        made.add_pool("vms", isolation="volume")
        made.do("POST", "/v1/cluster/modify", driver_options=KERNEL)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def web(cluster: RbdCluster) -> str:
    """A guest with two disks. Each test leaves it running, in kernel space."""
    return cluster.add("web", "node2", disks=2, pool="vms")


def volumes(cluster: RbdCluster, instance: str = "web") -> list[str]:
    return [disk["volume"] for disk in cluster.row("instances", instance)["disks"]]


def traces(cluster: RbdCluster, node: str, volume: str) -> list[str]:
    """What a node has of a volume by way of a mapping: a process, a mount, devices, files."""
    here = cluster.node(node)
    if not here.running:
        return []
    found = [line for line in cluster.argv(node).splitlines() if "qemu-storage-daemon" in line and volume in line]
    found += [line for line in Path(f"/proc/{here.pid}/mounts").read_text().splitlines() if volume in line]
    found += [f"loop{number}" for mapped, number in loops.mapped(machine_id(cluster.lab.name, node)).items() if mapped == volume]
    for top in (here.run_dir / "maps", here.root / "dev" / "atoll"):
        found += [str(path) for path in top.glob(f"*{volume}*")]
    return found


def anywhere(cluster: RbdCluster) -> list[str]:
    """Everything that is mapped on any node."""
    mapped = [v for node in cluster.lab.nodes for v in loops.mapped(machine_id(cluster.lab.name, node.name))]
    return mapped + [
        line for node in cluster.lab.nodes if node.running for line in cluster.argv(node.name).splitlines() if "/maps/" in line
    ]


def access(cluster: RbdCluster, instance: str = "web") -> set[tuple[str, str | None, str]]:
    return {(d["access"], d["access_way"], d["access_next"]) for d in cluster.row("instances", instance)["disks"]}


def other(node: str) -> str:
    return "node1" if node == "node2" else "node2"


def watchers(cluster: RbdCluster, index: int) -> list[str]:
    """The addresses of who has a disk of web's open."""
    from atoll.storage.rbd.clients import plain

    found = json.loads(cluster.rbd("status", cluster.image_spec("web", index), "--format", "json"))["watchers"]
    assert found
    return [plain(watcher["address"]) for watcher in found]


def noted(cluster: RbdCluster, index: int) -> list[str]:
    """The addresses that the pool remembers as those of writers of that disk."""
    from atoll.storage.rbd.marks import MARK

    ident = json.loads(cluster.rbd("info", cluster.image_spec("web", index), "--format", "json"))["id"]
    pool, out = cluster.row("pools", "vms")["options"]["pool"], cluster.place / "noted"
    cluster.ceph.run("rados", "-p", pool, "getomapval", MARK, f"guest/{ident}", str(out))
    found: list[str] = json.loads(out.read_bytes())
    return found


def on_node2(cluster: RbdCluster, web: str) -> str:
    """Where there is no master."""
    if cluster.settled(web) != "node2":
        cluster.do("POST", "/v1/instances/web/migrate", node="node2")
    return cluster.settled(web, on="node2")


def test_a_guest_has_block_devices_and_no_key_is_seen(cluster: RbdCluster, web: str) -> None:
    assert cluster.settled(web) == "node2"
    until(lambda: access(cluster) == {("kernelspace", "fuse+loop", "kernelspace")}, "it is told how")
    argv = cluster.argv("node2")
    for volume in volumes(cluster):
        assert f'"filename": "/dev/atoll/{volume}"' in argv
        device = os.stat(cluster.node("node2").root / "dev" / "atoll" / volume)
        assert device.st_mode & 0o777 == 0o600
        assert len(traces(cluster, "node2", volume)) >= 5
        assert not traces(cluster, "node1", volume)
    assert not any(key in argv for key in keys(cluster))
    assert cluster.findings() == []
    info = cluster.type("atoll instance info web")
    assert "kernelspace" in info
    assert "fuse+loop" in info
    assert "rbd" in cluster.type("atoll cluster info")


def test_migrate_while_it_writes(cluster: RbdCluster, web: str) -> None:
    source = cluster.settled(web)
    cluster.do("POST", "/v1/instances/web/migrate", node=other(source))
    cluster.settled(web, on=other(source))
    for volume in volumes(cluster):
        assert traces(cluster, source, volume) == []
        assert traces(cluster, other(source), volume)


def test_disks_come_grow_and_go_while_it_runs(cluster: RbdCluster, web: str) -> None:
    node = cluster.settled(web)
    cluster.do("POST", "/v1/volumes", name="extra", pool="vms", size=16 * MIB)
    cluster.do("POST", "/v1/instances/web/attach-disk", volume="extra")
    cluster.acks.says(web, "SIZE vdc 16777216")
    volume = volumes(cluster)[2]
    assert traces(cluster, node, volume)
    cluster.do("POST", "/v1/instances/web/grow-disk", index=2, size=32 * MIB)
    cluster.acks.says(web, "SIZE vdc 33554432")
    cluster.do("POST", "/v1/instances/web/detach-disk", volume="extra")
    assert traces(cluster, node, volume) == []
    cluster.do("DELETE", "/v1/volumes/extra")
    cluster.settled(web)


def test_to_user_space_and_back_by_migrations(cluster: RbdCluster, web: str) -> None:
    """In user space there is no device, no mount and no process for it."""
    source = cluster.settled(web)
    said = cluster.type("atoll group modify default -D rbd:access=userspace")
    assert "takes_effect: for each instance at its next start or migration" in said
    assert "web (kernelspace)" in said
    assert access(cluster) == {("kernelspace", "fuse+loop", "userspace")}
    assert "access=userspace" in cluster.type("atoll group info default")
    cluster.do("POST", "/v1/instances/web/migrate", node=other(source))
    cluster.settled(web, on=other(source))
    until(lambda: access(cluster) == {("userspace", None, "userspace")}, "it is told how")
    assert anywhere(cluster) == []
    assert not [v for node in ("node1", "node2") for v in volumes(cluster) if traces(cluster, node, v)]
    said = cluster.type("atoll group modify default -D rbd:access=")
    assert "web (userspace)" in said
    cluster.do("POST", "/v1/instances/web/migrate", node=source)
    cluster.settled(web, on=source)
    until(lambda: access(cluster) == {("kernelspace", "fuse+loop", "kernelspace")}, "it is told how")
    assert "one of userspace, kernelspace" in cluster.type("atoll group modify default -D rbd:access=both")


@LONG
def test_a_new_agent_knows_the_mappings_and_ends_them(cluster: RbdCluster, web: str) -> None:
    node = cluster.settled(web)
    agent = next(service.pid for service in cluster.node(node).services() if service.name == "agent")
    os.kill(agent, signal.SIGKILL)
    until(lambda: next(s.pid for s in cluster.node(node).services() if s.name == "agent") not in (0, None, agent), "a new agent")
    cluster.wait_alive()
    cluster.settled(web, on=node)
    cluster.do("POST", "/v1/instances/web/stop", timeout=0)
    assert anywhere(cluster) == []
    cluster.do("POST", "/v1/instances/web/start", node=node)
    cluster.settled(web, on=node)


@pytest.mark.parametrize("setting", [KERNEL, pytest.param(USER, marks=LONG)], ids=["kernelspace", "userspace"])
def test_disks_are_block_devices_for_a_person_in_either_access(cluster: RbdCluster, web: str, setting: dict[str, dict[str, str]]) -> None:
    node = cluster.settled(web)
    cluster.do("POST", "/v1/instances/web/stop", timeout=0)
    cluster.do("POST", "/v1/cluster/modify", driver_options=setting)
    paths = cluster.do("POST", "/v1/instances/web/activate-disks", node=node)["result"]["paths"]
    assert sorted(paths) == sorted(volumes(cluster))
    assert set(watchers(cluster, 1)) <= set(noted(cluster, 1)), "who maps it could not be shut out by name"
    device = cluster.node(node).root / paths[volumes(cluster)[1]].lstrip("/")
    with open(device, "r+b") as file:
        file.write(b"by hand")
    assert cluster.refused("POST", "/v1/instances/web/start", node=other(node)) in ("wrong_state", "in_use", "disk_in_use")
    cluster.do("POST", "/v1/instances/web/deactivate-disks")
    assert anywhere(cluster) == []
    assert cluster.image_of(web, 1).read_bytes().startswith(b"by hand")
    users = cluster.ceph.run("ceph", "auth", "ls")
    assert not [volume for volume in volumes(cluster) if volume in users]
    cluster.do("POST", "/v1/cluster/modify", driver_options=KERNEL)
    cluster.do("POST", "/v1/instances/web/start", node=node)
    cluster.settled(web, on=node)


@pytest.mark.parametrize("then", ["goes on", pytest.param("is cancelled", marks=LONG)])
def test_an_agent_dies_between_mapping_and_start(cluster: RbdCluster, web: str, then: str) -> None:
    node = cluster.settled(web)
    cluster.do("POST", "/v1/instances/web/stop", timeout=0)
    armed = cluster.arm(node, "agent", "agent:guest:attached")
    job = cluster.submit("POST", "/v1/instances/web/start", node=node)
    until(lambda: not armed.exists(), "the agent has died")
    if then == "is cancelled":
        cluster.request("POST", f"/v1/jobs/{job}/cancel")
    ended = cluster.end_of(job)
    assert ended["state"] in ("done", "undone"), ended
    if ended["state"] == "undone":
        assert anywhere(cluster) == []
        cluster.do("POST", "/v1/instances/web/start", node=node)
    cluster.wait_alive()
    cluster.settled(web, on=node)
    assert cluster.findings() == []


def test_failover_shuts_out_the_devices_of_a_node_that_is_cut_off(cluster: RbdCluster, web: str, healing: ExitStack) -> None:
    """The node is not dead, as was said: its guest goes on, and its storage comes back. Its device must not write one byte more."""
    node, target = on_node2(cluster, web), "node1"
    cluster.node(node).cut()
    healing.callback(cluster.wait_alive)
    healing.callback(cluster.node(node).heal)
    cluster.wait_silent(node)
    # Its agent stands still, so that Ceph alone keeps it from writing.
    agent = next(service.pid for service in cluster.node(node).services() if service.name == "agent")
    os.kill(agent, signal.SIGSTOP)
    healing.callback(os.kill, agent, signal.SIGCONT)
    cluster.do("POST", "/v1/instances/web/failover", node=target, node_is_dead=True)
    until(lambda: cluster.qemu(target, web), "it runs elsewhere")
    assert runstate(cluster, node, web) == "running"
    cluster.node(node).heal()
    until(lambda: runstate(cluster, node, web) == "io-error", "it stops with an error")
    os.kill(agent, signal.SIGCONT)
    cluster.wait_alive(node)
    until(lambda: not cluster.qemu(node, web), "the stale guest is gone")
    until(lambda: not [v for v in volumes(cluster) if traces(cluster, node, v)], "so are its devices")
    cluster.settled(web, on=target)
    cluster.one_writer(web)


@LONG
def test_a_power_cut_leaves_no_device_and_it_runs_elsewhere(cluster: RbdCluster, web: str) -> None:
    node = on_node2(cluster, web)
    cluster.node(node).kill()
    cluster.wait_silent(node)
    cluster.do("POST", "/v1/instances/web/failover", node=other(node), node_is_dead=True)
    cluster.settled(web, on=other(node))
    cluster.node(node).boot()
    cluster.wait_alive()
    assert not [v for v in volumes(cluster) if traces(cluster, node, v)]
    cluster.settled(web, on=other(node))


def test_nothing_is_left(cluster: RbdCluster, web: str) -> None:
    cluster.do("DELETE", "/v1/instances/web", timeout=0)
    assert anywhere(cluster) == []
    for node in cluster.lab.nodes:
        assert "/maps/" not in Path(f"/proc/{node.pid}/mounts").read_text()
        assert not list((node.run_dir / "maps").glob("*"))
        assert not list((node.run_dir / "keys").glob("*.key"))
    pool = cluster.row("pools", "vms")["options"]["pool"]
    assert cluster.rbd("ls", pool).split() == [f"atoll-probe.{cluster.row('pools', 'vms')['id']}"]
    assert cluster.findings() == []
    listed = subprocess.run(["losetup", "--list", "--noheadings", "-O", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
    assert cluster.lab.name not in [line for line in listed.splitlines() if "/maps/" in line]
