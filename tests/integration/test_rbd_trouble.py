"""A Ceph in trouble, and every operation on it meanwhile: each ends with an error that says what to do, nothing hangs, the API and other
pools go on; and when the trouble is over, all goes on by itself and nothing is half made."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rbd_eyes import Polling, Sampling, quiet
from rbd_support import RbdCluster, keys
from support import MIB, until

from atoll.lab import network
from atoll.lab.layout import netns_name
from atoll.lab.smallceph import missing
from ceph_support import LONG

pytestmark = [
    pytest.mark.root,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("rbd-trouble"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
#: Seconds for an operation in trouble: the longest deadline of an order is two minutes.
LONGEST = 300.0
#: Longest answer of the API, in seconds. It takes some hundredths; the machine may be busy with other tests.
PROMPT = 3.0
GONE = {"pool_unavailable", "unreachable", "deadline_exceeded"}
FULL = {"pool_full", "pool_unhealthy"}
Request = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RbdCluster]:
    made = RbdCluster(f"ct{os.getpid()}", 2)
    try:
        made.add_pool("vms", isolation="volume")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def guests(cluster: RbdCluster) -> str:
    """``web`` runs, ``idle`` does not."""
    cluster.add("idle", "node2", pool="vms", start=False)
    return cluster.add("web", "node2", pool="vms")


def operations(cluster: RbdCluster) -> dict[str, Request]:
    """One of each, on objects of their own, so that none waits for another's locks."""
    other = "node1" if cluster.row("instances", "web")["node"] == "node2" else "node2"
    size = 8 * MIB
    return {
        "create": ("POST", "/v1/volumes", {"name": "v-create", "pool": "vms", "size": size}),
        "delete": ("DELETE", "/v1/volumes/v-delete", {}),
        "grow": ("POST", "/v1/volumes/v-grow/grow", {"size": 2 * size}),
        "rename": ("POST", "/v1/volumes/v-rename/rename", {"new_name": "v-renamed"}),
        "snapshot": ("POST", "/v1/snapshots", {"volume": "v-snap", "name": "s-create"}),
        "delete a snapshot": ("DELETE", "/v1/snapshots/s-delete", {}),
        "from a snapshot": ("POST", "/v1/volumes", {"name": "v-from", "snapshot": "s-base"}),
        "start": ("POST", "/v1/instances/idle/start", {}),
        "migrate": ("POST", "/v1/instances/web/migrate", {"node": other}),
    }


def begin(cluster: RbdCluster) -> None:
    jobs = [
        cluster.submit("POST", "/v1/volumes", name=f"v-{name}", pool="vms", size=8 * MIB)
        for name in ("delete", "grow", "rename", "snap", "source1", "source2")
    ]
    jobs = [cluster.end_of(job) for job in jobs]
    for volume, name in (("v-source1", "s-delete"), ("v-source2", "s-base")):
        cluster.do("POST", "/v1/snapshots", volume=volume, name=name)


def tidy(cluster: RbdCluster) -> None:
    """As it was before ``begin``."""
    for snapshot in cluster.items("snapshots"):
        cluster.do("DELETE", f"/v1/snapshots/{snapshot['name']}")
    for volume in cluster.items("volumes"):
        if volume["name"].startswith("v-"):
            cluster.do("DELETE", f"/v1/volumes/{volume['name']}")
    if cluster.row("instances", "idle")["state"] == "running":
        cluster.do("POST", "/v1/instances/idle/stop", timeout=0)


def ask(cluster: RbdCluster, request: Request) -> int | dict[str, Any]:
    """The job's number, or the error with which it is refused at once."""
    method, path, body = request
    status, data = cluster.request(method, path, body, os.urandom(8).hex())
    return int(data["job"]) if status == 202 else data


# --- the troubles; each gives what ends it ---


