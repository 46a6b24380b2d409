"""Storage that fills up or stands still under real guests: a small file system on a loop device, and a share behind a FUSE process that
is stopped (and whose callers then hang in the kernel)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MIB, Cluster, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("storage-trouble"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(not shutil.which("bindfs"), reason="bindfs is not installed"),
]
#: Longest answer of the API, in seconds; a machine with two processors runs other tests beside this one.
PROMPT = 1.0


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class Storage:
    """``small``: a file system of its own, that can be filled and grown. ``nas``: a share, behind a process that can be stopped."""

    def __init__(self) -> None:
        # Not below pytest's directories: the guests' user has to get through.
        self.place = Path(tempfile.mkdtemp(prefix="atoll-trouble-", dir="/var/tmp"))
        self.place.chmod(0o755)
        self.small, self.nas, self.image = self.place / "small", self.place / "nas", self.place / "small.img"
        for directory in (self.small, self.nas, self.place / "behind"):
            directory.mkdir()
        with self.image.open("wb") as file:
            file.truncate(320 * MIB)
        run("mkfs.xfs", "-q", str(self.image))
        self.loop = run("losetup", "--find", "--show", str(self.image)).strip()
        run("mount", self.loop, str(self.small))
        # A session of its own: when a stopped process loses its terminal, the kernel lets it go on.
        command = ["bindfs", "-f", str(self.place / "behind"), str(self.nas)]
        self.share = subprocess.Popen(command, start_new_session=True)
        until(lambda: os.path.ismount(self.nas), "the share is mounted")

    def fill(self) -> None:
        """Until not one block is left."""
        with (self.small / "filler").open("wb") as file:
            left = os.statvfs(self.small)
            os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize - 4 * MIB)
        with (self.small / "rest").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
                    os.fsync(file.fileno())
            except OSError:
                return

    def grow(self) -> None:
        with self.image.open("r+b") as file:
            file.truncate(640 * MIB)
        run("losetup", "--set-capacity", self.loop)
        run("xfs_growfs", str(self.small))

    def stop(self) -> None:
        self.share.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.share.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        for command in (["umount", "-l", str(self.nas)], ["umount", "-l", str(self.small)], ["losetup", "--detach", self.loop]):
            subprocess.run(command, check=False, capture_output=True, timeout=60)
        self.share.terminate()
        self.share.wait(30)
        shutil.rmtree(self.place)


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    made = Storage()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(storage: Storage) -> Iterator[Cluster]:
    made = Cluster(f"st{os.getpid()}", 2, bandwidth=64 << 20, all_vm=True, binds=[str(storage.small), str(storage.nas)])
    try:
        for name, path in (("small", storage.small), ("nas", storage.nas)):
            made.do("POST", "/v1/pools", name=name, driver="sharedfile", options={"path": str(path)})
        yield made
    finally:
        storage.go_on()
        made.close()


def test_a_pool_that_fills_up_under_a_guest(cluster: Cluster, storage: Storage) -> None:
    # Its image is sparse: each page of the ring that it writes for the first time needs room.
    web = cluster.add("web", "node1", pool="small", append=cluster.writer(delay=20000))
    storage.fill()
    said = cluster.wait_state("web", "paused")
    assert said["reason"].startswith("io-error: pool small is full (volume web-disk"), said["reason"]
    assert said["commands"] == ["atoll pool info small", "atoll instance resume web"]
    assert "io-error: pool small is full" in cluster.type("atoll instance list")
    found = [f for f in cluster.findings("web on node1") if f["what"] == "guest stands still: io-error"]
    assert found
    assert "atoll instance resume web" in found[0]["commands"]
    pid = cluster.qemu("node1", web)
    # It is not dead, and nobody starts it again.
    assert "atoll instance resume web" in cluster.type("atoll instance start web")
    assert cluster.refused("POST", "/v1/instances/web/resume") == "pool_full"
    assert cluster.refused("POST", "/v1/volumes", name="more", pool="small", size=8 * MIB) == "pool_full"
    assert cluster.qemu("node1", web) == pid
    # It may move meanwhile, and waits there.
    cluster.do("POST", "/v1/instances/web/migrate", node="node2")
    until(lambda: (row := cluster.row("instances", "web"))["node"] == "node2" and row["reason"].startswith("io-error"), "it waits on node2")
    assert not cluster.qemu("node1", web)
    cluster.ring(web)
    stood = cluster.acks.last(web)
    storage.grow()
    cluster.acks.beyond(web, stood + 5)
    cluster.settled(web, on="node2")
    assert not cluster.findings("web on")
    cluster.do("POST", "/v1/instances/web/stop", timeout=0.0)


def workers(cluster: Cluster, node: str, pool: str) -> list[int]:
    """Worker processes of a pool on a node."""
    return list(cluster._processes(node, "python", pool))


class Stopwatch:
    """How long the API takes to answer."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.longest = cluster, 0.0

    def ask(self, *paths: str) -> None:
        for path in paths or ("/v1/instances", "/v1/pools", "/v1/nodes", "/v1/volumes", "/v1/instances/quiet"):
            begin = time.monotonic()
            self.cluster.get(path)
            self.longest = max(self.longest, time.monotonic() - begin)

    def until(self, true: Any, what: str, seconds: float = 60.0) -> None:
        """Ask all the while."""

        def both() -> bool:
            self.ask()
            return bool(true())

        until(both, what, seconds)


