"""Instances as files, on real nodes: a guest that runs is stopped, exported and started again; its disks come back elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, Cluster, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("images-qemu"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
EXPORTS = "/var/lib/atoll/exports"
LOCAL = "/var/lib/atoll/disks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(f"ex{os.getpid()}", 2, all_vm=True)
    try:
        for node in made.lab.nodes:
            node.exec(["mkdir", "-p", EXPORTS, LOCAL], check=True)
        made.do("POST", "/v1/pools", name="local", driver="file", options={"path": LOCAL})
        yield made
    finally:
        made.close()


def exports(cluster: Cluster, node: str = "node1") -> Path:
    return cluster.node(node).root / EXPORTS.lstrip("/")


def image(cluster: Cluster, volume: str, node: str = "node1") -> Path:
    row = cluster.get(f"/v1/volumes/{volume}")
    directory = LOCAL if row["pool"] == "local" else cluster.lab.shared
    return cluster.node(node).root / directory.lstrip("/") / str(row["logical_id"])


def test_a_running_guest_is_exported_and_comes_back_as_another(cluster: Cluster) -> None:
    instance = cluster.add("web", "node1", disks=2)
    place = {"node": "node1", "path": f"{EXPORTS}/web.atoll"}
    assert cluster.refused("POST", "/v1/instances/web/export", **place) == "in_use"
    job = cluster.do("POST", "/v1/instances/web/export", **place, shutdown=True, timeout=0)
    last = cluster.acks.last(instance)
    cluster.acks.beyond(instance, last)
    assert job["result"]["size"] == (exports(cluster) / "web.atoll").stat().st_size
    assert [path.name for path in exports(cluster).iterdir()] == ["web.atoll"]
    assert cluster.refused("POST", "/v1/instances/web/export", **place, shutdown=True) == "already_exists"
    cluster.wait_state("web", "running")

    cluster.do("POST", "/v1/instances/web/stop", timeout=0)
    cluster.do("POST", "/v1/instances/web/export", **place, overwrite=True)
    cluster.do("POST", "/v1/instances/import", name="copy", **place, template="local", start=False)
    for index in range(2):
        assert image(cluster, f"copy-disk{index}").read_bytes() == image(cluster, f"web-disk{index}").read_bytes()
    old, new = cluster.row("instances", "web"), cluster.row("instances", "copy")
    for field in ("memory", "vcpus", "boot", "os"):
        assert new[field] == old[field]
    cluster.do("POST", "/v1/instances/copy/start")
    cluster.wait_state("copy", "running")
    cluster.do("DELETE", "/v1/instances/copy", timeout=0)

    path = exports(cluster) / "web.atoll"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert cluster.refused("POST", "/v1/instances/import", name="bad", **place, template="local") == "invalid_input"
    assert [row["name"] for row in cluster.items("volumes") if row["name"].startswith("bad")] == []
    assert list((cluster.node("node1").root / LOCAL.lstrip("/")).glob("*.raw")) == []


def test_an_export_goes_on_with_the_next_agent_and_leaves_nothing_when_it_is_cancelled(cluster: Cluster) -> None:
    disks = [{"size": 300 * MIB}]
    cluster.do("POST", "/v1/instances", name="big", template="shared", disks=disks, start=False, node="node1")
    with image(cluster, "big-disk0").open("r+b") as file:
        for _ in range(300):
            file.write(os.urandom(MIB))
    place = {"node": "node2", "path": f"{EXPORTS}/big.atoll"}

    def partial() -> list[Path]:
        return [path for path in exports(cluster, "node2").iterdir() if path.name.endswith(".partial")]

    number = cluster.submit("POST", "/v1/instances/big/export", **place)
    until(lambda: [p for p in partial() if p.stat().st_size > 5 * MIB], "the export is written")
    cluster.request("POST", f"/v1/jobs/{number}/cancel", {})
    assert cluster.end_of(number)["state"] == "undone"
    assert list(exports(cluster, "node2").iterdir()) == []

    number = cluster.submit("POST", "/v1/instances/big/export", **place)
    until(lambda: [p for p in partial() if p.stat().st_size > 5 * MIB], "the export is written")
    cluster.node("node2").kill_service("agent", signal.SIGKILL)
    ended = cluster.end_of(number)
    assert ended["state"] == "done", ended
    assert [path.name for path in exports(cluster, "node2").iterdir()] == ["big.atoll"]
    cluster.do("POST", "/v1/instances/import", name="again", **place, start=False)
    assert image(cluster, "again-disk0").read_bytes() == image(cluster, "big-disk0").read_bytes()
    for name in ("big", "again"):
        cluster.do("DELETE", f"/v1/instances/{name}")


def test_what_a_node_cannot_reach_is_not_exported_there(cluster: Cluster) -> None:
    cluster.do("POST", "/v1/instances", name="here", template="local", disks=[{"size": MIB}], start=False, node="node1")
    assert cluster.refused("POST", "/v1/instances/here/export", node="node2", path=f"{EXPORTS}/here.atoll") == "wrong_state"
    said = cluster.type(f"atoll instance export here node1:{EXPORTS}/here.atoll")
    assert "done" in said.lower(), said
    cluster.do("DELETE", "/v1/instances/here")
