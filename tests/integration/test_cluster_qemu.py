"""The whole life of a guest and its disks, on real nodes, real daemons and real QEMU."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, Cluster, until

from atoll.lab.guest.ring import acks

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("cluster-qemu"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
LOCAL = "/var/lib/atoll/disks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(f"cq{os.getpid()}", 3, all_vm=True)
    try:
        for node in made.lab.nodes:
            node.exec(["mkdir", "-p", LOCAL], check=True)
        made.do("POST", "/v1/pools", name="local", driver="file", options={"path": LOCAL})
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> str:
    """A guest with two disks on the shared pool. Each test leaves it running."""
    return cluster.add("web", "node2", disks=2)


def power_off_from_within(cluster: Cluster, node: str, instance: str) -> None:
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(60)
        console.connect(str(cluster.node(node).run_dir / "guests" / instance / "console.sock"))
        console.sendall(b"poweroff -f\n")
        # A serial port takes a few bytes at a time; who hangs up takes the rest with him.
        while console.recv(4096):
            pass


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- power ---


def test_a_guest_with_two_disks_runs(cluster: Cluster, web: str) -> None:
    assert cluster.settled(web) == "node2"
    cluster.acks.says(web, "SIZE vdb 16777216")
    row = cluster.row("instances", "web")
    assert [disk["access"] for disk in row["disks"]] == ["userspace", "userspace"]
    assert cluster.findings() == []
    assert cluster.row("pools", "shared")["writers"] == "advisory"


def test_stopped_by_the_power_button_and_started_again(cluster: Cluster, web: str) -> None:
    stopped = cluster.do("POST", "/v1/instances/web/stop", timeout=60)
    assert stopped["result"]["clean"] is True
    cluster.acks.says(web, "POWER BUTTON")
    row = cluster.row("instances", "web")
    assert (row["state"], row["claim"]["holder"]) == ("stopped", None)
    assert not any(cluster.qemu(node.name, web) for node in cluster.lab.nodes)
    cluster.ring(web)
    assert cluster.refused("POST", "/v1/instances/web/stop") == "wrong_state"
    cluster.do("POST", "/v1/instances/web/start")
    assert cluster.refused("POST", "/v1/instances/web/start") == "wrong_state"
    cluster.settled(web, on="node2")


def test_a_guest_that_powers_itself_off_stays_off(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    power_off_from_within(cluster, node, web)
    row = until(lambda: (r := cluster.row("instances", "web"))["desired"] == "stopped" and r["job"] is None and r, "it counts as stopped")
    assert (row["state"], row["reason"], row["claim"]["holder"]) == ("stopped", "by the guest", None)
    # The loop that restarts missing guests looks each second, and twice.
    heard = len(cluster.items("jobs"))
    time.sleep(4)
    assert len(cluster.items("jobs")) == heard
    assert not any(cluster.qemu(n.name, web) for n in cluster.lab.nodes)
    cluster.do("POST", "/v1/instances/web/start")
    cluster.settled(web)


def test_a_guest_whose_process_died_is_restarted_on_its_node(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    pid, generation = cluster.qemu(node, web), cluster.row("instances", "web")["generation"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: cluster.qemu(node, web) not in (0, pid), "it has a new process")
    cluster.settled(web, on=node)
    assert cluster.row("instances", "web")["generation"] == generation + 1


@pytest.mark.parametrize("kind", ["hard", "soft", "full"])
def test_reboot(cluster: Cluster, web: str, kind: str) -> None:
    node = cluster.settled(web)
    pid, boots = cluster.qemu(node, web), cluster.acks.text(web).count("CTR RESUME")
    cluster.do("POST", "/v1/instances/web/reboot", type=kind)
    until(lambda: cluster.acks.text(web).count("CTR RESUME") > boots, "it boots")
    cluster.settled(web, on=node)
    assert (cluster.qemu(node, web) == pid) is (kind != "full")


# --- movement ---


def test_migrate(cluster: Cluster, web: str) -> None:
    source = cluster.settled(web)
    target = "node3" if source == "node2" else "node2"
    done = cluster.do("POST", "/v1/instances/web/migrate", node=target)
    assert done["result"]["downtime_ms"] < 5000
    assert done["result"]["node"] == target
    assert cluster.settled(web, on=target)
    assert cluster.acks.text(web).count("CTR RESUME") == cluster.acks.text(web).count("READY")


def test_a_migration_without_a_certificate_is_none(cluster: Cluster, web: str) -> None:
    """No TLS, no migration: the guest stays, and its memory never leaves the node in the clear."""
    source = cluster.settled(web)
    target = "node3" if source == "node2" else "node2"
    key = cluster.node(target).root / "etc/atoll/tls/key.pem"
    hidden = key.rename(key.with_name("hidden.pem"))
    try:
        assert cluster.refused("POST", "/v1/instances/web/migrate", node=target) == "host_error"
    finally:
        hidden.rename(key)
    cluster.settled(web, on=source)


def test_move_a_running_guest_with_its_disks(cluster: Cluster) -> None:
    loc = cluster.add("loc", "node2", disks=2, pool="local", start=False)
    other = cluster.image_of(loc, 1)
    with other.open("r+b") as image:
        image.write(os.urandom(5 * MIB))
    before, old = checksum(other), cluster.node("node2").root / LOCAL.lstrip("/")
    cluster.do("POST", "/v1/instances/loc/start")
    cluster.acks.beyond(loc, 20)
    assert cluster.refused("POST", "/v1/instances/loc/migrate", node="node3") == "not_mobile"
    assert cluster.refused("POST", "/v1/instances/loc/failover", node="node3") == "not_mobile"
    status, problem = cluster.request("POST", "/v1/instances/loc/migrate", {"node": "node3"})
    assert (status, "instance move" in problem["hint"]) == (409, True)
    since = time.monotonic()
    cluster.do("POST", "/v1/instances/loc/move", node="node3")
    cluster.settled(loc, on="node3")
    assert cluster.acks.gap(loc, since) < 5
    assert checksum(cluster.image_of(loc, 1)) == before
    assert not list(old.glob("loc-disk*")), "the old copies are gone"
    assert cluster.findings() == []


def test_move_a_stopped_guest_with_its_disks(cluster: Cluster) -> None:
    row = cluster.row("instances", "loc")
    loc = row["id"]
    cluster.do("POST", "/v1/instances/loc/stop", timeout=30)
    before = [checksum(cluster.image_of(loc, index)) for index in (0, 1)]
    cluster.do("POST", "/v1/instances/loc/move", node="node1")
    assert cluster.row("volumes", row["disks"][0]["volume"])["node"] == "node1"
    assert [checksum(cluster.image_of(loc, index)) for index in (0, 1)] == before
    assert not list((cluster.node("node3").root / LOCAL.lstrip("/")).glob("loc-disk*"))
    cluster.do("POST", "/v1/instances/loc/start")
    cluster.settled(loc, on="node1")
    cluster.do("DELETE", "/v1/instances/loc", timeout=0)
    assert not list((cluster.node("node1").root / LOCAL.lstrip("/")).glob("loc-disk*"))
    assert cluster.findings() == []


# --- disks ---


def test_disks_grow_come_and_go_while_it_runs(cluster: Cluster, web: str) -> None:
    node, since = cluster.settled(web), time.monotonic()
    cluster.do("POST", "/v1/instances/web/grow-disk", index=0, increment=16 * MIB)
    cluster.acks.says(web, f"SIZE vda {32 * MIB}")
    added = cluster.do("POST", "/v1/instances/web/add-disk", disk={"size": 8 * MIB, "name": "extra"}, template="shared")["result"]
    cluster.acks.says(web, f"SIZE vdc {8 * MIB}")
    cluster.do("POST", "/v1/instances/web/detach-disk", volume="extra")
    cluster.acks.says(web, "GONE vdc")
    assert cluster.row("volumes", "extra")["state"] == "available"
    cluster.do("POST", "/v1/volumes/extra/grow", size=24 * MIB)
    cluster.do("POST", "/v1/instances/web/attach-disk", volume="extra")
    cluster.acks.says(web, f"SIZE vdc {24 * MIB}")
    assert cluster.refused("DELETE", "/v1/volumes/extra") == "in_use"
    assert cluster.refused("POST", "/v1/instances/web/detach-disk", index=0) == "in_use"
    cluster.do("POST", "/v1/instances/web/remove-disk", volume="extra")
    assert cluster.request("GET", f"/v1/volumes/{added['volume']}")[0] == 404
    cluster.settled(web, on=node)
    assert cluster.acks.gap(web, since) < 5
    assert cluster.findings() == []


def test_volumes(cluster: Cluster, web: str) -> None:
    directory = cluster.node("node1").root / cluster.lab.shared.lstrip("/")
    foreign = directory / "legacy.raw"
    foreign.write_bytes(os.urandom(2 * MIB))
    kept = checksum(foreign)
    cluster.do("POST", "/v1/volumes", name="data", pool="shared", size=10 * MIB)
    cluster.do("POST", "/v1/volumes/data/rename", new_name="records")
    volume = cluster.row("volumes", "records")
    assert volume["logical_id"].startswith("records.")
    assert (directory / volume["logical_id"]).stat().st_size == 10 * MIB
    assert cluster.refused("POST", "/v1/volumes/records/grow", size=5 * MIB) == "shrink_refused"
    cluster.do("POST", "/v1/volumes", name="old", pool="shared", adopt="legacy.raw")
    assert cluster.row("volumes", "old")["size"] == 2 * MIB
    assert checksum(foreign) == kept
    assert cluster.refused("POST", "/v1/volumes", name="again", pool="shared", adopt="legacy.raw") == "wrong_state"
    nameless = cluster.do("POST", "/v1/volumes", pool="shared", size=MIB)["result"]
    assert nameless["name"] == nameless["volume"]
    for name in ("records", "old", nameless["volume"]):
        cluster.do("DELETE", f"/v1/volumes/{name}")
    assert not (directory / volume["logical_id"]).exists()
    assert not foreign.exists()
    cluster.settled(web)


def test_an_unmounted_share_is_refused_and_nothing_is_written_below(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    bare = next(n.name for n in cluster.lab.nodes if n.name not in (node, "node1"))
    cluster.node(bare).unmount_shared(lazy=True)
    try:
        below = cluster.node(bare).root / cluster.lab.shared.lstrip("/")
        before = sorted(below.iterdir())
        assert cluster.refused("POST", "/v1/instances/web/migrate", node=bare) == "pool_unavailable"
        cluster.settled(web, on=node)
        assert cluster.refused("POST", "/v1/volumes", name="lost", pool="shared", size=MIB, node=bare) == "pool_unavailable"
        cluster.do("POST", "/v1/instances/web/stop", timeout=30)
        assert cluster.refused("POST", "/v1/instances/web/start", node=bare) == "pool_unavailable"
        assert cluster.row("instances", "web")["claim"]["holder"] is None
        assert sorted(below.iterdir()) == before
        cluster.do("POST", "/v1/instances/web/start", node=node)
    finally:
        cluster.node(bare).mount_shared()
    cluster.do("POST", "/v1/instances/web/migrate", node=bare)
    cluster.settled(web, on=bare)


def test_disks_for_an_administrator(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    other = next(n.name for n in cluster.lab.nodes if n.name != node)
    assert cluster.refused("POST", "/v1/instances/web/activate-disks") == "in_use"
    cluster.do("POST", "/v1/instances/web/stop", timeout=30)
    paths = cluster.do("POST", "/v1/instances/web/activate-disks", node=node)["result"]["paths"]
    assert len(paths) == 2
    for path in paths.values():
        assert int(cluster.node(node).exec(["blockdev", "--getsize64", path]).stdout) >= 16 * MIB
    # Nothing starts, here or elsewhere, and nothing is removed, while somebody works on them.
    for where in (node, other):
        assert cluster.refused("POST", "/v1/instances/web/start", node=where) == "wrong_state"
    assert cluster.refused("DELETE", "/v1/instances/web", timeout=0) == "wrong_state"
    assert cluster.refused("POST", "/v1/instances/web/activate-disks", node=other) == "in_use"
    cluster.node(node).kill_service("agent", signal.SIGKILL)
    assert cluster.refused("POST", "/v1/instances/web/failover", node=other) == "wrong_state"
    cluster.do("POST", "/v1/instances/web/deactivate-disks")
    assert cluster.row("instances", "web")["claim"]["holder"] is None
    cluster.do("POST", "/v1/instances/web/start", node=other)
    cluster.settled(web, on=other)


def test_missing_images_are_made_again(cluster: Cluster, web: str) -> None:
    cluster.settled(web)
    cluster.do("POST", "/v1/instances/web/stop", timeout=30)
    image = cluster.image_of(web, 1)
    image.unlink()
    found = cluster.findings("web-disk1")
    assert [f["what"] for f in found] == ["image is missing"]
    assert cluster.refused("POST", "/v1/instances/web/start") == "not_found"
    assert "recreate" in found[0]["commands"][0]
    said = cluster.type(found[0]["commands"][0])
    assert "done" in said, said
    assert cluster.image_of(web, 1).stat().st_size == 16 * MIB
    cluster.do("POST", "/v1/instances/web/start")
    cluster.settled(web)


# --- names, nodes, tags ---


def test_rename_an_instance(cluster: Cluster, web: str) -> None:
    cluster.settled(web)
    assert cluster.refused("POST", "/v1/instances/web/rename", new_name="shop") == "in_use"
    cluster.do("POST", "/v1/instances/web/stop", timeout=30)
    cluster.do("POST", "/v1/instances/web/rename", new_name="shop")
    assert cluster.image_of(web).name.startswith("shop-disk0.")
    cluster.do("POST", "/v1/instances/shop/rename", new_name="web")
    assert cluster.image_of(web).name.startswith("web-disk0.")
    cluster.do("POST", "/v1/instances/web/start")
    cluster.settled(web)


def test_nodes_are_drained_emptied_and_taken_offline(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    target = next(n.name for n in cluster.lab.nodes if n.name not in (node, "node1"))
    cluster.do("POST", f"/v1/nodes/{target}/modify", drained=True)
    assert cluster.refused("POST", "/v1/instances/web/migrate", node=target) == "node_unavailable"
    cluster.do("POST", f"/v1/nodes/{target}/modify", drained=False)
    assert cluster.refused("POST", f"/v1/nodes/{node}/modify", offline=True) == "in_use"
    cluster.do("POST", f"/v1/nodes/{node}/evacuate", target=target)
    cluster.settled(web, on=target)
    row = cluster.row("nodes", node)
    assert (row["drained"], row["claims"]) == (True, 0)
    cluster.do("POST", f"/v1/nodes/{node}/modify", offline=True)
    assert cluster.refused("POST", "/v1/instances/web/migrate", node=node) == "node_unavailable"
    cluster.do("POST", f"/v1/nodes/{node}/modify", offline=False, drained=False)
    cluster.do("POST", f"/v1/nodes/{target}/migrate", target=node)
    cluster.settled(web, on=node)
    cluster.do("POST", f"/v1/nodes/{node}/failover", target=target)
    cluster.settled(web, on=target)


def test_tags(cluster: Cluster, web: str) -> None:
    for path, name in (("instances", "web"), ("volumes", "web-disk0"), ("nodes", "node2"), ("pools", "shared")):
        cluster.do("POST", f"/v1/{path}/{name}/tags", add=["env:test", "tier:1"])
        cluster.do("POST", f"/v1/{path}/{name}/tags", remove=["tier:1"])
        assert cluster.row(path, name)["tags"] == ["env:test"]


# --- what does not fit ---


def test_verify_lists_strangers_orphans_and_missing_images_and_deletes_none(cluster: Cluster, web: str) -> None:
    node = cluster.settled(web)
    stranger, orphan = "i-00000000000000bad", "gone-disk0.vol-0123456789abcdef0.raw"
    directory = cluster.node("node1").root / cluster.lab.shared.lstrip("/")
    (directory / orphan).write_bytes(bytes(MIB))
    cluster.do("POST", "/v1/volumes", name="lost", pool="shared", size=MIB)
    missing = directory / cluster.row("volumes", "lost")["logical_id"]
    missing.unlink()
    place = f"/run/atoll/guests/{stranger}"
    argv = ["qemu-system-x86_64", "-display", "none", "-machine", "q35", "-m", "16", "-S", "-daemonize", "-pidfile", f"{place}/pid"]
    there = cluster.node(node)
    there.exec(["mkdir", "-p", place], check=True)
    there.exec([*argv, "-qmp", f"unix:{place}/qmp,server=on,wait=off"], check=True)
    try:
        found = {f["what"]: f for f in cluster.findings()}
        assert set(found) == {"stranger: a guest that no instance owns", "orphan image", "image is missing"}
        assert all(f["commands"] for f in found.values())
        assert orphan in found["orphan image"]["about"]
        assert 0 <= found["orphan image"]["since"] < 300
        assert found["stranger: a guest that no instance owns"]["about"].endswith(f"on {node}")
        # The master's loops have looked, too; nothing of it is gone.
        time.sleep(4)
        assert len(cluster.findings()) == 3
        assert cluster.qemu(node, stranger)
        assert (directory / orphan).exists()
    finally:
        pid = cluster.qemu(node, stranger)
        if pid:
            os.kill(pid, signal.SIGKILL)
    (directory / orphan).unlink()
    cluster.do("DELETE", "/v1/volumes/lost")
    until(lambda: not cluster.qemu(node, stranger), "the stranger is gone")
    shutil.rmtree(there.run_dir / "guests" / stranger, ignore_errors=True)
    assert cluster.findings() == []
    cluster.settled(web, on=node)


def test_remove(cluster: Cluster, web: str) -> None:
    cluster.settled(web)
    images = [cluster.image_of(web, index) for index in (0, 1)]
    assert acks(cluster.acks.text(web))
    cluster.do("DELETE", "/v1/instances/web", timeout=0)
    assert not any(image.exists() for image in images)
    assert not any(cluster.qemu(node.name, web) for node in cluster.lab.nodes)
    assert cluster.findings() == []
    assert cluster.items("volumes") == []