def test_a_share_that_stands_still(cluster: Cluster, storage: Storage) -> None:
    web = cluster.add("onnas", "node2", pool="nas")
    quiet = cluster.add("quiet", "node2", pool="shared")
    pool = cluster.row("pools", "nas")["id"]
    since = time.monotonic()
    watch = Stopwatch(cluster)
    storage.stop()
    # Somebody asks; the master does, too.
    job = cluster.submit("POST", "/v1/volumes", name="wanted", pool="nas", size=8 * MIB)
    watch.until(lambda: cluster.row("pools", "nas")["stalled"], "it is said that the pool stands still")
    shown = cluster.row("pools", "nas")["stalled"]
    assert all("no answer to" in why and why.endswith(" s") for why in shown.values()), shown
    stalled = next(iter(shown))
    begin = time.monotonic()
    assert {f["about"] for f in cluster.findings("nas on") if f["what"] == "pool is stalled on a node"} >= {f"nas on {stalled}"}
    assert time.monotonic() - begin < 5
    # Refused at once, and clearly.
    ended = cluster.end_of(job)
    assert ended["state"] == "undone", ended
    assert ended["error"]["code"] in ("pool_unavailable", "unreachable", "deadline_exceeded"), ended
    # Everything else goes on.
    cluster.do("POST", "/v1/volumes", name="other", pool="shared", size=8 * MIB)
    # An agent that begins anew meanwhile does not hang, and leaves no more processes than three.
    dead = cluster.node(stalled).kill_service("agent", signal.SIGKILL)
    watch.until(lambda: cluster.node(stalled).service_pid("agent") not in (0, dead), "the agent is there again")
    watch.until(lambda: all(row["alive"] for row in cluster.items("nodes")), "both agents answer", 20)
    assert all(len(workers(cluster, node.name, pool)) <= 3 for node in cluster.lab.nodes)
    assert cluster.qemu("node2", web)
    assert cluster.acks.gap(quiet, since) < 2.5
    storage.go_on()
    watch.until(lambda: not cluster.row("pools", "nas")["stalled"], "it is said that the pool is back", 30)
    cluster.acks.beyond(web, cluster.acks.last(web) + 5)
    cluster.do("POST", "/v1/volumes", name="wanted", pool="nas", size=8 * MIB)
    for instance in (web, quiet):
        cluster.settled(instance, on="node2")
    assert watch.longest < PROMPT, f"{watch.longest:.2f} s"


def test_an_image_deleted_under_its_guest_is_saved_as_verify_says(cluster: Cluster) -> None:
    web = cluster.add("careless", "node1", pool="shared")
    image = cluster.image_of(web)
    image.unlink()
    found = [f for f in cluster.findings("careless-disk0") if f["what"] == "image was deleted under its guest"]
    assert len(found) == 1, cluster.findings()
    assert found[0]["about"] == "careless-disk0 on node1"
    assert cluster.refused("POST", "/v1/instances/careless/migrate", node="node2") == "not_found"
    for command in found[0]["commands"]:
        _, on, shell = command.rpartition("on node1: ")
        if on:
            cluster.node("node1").exec(["sh", "-c", shell], check=True)
        else:
            assert "done" in cluster.type(command), command
    cluster.settled(web)
    assert not cluster.findings("careless")
