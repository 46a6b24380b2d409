"""``ceph``: a Ceph cluster that is built, and disks in it: librbd called bare, the ``rbd`` command and Atoll in turns; the data path,
a migration."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atoll.lab.bringup import ATOLL
from atoll.lab.guest.build import GuestImage, append, build
from atoll.model.messages import PoolRef
from atoll.storage.rbd.keyring import key_of
from benchmarks import migration
from benchmarks.api import Api
from benchmarks.cluster import GIB, Cluster, cluster
from benchmarks.records import Record, record

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "rbd", "qemu-system-x86_64", "qemu-img")
#: What Ceph's clients have on each node, and where the key is for QEMUs that are told by hand.
ETC, KEY = "/etc/atoll/ceph", "/run/atoll/by-hand.key"
#: Rounds of each operation, of creations at once, of the data path and of migrations; and turns in which peers are measured.
ROUNDS, WAVES, PATHS, MOVES, TURNS = 20, 8, 6, 6, 4
TOGETHER, OWN_MS = 20, 10.0
MIB = 1 << 20
_SECONDS = re.compile(r"completed in ([0-9.]+) seconds")


class CephCluster:
    """The cluster, and a pool in the Ceph that was built on its nodes."""

    def __init__(self, made: Cluster) -> None:
        self.made = made
        self.options = {"pool": "rbd", "conf": f"{ETC}/ceph.conf", "user": "atoll", "keyring": f"{ETC}/ceph.client.atoll.keyring"}
        self.options |= {"node_user": "atoll-node", "node_keyring": f"{ETC}/ceph.client.atoll-node.keyring"}
        made.api.do("POST", "/v1/pools", name="vms", driver="rbd", options=self.options)
        row = made.api.get("/v1/pools/vms")
        self.ref = PoolRef(id=row["id"], name="vms", driver="rbd", options=row["options"], node="node1").model_dump(mode="json")

    def bare(self, what: str, **args: Any) -> Any:
        """Something of ``benchmarks.librbd``, on the node where Atoll's pool half works."""
        text = json.dumps({"what": what, **args})
        return json.loads(self.made.in_node(self.made.first, ["-m", "benchmarks.librbd"], input=text))

    def rbd(self, *words: str) -> None:
        """The command, as the user that manages images."""
        self.made.first.exec(["rbd", "-c", self.options["conf"], "-n", "client.atoll", *words], check=True, timeout=60)

    @property
    def key(self) -> str:
        """Of the user that guests use."""
        node = self.made.first
        return key_of(str(node.root) + self.options["node_keyring"], self.options["node_user"])


def run() -> Iterator[Record]:
    """Everything, in about three minutes."""
    gone = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or gone:
        print(f"  ceph: needs root and {', '.join(gone or PROGRAMS)}; left out", file=sys.stderr)
        return
    image = build(migration.CACHE)
    with cluster("bc", pools=False, hypervisor="qemu", binds=[str(migration.CACHE)], disks=1) as made:
        yield from _deployment(made)
        there = CephCluster(made)
        yield from _operations(there, image)
        yield from _together(there)
        yield from _data_path(there)
        cpu = there.bare("collector", ref=there.ref, samples=50)
        yield record("Ceph, one sample of its health", cpu, "CPU ms", target=5)
        yield from _migration(there, image)


def _deployment(made: Cluster) -> Iterator[Record]:
    """A Ceph cluster of three nodes with a disk each, three copies of everything; from the request to HEALTH_OK."""
    made.first.exec([*ATOLL, "cluster", "modify", "-S", "ceph:disk=/dev/disk1,profile=small"], check=True, timeout=60)
    began = time.perf_counter()
    made.api.do("POST", "/v1/storages/default/init", type="ceph")
    wall = time.perf_counter() - began
    health = made.api.get("/v1/storages/ceph/status")["health"]
    if health != "HEALTH_OK":
        raise RuntimeError(f"the new Ceph cluster is in {health}")
    yield record("Ceph cluster of three nodes, to HEALTH_OK", wall, "s", target=30)


# --- one after the other ---


