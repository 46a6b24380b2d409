"""A Debian that boots from its own disk, imported from an image of another node, with a seed for cloud-init: real nodes and real QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, Cluster, until

from atoll.lab import debian

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("images-qemu"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(not shutil.which("mmdebstrap") or not shutil.which("extlinux"), reason="mmdebstrap or extlinux is not installed"),
]
LOCAL = "/var/lib/atoll/disks"
SECRET = "correct horse battery staple"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8 me@here"
SEED = {"user_data": f"#cloud-config\npassword: {SECRET}\n", "ssh_keys": [KEY]}


@pytest.fixture(scope="module")
def disk() -> Path:
    """Built at the first run, from Debian's archive: a minute or two."""
    return debian.build()


@pytest.fixture(scope="module")
def cluster(disk: Path) -> Iterator[Cluster]:
    made = Cluster(f"im{os.getpid()}", 2, all_vm=True)
    try:
        for node in made.lab.nodes:
            node.exec(["mkdir", "-p", LOCAL, "/var/lib/atoll/images"], check=True)
        made.do("POST", "/v1/pools", name="local", driver="file", options={"path": LOCAL})
        yield made
    finally:
        made.close()


def console(cluster: Cluster, node: str, instance: str) -> str:
    try:
        return (cluster.node(node).run_dir / "logs" / instance / "console.log").read_text(errors="replace")
    except OSError:
        return ""


def test_a_debian_boots_from_its_disk_and_reads_its_seed(cluster: Cluster, disk: Path) -> None:
    image = {"node": "node2", "path": str(disk)}
    size = disk.stat().st_size + 512 * MIB
    disks = [{"image": image, "size": size}]
    made = cluster.do("POST", "/v1/instances", name="web", template="local", node="node1", disks=disks, memory=192 * MIB, cloud_init=SEED)
    instance = made["result"]["instance"]
    steps = {step["key"].split("/")[0]: step["node"] for step in made["steps"]}
    assert (steps["import"], steps["create image"]) == ("node2", "node1"), "the image went to the other node"
    said = until(lambda: "DISK-READY" in (text := console(cluster, "node1", instance)) and text, "the boot from the disk", 180)
    assert "DISK-BOOT debian 12" in said
    assert "root /dev/vda1 ext4" in said
    assert f"SEED user-data: password: {SECRET}" in said
    assert f'SEED meta-data: instance-id: "{instance}"' in said
    assert KEY in said
    assert "DISK-READY web" in said
    row = cluster.get("/v1/instances/web")
    assert [(d["size"], d["mode"]) for d in row["disks"]] == [(size, "rw"), (4 * MIB, "ro")]
    for node in cluster.lab.nodes:
        # Nothing of the seed in logs, stores or run-time files; the console of this guest's own init says it on purpose.
        places = ["/var/lib/atoll", "/var/log/atoll", "/etc/atoll", "/run/atoll"]
        found = node.exec(["grep", "-rlaF", "--exclude=console.log", "--exclude-dir=disks", SECRET, *places])
        assert found.stdout == "", node.name
    cluster.do("DELETE", "/v1/instances/web", timeout=0)
    assert list((cluster.node("node1").root / LOCAL.lstrip("/")).glob("*.raw")) == []


def test_a_qcow2_image_becomes_a_raw_volume_on_shared_storage(cluster: Cluster, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    raw = tmp_path / "a.raw"
    raw.write_bytes(data + bytes(5 * MIB))
    image = cluster.node("node2").root / "var/lib/atoll/images/a.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image], check=True, timeout=60)
    source = {"node": "node2", "path": "/var/lib/atoll/images/a.qcow2"}
    made = cluster.do("POST", "/v1/volumes", name="data", pool="shared", image=source)
    assert made["result"]["size"] == 8 * MIB
    volume = cluster.get("/v1/volumes/data")
    stored = cluster.node("node1").root / cluster.lab.shared.lstrip("/") / volume["logical_id"]
    assert stored.read_bytes() == raw.read_bytes()
    assert stored.stat().st_blocks * 512 < 4 * MIB
    backed = cluster.node("node2").root / "var/lib/atoll/images/backed.qcow2"
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", backed, "1M"]
    subprocess.run(argv, check=True, timeout=60)
    bad = {"node": "node2", "path": "/var/lib/atoll/images/backed.qcow2"}
    job = cluster.end_of(cluster.submit("POST", "/v1/volumes", name="bad", pool="shared", image=bad))
    assert (job["state"], job["error"]["code"]) == ("undone", "invalid_input")
    assert "backing file" in job["error"]["message"]
    assert [row["name"] for row in cluster.items("volumes")] == ["data"]
