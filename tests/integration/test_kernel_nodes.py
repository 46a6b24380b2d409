"""Nodes with a kernel of their own: what they are, what power does to them, and images in a real Ceph that their kernel maps."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.lab import find, layout, network
from atoll.lab.bringup import ATOLL, make_cluster, wait_alive
from atoll.lab.kernel import image as kernel_image
from atoll.lab.kernel.node import KernelNode
from atoll.lab.lab import Lab
from atoll.lab.smallceph import missing
from atoll.lab.sweep import traces
from atoll.model.errors import HostError, InvalidInput, NodeUnavailable, NotSupported
from ceph_support import LONG, Ceph

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("kernel-nodes"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
MIB = 1 << 20
PATIENCE = 240.0
NAME = f"kn{os.getpid()}"
#: Given as text: a working copy under /tmp is not to be seen in nodes.
DRIVER = Path(__file__).with_name("kernel_driver.py")


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    try:
        kernel_image.require()
    except HostError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="atoll-kl-", dir="/var/lib") as place:
        patch.setenv("ATOLL_LAB_DIR", place)
        made = Lab.create(NAME, 2, disks=1, kernel=["node2"])
        try:
            yield made
        finally:
            made.down()


@pytest.fixture(scope="module")
def node(lab: Lab) -> KernelNode:
    found = lab.node("node2")
    assert isinstance(found, KernelNode)
    return found


# --- the node ---


def test_it_runs_debians_kernel_and_the_machines_programs(lab: Lab, node: KernelNode) -> None:
    assert "cloud-amd64" in node.exec(["cat", "/proc/version"], check=True).stdout
    assert "cloud-amd64" not in lab.node("node1").exec(["cat", "/proc/version"], check=True).stdout
    assert node.exec(["modprobe", "rbd"]).returncode == 0
    assert node.exec(["ls", "/sys/bus/rbd"], check=True).stdout.split()[:2] == ["add", "add_single_major"]
    assert node.exec(["hostname"], check=True).stdout == "node2\n"
    assert node.exec(["blockdev", "--getsize64", "/dev/disk1"], check=True).stdout == f"{4 << 30}\n"
    with pytest.raises(NotSupported, match="not seen from outside"):
        _ = node.root


def test_programs_have_their_streams_exit_status_and_end(node: KernelNode) -> None:
    data = os.urandom(3 * MIB)
    done = node.exec(["sh", "-c", "cat; echo words >&2; exit 7"], input=data, text=False)
    assert (done.returncode, done.stdout == data, done.stderr) == (7, True, b"words\n")
    assert node.exec(["sh", "-c", "kill -9 $$"]).returncode == 137
    assert node.exec(["/nowhere"]).returncode == 127
    assert node.exec(["sh", "-c", "echo $FLAVOUR"], env={"FLAVOUR": "salt"}).stdout == "salt\n"
    # The program goes with its caller.
    caller = node.popen(["sleep", "86401"], stdin=subprocess.DEVNULL)
    until(lambda: node.exec(["pgrep", "-f", "^sleep 86401"]).returncode == 0, "it runs")
    caller.kill()
    caller.wait()
    until(lambda: node.exec(["pgrep", "-f", "^sleep 86401"]).returncode == 1, "it has ended")


def test_it_shares_files_logs_and_the_network_with_the_lab(lab: Lab, node: KernelNode) -> None:
    other = lab.node("node1")
    other.exec(["sh", "-c", "echo from node1 >/srv/shared/one"], check=True)
    assert node.exec(["cat", "/srv/shared/one"], check=True).stdout == "from node1\n"
    node.exec(["sh", "-c", "echo from node2 >/srv/shared/two; echo logged >/var/log/atoll/some.log"], check=True)
    assert other.exec(["cat", "/srv/shared/two"], check=True).stdout == "from node2\n"
    assert (node.log_dir / "some.log").read_text() == "logged\n"
    assert node.exec(["ls", str(lab.directory)], check=True).stdout == ""
    reach = [sys.executable, "-c", f"import socket; socket.create_connection(('{other.address}', 9), 5)"]
    assert "refused" in node.exec(reach).stderr.lower()
    node.cut()
    assert not node.connected
    assert "refused" not in node.exec(reach).stderr.lower()
    node.heal()
    until(lambda: "refused" in node.exec(reach).stderr.lower(), "it reaches node1 again")


def test_a_power_cut_takes_what_was_not_fsynced(lab: Lab, node: KernelNode) -> None:
    write = "import os; f = open('kept', 'w'); f.write('kept'); f.flush(); os.fsync(f.fileno()); open('lost', 'w')"
    node.exec([sys.executable, "-c", f"import os; os.chdir('/var/lib/atoll'); {write}"], check=True)
    node.kill()
    assert not node.running
    with pytest.raises(NodeUnavailable, match="has no power"):
        node.exec(["true"])
    assert list(network.links(NAME)) == ["node1"]
    node.boot()
    assert node.exec(["cat", "/var/lib/atoll/kept"], check=True).stdout == "kept"
    assert node.exec(["ls", "/var/lib/atoll/lost"]).returncode != 0
    # Asked of the machine: a node that stops by itself has no power either.
    node.exec(["sh", "-c", "echo b >/proc/sysrq-trigger"], timeout=PATIENCE)
    until(lambda: not node.running, "it has stopped")
    node.boot()


def test_an_agent_runs_on_it(lab: Lab, node: KernelNode) -> None:
    make_cluster(lab, "fake", deadline=PATIENCE)
    assert [(known.name, known.state) for known in node.services()] == [("agent", "running")]
    pid = node.kill_service("agent", signal.SIGKILL)
    until(lambda: node.service_pid("agent") not in (0, pid), "it is started again")
    # It is slow, and of no use to what follows.
    node.stop_service("agent")


@LONG
def test_an_agent_is_back_after_a_power_cut(lab: Lab, node: KernelNode) -> None:
    node.kill()
    node.boot()
    wait_alive(lab.node("node1"), ["node1", "node2"], 2 * PATIENCE)
    shown = lab.node("node1").exec([*ATOLL, "node", "list", "--format", "json"], check=True).stdout
    assert {row["name"] for row in json.loads(shown) if row["alive"]} == {"node1", "node2"}
    node.stop_service("agent")


# --- images in Ceph ---


class Maps:
    """Calls of an agent's, made in the node."""

    def __init__(self, node: KernelNode, ceph: Ceph) -> None:
        self.node, self.ceph = node, ceph
        self.process: subprocess.Popen[Any] | None = None

    def begin(self) -> None:
        argv = [sys.executable, "-P", "-c", DRIVER.read_text()]
        self.process = self.node.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def call(self, call: str, image: dict[str, Any] | None = None, way: str = "", **more: Any) -> Any:
        if self.process is None:
            self.begin()
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, "image": image, "way": way, **more}) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], f"no answer to {call}"
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise Refused(reply["error"], reply["message"])
        return reply["result"]

    def image(self, name: str, size: int = 8, *features: str) -> dict[str, Any]:
        """An image of ``size`` MiB, as it is told to a way; a user of its own may use it, and may shut nobody out."""
        self.ceph.run("rbd", "create", f"vms/{name}", "--size", str(size), *(["--image-feature", ",".join(features)] if features else []))
        user = f"atoll-node2.{name}"
        keyring = self.ceph.user(f"client.{user}", mon="allow r", osd="profile rbd pool=vms")
        key = keyring.read_text().split("key = ")[1].split()[0]
        self.node.write_file(f"/run/keys/{name}", key, 0o400)
        conf = "/etc/atoll/ceph.conf"
        return {"volume": f"vol-{name}", "conf": conf, "pool": "vms", "name": name, "user": user, "key_file": f"/run/keys/{name}"}

    def content(self, name: str) -> bytes:
        return subprocess.run(
            ["nsenter", *self.ceph._within[1:], "rbd", "-c", str(self.ceph.conf), "export", "--no-progress", f"vms/{name}", "-"],
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout

    def watchers(self, name: str) -> list[str]:
        found = json.loads(self.ceph.run("rbd", "status", f"vms/{name}", "--format", "json"))
        return [watcher["address"] for watcher in found["watchers"]]

    def write(self, device: str, text: str, offset: int = 0, **more: Any) -> subprocess.CompletedProcess[Any]:
        """Past the page cache, and in Ceph when it returns."""
        argv = ["dd", f"of={device}", "bs=4096", f"seek={offset // 4096}", "conv=sync,notrunc", "oflag=direct", "status=none"]
        return self.node.exec(argv, input=text, **more)

    def traces(self) -> str:
        """Devices, records and processes."""
        looks = 'ls /dev | grep "^rbd[0-9]"; ls /run/atoll/maps | grep json; pgrep -a rbd-nbd; cat /sys/block/nbd*/pid 2>/dev/null'
        return str(self.node.exec(["sh", "-c", looks]).stdout)


class Refused(Exception):
    """What a call in the node came to."""


@pytest.fixture(scope="module")
def maps(lab: Lab, node: KernelNode) -> Iterator[Maps]:
    if missing() or shutil.which("rbd-nbd") is None:
        pytest.skip("Ceph or rbd-nbd is not installed")
    net, switch = lab.record.net, layout.netns_name(NAME, "switch")
    subprocess.run(["ip", "-n", switch, "addr", "add", f"{net}.2/24", "dev", network.BRIDGE], check=True)
    place = Path(tempfile.mkdtemp(prefix="atoll-kc-", dir="/tmp"))
    ceph = Ceph(place / "c", f"{net}.2", f"{net}.0/24", netns=f"{network.NETNS_DIR}/{switch}")
    made = Maps(node, ceph)
    try:
        ceph.up()
        ceph.pool("vms")
        fsid = ceph.ask("fsid")["fsid"]
        node.write_file("/etc/atoll/ceph.conf", f"[global]\nfsid = {fsid}\nmon_host = {net}.2\n", 0o644)
        yield made
    finally:
        made.end()
        if node.running:
            # An emulated machine with a mapped image and without Ceph takes its time to end by itself; a power cut does not.
            node.kill()
        ceph.down()
        shutil.rmtree(place, ignore_errors=True)


WAYS = pytest.mark.parametrize("way", ["krbd", "rbd-nbd"])


def test_both_ways_are_there_and_the_kernels_own_comes_first(maps: Maps) -> None:
    found = maps.call("available")
    assert (found["krbd"], found["rbd-nbd"]) == ("", "")
    image = maps.image("first")
    device, way = maps.call("attach", image)
    assert (device, way) == ("/dev/rbd0", "krbd")
    assert maps.call("detach", image) == ""
    # The kernel does not know journals; the process does.
    image = maps.image("journal", 8, "exclusive-lock", "journaling")
    device, way = maps.call("attach", image)
    assert (device, way) == ("/dev/nbd0", "rbd-nbd")
    assert maps.call("detach", image) == ""
    assert maps.traces() == ""


@WAYS
def test_an_image_is_a_device_that_grows_in_use_and_goes_without_a_trace(maps: Maps, way: str) -> None:
    image = maps.image(name := f"grows-{way}")
    device = maps.call("map", image, way)
    assert maps.call("map", image, way) == device
    assert maps.write(device, "written through it", 3 * MIB).returncode == 0
    key = maps.node.exec(["cat", image["key_file"]], check=True).stdout
    assert key not in maps.node.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'"]).stdout
    assert len(maps.watchers(name)) == 1
    held = maps.node.popen(
        ["sh", "-c", f"exec 3<>{device}; echo open; read x; echo late >&3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "open\n"
    with pytest.raises(Refused, match="still in use by pid"):
        maps.call("unmap", image, way)
    maps.ceph.run("rbd", "resize", "--no-progress", f"vms/{name}", "--size", "16")
    assert maps.call("resize", image, way, size=16 * MIB) == 16 * MIB
    assert maps.write(device, "beyond its first size", 12 * MIB).returncode == 0
    held.communicate("now\n", timeout=PATIENCE)
    if way == "krbd":
        # An agent that was killed has a successor, who finds what is mapped.
        maps.end()
    assert maps.call("device", image, way) == device
    assert maps.call("map", image, way) == device
    assert maps.call("unmap", image, way) == ""
    assert maps.call("unmap", image, way) == ""
    assert maps.call("device", image, way) == ""
    content = maps.content(name)
    assert content.startswith(b"late\n")
    assert content[3 * MIB :].startswith(b"written through it")
    assert content[12 * MIB :].startswith(b"beyond its first size")
    assert maps.watchers(name) == []
    assert maps.traces() == ""


@LONG
@WAYS
def test_what_cannot_be_mapped_is_told_apart(maps: Maps, way: str) -> None:
    image = maps.image(f"refused-{way}")
    with pytest.raises(Refused, match="NotFound"):
        maps.call("map", {**image, "name": "nowhere"}, way)
    with pytest.raises(Refused, match="PoolUnavailable"):
        maps.call("map", {**image, "user": "nobody"}, way)
    maps.call("map", {**image, "read_only": True}, way)
    assert maps.write(maps.call("device", image, way), "no").returncode != 0
    with pytest.raises(Refused, match="Conflict"):
        maps.call("map", image, way)
    assert maps.call("unmap", image, way) == ""
    assert maps.traces() == ""


@WAYS
def test_who_is_shut_out_gets_errors_and_can_be_unmapped(maps: Maps, way: str) -> None:
    image = maps.image(name := f"fenced-{way}")
    device = maps.call("map", image, way)
    # The same user's, whom the kernel would give the same client.
    maps.ceph.run("rbd", "create", f"vms/beside-{way}", "--size", "8")
    other = {**image, "volume": f"vol-beside-{way}", "name": f"beside-{way}"}
    beside = maps.call("map", other, way)
    assert maps.write(device, "before").returncode == 0
    for address in maps.watchers(name):
        maps.ceph.run("ceph", "osd", "blocklist", "add", address)
    for _ in range(2):
        done = maps.write(device, "after!")
        assert (done.returncode, "Input/output error" in done.stderr) == (1, True)
    # Nobody else is shut out with it.
    assert maps.write(beside, "beside").returncode == 0
    assert "Input/output error" in maps.call("unmap", image, way)
    assert maps.call("unmap", other, way) == ""
    assert maps.content(name).startswith(b"before")
    assert maps.traces() == ""


@LONG
@WAYS
def test_a_write_waits_for_ceph_and_nothing_is_unmapped_meanwhile(maps: Maps, way: str) -> None:
    image = maps.image(name := f"waits-{way}")
    device = maps.call("map", image, way)
    assert maps.write(device, "before").returncode == 0
    maps.ceph.signal("osd", signal.SIGSTOP)
    try:
        argv = ["dd", f"of={device}", "bs=4096", "conv=sync,notrunc", "oflag=direct", "status=none"]
        writer = maps.node.popen(argv, stdin=subprocess.PIPE)
        assert writer.stdin is not None
        writer.stdin.write(b"while it was away")
        writer.stdin.close()
        until(lambda: maps.node.exec(["pgrep", "-f", f"^dd of={device}"]).returncode == 0, "it writes")
        with pytest.raises(Refused, match=r"DiskInUse"):
            maps.call("unmap", image, way)
        assert writer.poll() is None
    finally:
        maps.ceph.signal("osd", signal.SIGCONT)
    assert writer.wait(PATIENCE) == 0
    assert maps.call("unmap", image, way) == ""
    assert maps.content(name).startswith(b"while it was away")


@LONG
@WAYS
def test_without_an_answer_of_cephs_an_idle_device_stays_mapped(maps: Maps, way: str) -> None:
    image = maps.image(f"silent-{way}")
    device = maps.call("map", image, way)
    maps.node.exec(["udevadm", "settle"], check=True)
    maps.ceph.signal("osd", signal.SIGSTOP)
    try:
        with pytest.raises(Refused, match=r"DeadlineExceeded.*stays mapped"):
            maps.call("unmap", image, way)
    finally:
        maps.ceph.signal("osd", signal.SIGCONT)
    assert maps.call("device", image, way) == device

    def ended() -> bool:
        try:
            return maps.call("unmap", image, way) == ""
        except Refused as refused:
            # What Ceph had been asked meanwhile is being answered, and its OSD may have been taken for dead.
            if refused.args[0] not in ("DeadlineExceeded", "DiskInUse"):
                raise
            return False

    until(ended, "it is unmapped")
    assert maps.traces() == ""


def test_which_nodes_are_meant() -> None:
    names = layout.node_names(3)
    assert layout.kernel_nodes("", names) == []
    assert layout.kernel_nodes("all", names) == names
    assert layout.kernel_nodes("2", names) == ["node2", "node3"]
    assert layout.kernel_nodes("node3,node1", names) == ["node1", "node3"]
    for wrong in ("4", "node4", "node1,,"):
        with pytest.raises(InvalidInput, match="kernel"):
            layout.kernel_nodes(wrong, names)


def test_what_is_missing_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match=r"kmod.*qemu-system-x86") as missed:
        kernel_image.require()
    assert missed.value.hint.startswith("apt-get install ")


@LONG
def test_two_start_at_once_and_a_killed_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"kt{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="atoll-kl-", dir="/var/lib") as place:
        monkeypatch.setenv("ATOLL_LAB_DIR", place)
        argv = [*ATOLL, "lab", "up", "--name", name, "--nodes", "2", "--kernel", "--no-cluster"]
        try:
            up = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            until(lambda: list(Path(place).glob("*/nodes/node2/run/port1.sock")), "an emulated machine has been started")
            up.kill()
            up.wait()
            find.remove(name)
            assert traces(name, Path(place) / name) == []
            made = Lab.create(name, 2, kernel=["node1", "node2"])
            assert [node.exec(["hostname"]).stdout for node in made.nodes] == ["node1\n", "node2\n"]
        finally:
            find.remove(name)
        assert traces(name, Path(place) / name) == []
        assert not os.listdir(place)


def test_nothing_is_left_of_it(lab: Lab) -> None:
    """The last one: the lab is gone afterwards."""
    if not lab.node("node2").running:
        lab.node("node2").boot()
    directory = str(lab.directory)
    lab.down()
    assert traces(NAME, lab.directory) == []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert not ("qemu" in argv or "virtiofsd" in argv) or (directory not in argv and NAME not in argv)