def _operations(there: CephCluster, image: GuestImage) -> Iterator[Record]:
    line = _box(there.made.api, image, there.made)
    there.rbd("create", "--size", "16", "rbd/barebox")
    qemu = migration.Bare(there.made.lab.node("node3"), [by_hand(there, word, "barebox") for word in line], incoming=False)
    bare: dict[str, list[float]] = {}
    ours: dict[str, list[float]] = {}
    try:
        qemu.qmp("cont")
        _warm(there.made.api)
        # In short turns: other work on this machine meets both alike.
        for turn in range(TURNS):
            numbers = range(turn * ROUNDS // TURNS, (turn + 1) * ROUNDS // TURNS)
            _bare(there, qemu, numbers, bare)
            _by_atoll(there.made.api, numbers, ours)
    finally:
        qemu.close()
    there.made.api.do("DELETE", "/v1/instances/box", timeout=0)
    # Half as often: they take so long that it makes no difference.
    words = there.bare("commands", options=there.options, rounds=ROUNDS // 2, prefix="w")
    for what, walls in ours.items():
        value, peer = statistics.median(walls), statistics.median(bare[what])
        name = "QEMU and QMP" if what == "attach" else "librbd"
        yield record(f"rbd {what}", value, "ms", peer=name, peer_value=peer, target=peer + OWN_MS)
        command = "rbd status, which only opens it" if what == "attach" else "rbd command"
        yield record(
            f"rbd {what}, against the command", value, "ms", peer=command, peer_value=statistics.median(words[what]), ratio_target=1
        )


def _box(api: Api, image: GuestImage, made: Cluster) -> list[str]:
    """A guest on node2 that does nothing; its command line."""
    api.do(
        "POST", "/v1/instances", name="box", template="vms", disks=[{"size": 16 * MIB}], memory=128 * MIB, node="node2",
        kernel=str(image.kernel), initrd=str(image.initrd), append=append(),
    )  # fmt: skip
    return migration.command_of(made.lab.node("node2"))


def _bare(there: CephCluster, qemu: migration.Bare, numbers: range, found: dict[str, list[float]]) -> None:
    """librbd, and for attaching a QEMU with the same machine that is told by hand."""
    prefix = f"b{numbers[0]}-"
    for what, walls in there.bare("operations", options=there.options, rounds=len(numbers), prefix=prefix).items():
        found.setdefault(what, []).extend(walls)
    for number in numbers:
        there.rbd("create", "--size", "1G", f"rbd/disk{number}")
        began = time.perf_counter()
        _plug(there, qemu, f"disk{number}", number + 1)
        found.setdefault("attach", []).append((time.perf_counter() - began) * 1000)


def _plug(there: CephCluster, qemu: migration.Bare, image: str, slot: int) -> None:
    qemu.qmp("object-add", {"qom-type": "secret", "id": f"key{slot}", "format": "base64", "file": KEY})
    node = {"driver": "rbd", "pool": "rbd", "image": image, "user": "atoll-node", "conf": there.options["conf"], "key-secret": f"key{slot}"}
    qemu.qmp("blockdev-add", {**node, "node-name": f"d{slot}", "cache": {"direct": True}, "discard": "unmap"})
    qemu.qmp("device_add", {"driver": "virtio-blk-pci", "id": f"v{slot}", "drive": f"d{slot}", "bus": f"slot{slot}", "addr": "0x0"})


def by_hand(there: CephCluster, word: str, image: str) -> str:
    """A word of the command line of Atoll's guest, for a QEMU that has another image, and the key in a file of its own."""
    for node in there.made.lab.nodes:
        (node.run_dir / Path(KEY).name).write_text(there.key)
    if '"rbd"' in word:
        return re.sub(r'"image": *"[^"]*"', f'"image": "{image}"', word)
    return re.sub(r'"file": *"[^"]*\.key"', f'"file": "{KEY}"', word)


def _warm(api: Api) -> None:
    """Not measured: what starts workers and imports."""
    api.do("POST", "/v1/volumes", name="base", pool="vms", size=GIB)
    api.do("POST", "/v1/snapshots", volume="base", name="first")


def _by_atoll(api: Api, numbers: range, found: dict[str, list[float]]) -> None:
    """From the request to the end of its job, in ms."""

    def timed(what: str, method: str, path: str, **body: Any) -> None:
        began = time.perf_counter()
        api.do(method, path, **body)
        found.setdefault(what, []).append((time.perf_counter() - began) * 1000)

    for number in numbers:
        name = f"a{number}"
        timed("create", "POST", "/v1/volumes", name=name, pool="vms", size=GIB)
        timed("grow", "POST", f"/v1/volumes/{name}/grow", size=2 * GIB)
        timed("snapshot", "POST", "/v1/snapshots", volume="base", name=f"s{number}")
        timed("clone", "POST", "/v1/volumes", name=f"k{number}", snapshot=f"s{number}")
        timed("attach", "POST", "/v1/instances/box/attach-disk", volume=name)
        api.do("POST", "/v1/instances/box/detach-disk", volume=name)
        timed("delete", "DELETE", f"/v1/volumes/{name}")


# --- at once ---


def _together(there: CephCluster) -> Iterator[Record]:
    each = WAVES // TURNS
    clients = [there.made.connect() for _ in range(TOGETHER)]
    bare: list[float] = []
    ours: list[float] = []
    with ThreadPoolExecutor(TOGETHER) as pool:
        for wave in range(WAVES):
            if wave % each == 0:
                bare += there.bare("together", options=there.options, rounds=each, prefix=f"t{wave}-", threads=TOGETHER)

            def one(index: int, wave: int = wave) -> None:
                clients[index].do("POST", "/v1/volumes", name=f"t{wave}-{index}", pool="vms", size=GIB)

            began = time.perf_counter()
            list(pool.map(one, range(TOGETHER)))
            ours.append(TOGETHER / (time.perf_counter() - began))
    for client in clients:
        client.close()
    value, peer = statistics.median(ours), statistics.median(bare)
    yield record(f"rbd creations, {TOGETHER} at once", value, "/s", peer=f"{TOGETHER} threads of librbd", peer_value=peer, ratio_target=0.8)


# --- the data path ---


def _data_path(there: CephCluster) -> Iterator[Record]:
    """Small writes, 16 under way, by ``qemu-img bench``: with what the connector tells QEMU, and with what one writes by hand."""
    there.rbd("create", "--size", "1G", "rbd/path")
    told = there.bare("blockdev", ref=there.ref, image="path")["blockdev"]
    # It takes no secrets: the configuration says where the key is.
    conf = "/run/atoll/by-hand.conf"
    node = there.made.first
    text = (node.root / there.options["conf"].lstrip("/")).read_text()
    (node.run_dir / "by-hand.conf").write_text(f"{text}\n[client.atoll-node]\nkeyring = {there.options['node_keyring']}\n")
    told = {**told, "conf": conf}
    del told["key-secret"]
    hand = {"driver": "rbd", "pool": "rbd", "image": "path", "user": "atoll-node", "conf": conf, "cache": {"direct": True}}
    found: dict[str, list[float]] = {"hand": [], "connector": []}
    for number in range(2 * PATHS):
        which = ("hand", "connector")[number % 2]
        found[which].append(_writes(there, {"hand": hand, "connector": told}[which]))
    value, peer = statistics.median(found["connector"]), statistics.median(found["hand"])
    yield record("rbd writes of 4 KiB, 16 under way", value, "/s", peer="blockdev by hand", peer_value=peer, ratio_target=0.95)


def _writes(there: CephCluster, node: dict[str, Any], count: int = 2000) -> float:
    """Writes a second."""
    argv = ["qemu-img", "bench", "-w", "-c", str(count), "-d", "16", "-s", "4096", "-t", "none"]
    argv.append(f"json:{json.dumps({'driver': 'raw', 'file': node})}")
    done = there.made.first.exec(argv, check=True, timeout=120)
    match = _SECONDS.search(done.stdout)
    if match is None:
        raise RuntimeError(f"qemu-img bench said something else: {done.stdout}")
    return count / float(match[1])


# --- migration ---


def _migration(there: CephCluster, image: GuestImage) -> Iterator[Record]:
    made = there.made
    line = migration.add(made, image, "vms")

    def bare_one(number: int) -> tuple[float, float]:
        # Each with an image of its own: a QEMU that was killed leaves its lock.
        there.rbd("create", "--size", str(migration.DISK // MIB), f"rbd/by-hand{number}")
        return migration.by_hand(made, line, number, lambda word: by_hand(there, word, f"by-hand{number}"))

    made.api.do("POST", "/v1/instances/web/stop", timeout=0)
    bare = [bare_one(number) for number in range(MOVES // 2)]
    made.api.do("POST", "/v1/instances/web/start", node="node2")
    ours = [migration.by_atoll(made, number) for number in range(MOVES)]
    made.api.do("POST", "/v1/instances/web/stop", timeout=0)
    bare += [bare_one(number) for number in range(MOVES // 2, MOVES)]
    for index, what in enumerate(("QEMU's total time", "the writer's pause")):
        value, peer = (statistics.median(found[index] for found in which) for which in (ours, bare))
        yield record(f"rbd, live migration, {what}", value, "ms", peer=migration.PEER, peer_value=peer, ratio_target=1.5)