def _goes_on(cluster: RbdCluster) -> None:
    """An OSD that is alone and stood still for longer than its lease may let nobody read (waiting for readable) until it peers anew."""
    cluster.ceph.signal("osd", signal.SIGCONT)
    cluster.ceph.run("ceph", "osd", "down", "0")
    until(lambda: all(osd["up"] for osd in cluster.ceph.ask("osd", "dump")["osds"]), "its OSD is up again", 120)


def stopped(cluster: RbdCluster) -> Callable[[], None]:
    cluster.ceph.signal("osd", signal.SIGSTOP)
    return lambda: _goes_on(cluster)


def down(cluster: RbdCluster) -> Callable[[], None]:
    """Its monitor is killed. Its OSD, which would lose what it has in memory, only stands still."""
    cluster.ceph.end("mon")
    cluster.ceph.signal("osd", signal.SIGSTOP)

    def up() -> None:
        cluster.ceph.again("mon")
        _goes_on(cluster)

    return up


def full(cluster: RbdCluster) -> Callable[[], None]:
    def ratios(*values: str) -> None:
        for name, value in zip(("nearfull", "backfillfull", "full"), values, strict=True):
            cluster.ceph.run("ceph", "osd", f"set-{name}-ratio", value)

    ratios("0.000001", "0.000002", "0.000003")
    until(lambda: "FULL" in cluster.ceph.run("ceph", "health", "detail"), "Ceph is full")
    until(lambda: "is full" in str(cluster.row("pools", "vms")["health"]["refuses_volumes"]), "Atoll has seen that it is full")
    return lambda: ratios("0.85", "0.9", "0.95")


def slow(cluster: RbdCluster) -> Callable[[], None]:
    """Its OSD stands still nine tenths of the time. Not by the network: this kernel has no netem."""
    ended = threading.Event()

    def pulse() -> None:
        while not ended.is_set():
            cluster.ceph.signal("osd", signal.SIGSTOP)
            ended.wait(0.9)
            cluster.ceph.signal("osd", signal.SIGCONT)
            ended.wait(0.1)

    thread = threading.Thread(target=pulse, daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()
        _goes_on(cluster)

    return end


def _new_workers(cluster: RbdCluster) -> None:
    """Connections that stand are not cut by any of this: the agent that works on the pool begins anew."""
    dead = cluster.node("node1").kill_service("agent", signal.SIGKILL)
    until(lambda: cluster.node("node1").service_pid("agent") not in (0, dead), "the agent is there again")
    cluster.wait_alive()


def wrong_key(cluster: RbdCluster) -> Callable[[], None]:
    path: Path = cluster.node("node1").root / "etc" / "atoll" / "manager.keyring"
    right = path.read_text()
    head, sign, _ = right.partition("key = ")
    wrong = subprocess.run(["ceph-authtool", "--gen-print-key"], check=True, capture_output=True, text=True).stdout
    path.write_text(f"{head}{sign}{wrong}\n")
    _new_workers(cluster)
    return lambda: path.write_text(right) and None


def unknown_pool(cluster: RbdCluster) -> Callable[[], None]:
    name = cluster.row("pools", "vms")["options"]["pool"]
    cluster.ceph.run("ceph", "osd", "pool", "rename", name, "elsewhere")
    _new_workers(cluster)
    return lambda: cluster.ceph.run("ceph", "osd", "pool", "rename", "elsewhere", name) and None


#: The trouble, the codes of errors that are allowed for what is not in ``goes``, what must be done in spite of it, what may be.
TROUBLES = [
    pytest.param(stopped, GONE, set(), set(), id="its OSD stands still", marks=LONG),
    pytest.param(down, GONE, set(), set(), id="down", marks=LONG),
    pytest.param(full, FULL, {"delete", "delete a snapshot"}, {"snapshot"}, id="full", marks=LONG),
    pytest.param(slow, GONE, set(), {"*"}, id="slow", marks=LONG),
    pytest.param(wrong_key, GONE, set(), set(), id="a wrong key", marks=LONG),
    pytest.param(unknown_pool, GONE, set(), set(), id="an unknown pool", marks=LONG),
]


@pytest.mark.parametrize(("trouble", "codes", "goes", "may"), TROUBLES)
def test_every_operation_on_a_ceph_in_trouble(
    cluster: RbdCluster,
    guests: str,
    healing: ExitStack,
    record_property: Callable[[str, object], None],
    trouble: Callable[[RbdCluster], Callable[[], None]],
    codes: set[str],
    goes: set[str],
    may: set[str],
) -> None:
    begin(cluster)
    secrets = set(keys(cluster))
    with Sampling() as sampling, Polling(cluster) as polling:
        healing.callback(trouble(cluster))
        asked = {name: ask(cluster, request) for name, request in operations(cluster).items()}
        # Other storage goes on.
        cluster.do("POST", "/v1/volumes", name="other", pool="shared", size=8 * MIB)
        cluster.do("DELETE", "/v1/volumes/other")
        check = cluster.end_of(cluster.submit("POST", "/v1/pools/vms/check"), LONGEST)
        again: list[str] = []
        bad: list[str] = []
        for name, job in asked.items():
            ended = cluster.end_of(job, LONGEST) if isinstance(job, int) else {"state": "undone", "error": job}
            error = ended["error"] or {}
            print(f"{name}: {ended['state']} {error.get('code')}: {error.get('message') or error.get('detail')} -> {error.get('hint')}")
            if ended["state"] == "undone":
                again.append(name)
                if name in goes or error["code"] not in codes or not error.get("hint"):
                    bad.append(f"{name}: {error}")
            elif ended["state"] != "done" or not {name, "*"} & (goes | may):
                bad.append(f"{name} is {ended['state']}: {ended.get('reason')}")
        assert not bad, bad
        healing.close()
        until(lambda: not cluster.row("pools", "vms")["stalled"], "the pool is back", 120)
        until(lambda: cluster.end_of(cluster.submit("POST", "/v1/pools/vms/check"))["result"]["ok"], "its check is good", 120)
        until(lambda: not cluster.row("pools", "vms")["health"]["refuses_volumes"], "it takes volumes", 120)
        quiet(cluster, "vms")
        if check["state"] == "done" and codes is GONE and not may:
            assert not check["result"]["ok"], "the check has not noticed"
        later = operations(cluster)
        for name in again:
            method, path, body = later[name]
            cluster.do(method, path, **body)
        cluster.settled(guests)
        tidy(cluster)
        quiet(cluster, "vms")
        assert cluster.findings() == []
    record_property("longest answer of the API", round(polling.longest, 3))
    print(f"{polling.asked} requests, the longest took {polling.longest:.2f} s")
    assert not polling.failed
    assert polling.longest < PROMPT
    assert sampling.saw("qemu-system-x86_64")
    assert sampling.told(secrets | set(keys(cluster))) == []


# --- one image in trouble ---


def watched(cluster: RbdCluster, image: str, healing: ExitStack) -> None:
    """Somebody has it open for writing, and no lock of Ceph's keeps anybody away for long."""
    argv = ["qemu-io", "-f", "raw", f"rbd:{image}:id=admin:conf={cluster.ceph.conf}"]
    within = ["nsenter", f"--net={network.NETNS_DIR}/{netns_name(cluster.lab.name, 'switch')}", "--"]
    other = subprocess.Popen([*within, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    healing.callback(other.wait, 60)
    assert other.stdin is not None
    assert other.stdout is not None
    healing.callback(other.stdin.close)
    other.stdin.write("write 0 4096\n")
    other.stdin.flush()
    until(lambda: "wrote 4096" in other.stdout.readline(), "it has written")


def cloned(cluster: RbdCluster, image: str, healing: ExitStack) -> None:
    """By hand, from a snapshot that was made by hand."""
    pool = image.partition("/")[0]
    cluster.rbd("snap", "create", "--no-progress", f"{image}@byhand")
    cluster.rbd("clone", "--rbd-default-clone-format", "2", f"{image}@byhand", f"{pool}/byhand")

    def away() -> None:
        cluster.rbd("rm", "--no-progress", f"{pool}/byhand")
        cluster.rbd("snap", "rm", "--no-progress", f"{image}@byhand")

    healing.callback(away)


def trashed(cluster: RbdCluster, image: str, healing: ExitStack) -> None:
    pool, _, name = image.partition("/")
    cluster.rbd("trash", "mv", image)

    def restore() -> None:
        ident = next(line.split()[0] for line in cluster.rbd("trash", "ls", pool).splitlines() if line.endswith(name))
        cluster.rbd("trash", "restore", "-p", pool, ident)

    healing.callback(restore)


def deleted(cluster: RbdCluster, image: str, healing: ExitStack) -> None:
    cluster.rbd("rm", "--no-progress", image)
    healing.callback(cluster.rbd, "create", image, "--size", "8M")


GROW: Request = ("POST", "/v1/volumes/v-ill/grow", {"size": 16 * MIB})
SNAPSHOT: Request = ("POST", "/v1/snapshots", {"volume": "v-ill", "name": "s-ill"})
RENAME: Request = ("POST", "/v1/volumes/v-ill/rename", {"new_name": "v-ill2"})
ATTACH: Request = ("POST", "/v1/instances/idle/attach-disk", {"volume": "v-ill"})
MISSING = {name: (request, "not_found") for name, request in (("grow", GROW), ("snapshot", SNAPSHOT), ("rename", RENAME))}
DELETE: Request = ("DELETE", "/v1/volumes/v-ill", {})


@pytest.mark.parametrize(
    ("trouble", "refused"),
    [
        pytest.param(watched, {"delete": (DELETE, "disk_in_use"), "rename": (RENAME, "disk_in_use")}, id="with a watcher"),
        pytest.param(cloned, {"delete": (DELETE, "conflict")}, id="with a clone"),
        pytest.param(trashed, MISSING, id="in the trash"),
        pytest.param(deleted, MISSING, id="deleted by hand"),
    ],
)
def test_an_image_in_trouble(
    cluster: RbdCluster,
    guests: str,
    healing: ExitStack,
    trouble: Callable[[RbdCluster, str, ExitStack], None],
    refused: dict[str, tuple[Request, str]],
) -> None:
    """Each refusal says why and what to type, and leaves the volume as it was; once it is mended the same works."""
    cluster.do("POST", "/v1/volumes", name="v-ill", pool="vms", size=8 * MIB)
    image = f"{cluster.row('pools', 'vms')['options']['pool']}/{cluster.row('volumes', 'v-ill')['logical_id']}"
    trouble(cluster, image, healing)
    bad = []
    for name, (request, code) in refused.items():
        job = ask(cluster, request)
        ended = cluster.end_of(job) if isinstance(job, int) else {"state": "undone", "error": job}
        error = ended["error"] or {}
        print(f"{name}: {ended['state']} {error.get('code')}: {error.get('message')} -> {error.get('hint')}")
        if ended["state"] != "undone" or error["code"] != code or not error["hint"]:
            bad.append(f"{name}: {ended['state']} {error} {ended.get('reason')}")
        assert cluster.row("volumes", "v-ill")["state"] == "available", name
    assert not bad, bad
    healing.close()
    cluster.do("DELETE", "/v1/volumes/v-ill")
    quiet(cluster, "vms")


def test_the_volume_of_an_image_that_was_deleted_by_hand_can_be_forgotten(cluster: RbdCluster, guests: str) -> None:
    cluster.do("POST", "/v1/volumes", name="v-gone", pool="vms", size=8 * MIB)
    image = f"{cluster.row('pools', 'vms')['options']['pool']}/{cluster.row('volumes', 'v-gone')['logical_id']}"
    cluster.rbd("rm", "--no-progress", image)
    cluster.do("DELETE", "/v1/volumes/v-gone")
    quiet(cluster, "vms")
