"""Real nodes: what they share, what they do not, and what a power cut takes from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.lab import process
from atoll.lab.lab import Lab
from atoll.lab.nodes import Node
from atoll.model.errors import AlreadyExists, DeadlineExceeded, HostError, InvalidInput, NodeUnavailable, NotFound, WrongState

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and loop devices need root")]

SERVER = """
import socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("0.0.0.0", 9000)); s.listen()
print("listening", flush=True)
while True:
    c, _ = s.accept(); c.sendall(socket.gethostname().encode()); c.close()
"""
CLIENT = "import socket, sys; print(socket.create_connection((sys.argv[1], 9000), 2).recv(99).decode())"


@pytest.fixture
def name() -> str:
    return f"t{os.getpid()}"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Lab]:
    monkeypatch.setenv("ATOLL_LAB_DIR", str(tmp_path / "labs"))
    made = Lab.create(name, 3, disks=2)
    try:
        yield made
    finally:
        made.down()


def until(condition: Callable[[], object], deadline: float = 20.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def serve(node: Node) -> None:
    node.set_service("greeter", ["python3", "-c", SERVER])
    until(lambda: "listening" in (node.log_dir / "greeter.log").read_text())


def ask(asker: Node, asked: str) -> subprocess.CompletedProcess[str]:
    return asker.exec(["python3", "-c", CLIENT, asked])


def test_a_node_has_names_root_and_devices_of_its_own(lab: Lab) -> None:
    one, two = lab.node("node1"), lab.node("node2")
    assert one.exec(["hostname"]).stdout == "node1\n"
    assert one.exec(["cat", "/etc/hostname"]).stdout == "node1\n"
    assert f"{two.address} node2" in one.exec(["cat", "/etc/hosts"]).stdout
    assert one.exec(["cat", "/etc/machine-id"]).stdout != two.exec(["cat", "/etc/machine-id"]).stdout
    for place in ("/tmp", "/run", "/etc", "/etc/atoll", "/var/lib/atoll", "/var/log/atoll", "/var/tmp", "/dev/shm"):
        one.exec(["touch", f"{place}/mine"], check=True)
        assert two.exec(["test", "-e", f"{place}/mine"]).returncode == 1, place
        # The node's private places lie in its own directory or nowhere, never on the machine.
        assert not Path(place, "mine").exists(), place
    assert one.exec(["test", "-e", "/dev/kvm"]).returncode == 1
    assert one.exec(["sh", "-c", "echo x > /dev/null && head -c 4 /dev/urandom | wc -c && test -c /dev/net/tun"]).stdout == "4\n"
    assert one.exec(["stat", "-f", "-c", "%T", "/var/lib/atoll"]).stdout == "xfs\n"
    assert Path(lab.directory / "nodes/node1/run/mine").exists() is False
    one.exec(["touch", "/run/atoll/api.sock"], check=True)
    assert (one.run_dir / "api.sock").exists()
    assert one.exec(["ps", "-e", "-o", "comm="]).stdout.split()[0].startswith("python")
    assert one.exec(["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]).stdout.strip() in {"2", "3", "4"}
    assert one.exec(["id", "-u", "atoll-guest"]).stdout == two.exec(["id", "-u", "atoll-guest"]).stdout != ""
    # A program that a node runs finds the code of this very process.
    assert one.exec([sys.executable, "-c", "import atoll.lab; print(atoll.lab.__file__)"]).stdout.strip().endswith("atoll/lab/__init__.py")


def test_spare_disks_belong_to_one_node_and_outlive_a_power_cut(lab: Lab) -> None:
    one, two = lab.node("node1"), lab.node("node2")
    write = "echo only-here | dd of=/dev/disk2 conv=sync,fsync bs=512 2>&1"
    one.exec(["sh", "-c", write], check=True)
    assert two.exec(["head", "-c", "9", "/dev/disk2"]).stdout == "\0" * 9
    one.kill()
    one.boot()
    assert one.exec(["head", "-c", "9", "/dev/disk2"]).stdout == "only-here"
    assert one.exec(["test", "-b", "/dev/disk3"]).returncode == 1


def test_all_nodes_share_one_file_system(lab: Lab) -> None:
    one, two = lab.node("node1"), lab.node("node2")
    one.exec(["sh", "-c", "echo hello > /srv/shared/f"], check=True)
    assert two.exec(["cat", "/srv/shared/f"]).stdout == "hello\n"
    lock = """
import fcntl, sys
f = open("/srv/shared/f", "r+"); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print("locked", flush=True); sys.stdin.read()
"""
    holder = one.popen(["python3", "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    assert "BlockingIOError" in two.exec(["python3", "-c", lock], stdin=subprocess.DEVNULL).stderr
    holder.communicate()

    two.unmount_shared()
    assert two.exec(["mountpoint", "-q", "/srv/shared"]).returncode != 0
    assert two.exec(["ls", "/srv/shared"]).stdout == ""
    assert one.exec(["mountpoint", "-q", "/srv/shared"]).returncode == 0
    lab.mount_shared("node2")
    assert two.exec(["cat", "/srv/shared/f"]).stdout == "hello\n"

    busy = one.popen(["sh", "-c", "cd /srv/shared && echo in && exec sleep 60"], stdout=subprocess.PIPE, text=True)
    assert busy.stdout.readline() == "in\n"
    with pytest.raises(HostError, match="busy"):
        one.unmount_shared()
    one.unmount_shared(lazy=True)
    assert one.exec(["ls", "/srv/shared"]).stdout == ""
    busy.kill()
    busy.communicate()


def test_nodes_reach_one_another_unless_cut(lab: Lab) -> None:
    one, two, three = lab.nodes
    serve(two)
    assert ask(one, two.address).stdout == "node2\n"
    assert ask(one, "node2").stdout == "node2\n"
    # The machine itself is not on the lab's network.
    assert lab.record.net not in subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    two.cut()
    assert not two.connected
    assert one.connected
    assert ask(one, two.address).returncode == 1
    assert ask(two, "127.0.0.1").stdout == "node2\n"
    assert two.exec(["hostname"]).stdout == "node2\n"
    two.heal()
    until(lambda: ask(three, two.address).stdout == "node2\n")


def test_a_power_cut_takes_what_was_not_fsynced(lab: Lab) -> None:
    node = lab.node("node2")
    write = """
import os
for place in ("/var/lib/atoll", "/etc/atoll"):
    with open(place + "/kept", "w") as f:
        f.write("kept" * 1000); f.flush(); os.fsync(f.fileno())
    os.fsync(os.open(place, os.O_RDONLY))
    with open(place + "/lost", "w") as f:
        f.write("lost")
"""
    node.exec(["python3", "-c", write], check=True)
    node.exec(["touch", "/run/gone", "/tmp/gone", "/run/atoll/gone", "/etc/gone", "/var/gone"], check=True)
    assert node.exec(["cat", "/var/lib/atoll/lost", "/etc/atoll/lost"]).stdout == "lostlost"
    first = node.pid
    node.kill()
    assert not node.running
    with pytest.raises(NodeUnavailable, match="no power"):
        node.exec(["true"])
    with pytest.raises(NodeUnavailable):
        node.kill()
    node.boot()
    assert node.pid != first
    assert node.exec(["cat", "/var/lib/atoll/kept", "/etc/atoll/kept"]).stdout == "kept" * 2000
    assert node.exec(["cat", "/var/lib/atoll/lost", "/etc/atoll/lost"]).stdout == ""
    assert node.exec(["ls", "/run/gone", "/tmp/gone", "/run/atoll/gone", "/etc/gone", "/var/gone"]).stdout == ""
    with pytest.raises(WrongState, match="has power"):
        node.boot()


def test_a_power_cut_takes_what_replaced_synced_data(lab: Lab) -> None:
    node = lab.node("node1")
    node.exec(["sh", "-c", "echo 1 > /var/lib/atoll/old && sync && echo 2 > /var/lib/atoll/old && echo 3 > /var/lib/atoll/new"], check=True)
    node.kill()
    node.boot()
    assert node.exec(["cat", "/var/lib/atoll/new"]).returncode == 1
    assert node.exec(["cat", "/var/lib/atoll/old"]).stdout in {"1\n", ""}


def test_peers_hear_nothing_of_a_power_cut(lab: Lab) -> None:
    one, two = lab.node("node1"), lab.node("node2")
    serve(two)
    wait = """
import socket, sys
s = socket.create_connection((sys.argv[1], 9001), 2); print("in", flush=True); s.settimeout(1.5)
try: print("heard", s.recv(9))
except TimeoutError: print("silence")
"""
    hold = """
import socket
s = socket.socket(); s.bind(("0.0.0.0", 9001)); s.listen(); print("up", flush=True); c, _ = s.accept(); c.recv(1)
"""
    server = two.popen(["python3", "-c", hold], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "up\n"
    client = one.popen(["python3", "-c", wait, two.address], stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "in\n"
    two.kill()
    assert client.communicate(timeout=20)[0] == "silence\n"
    assert server.wait(20) != 0
    two.boot()
    until(lambda: ask(one, two.address).stdout == "node2\n")


def test_services_come_back_and_their_children_live_on(lab: Lab) -> None:
    node = lab.node("node3")
    guest = "setsid sleep 300 & echo $! > /run/atoll/guest; exec sleep 301"
    node.set_service("agent", ["sh", "-c", guest], {"COLOUR": "blue"})
    until(lambda: node.service_pid("agent") and (node.run_dir / "guest").exists())
    guests = (node.run_dir / "guest").read_text().split()
    pid = node.kill_service("agent", signal.SIGKILL)
    until(lambda: node.service_pid("agent") not in (0, pid))
    # Its child was adopted, not killed: guests outlive the agent that started them.
    assert node.exec(["ps", "-o", "ppid=,comm=", "-p", guests[0]]).stdout.split() == ["1", "sleep"]
    assert "COLOUR=blue" in Path(f"/proc/{node.service_pid('agent')}/environ").read_text()
    [status] = node.services()
    assert (status.name, status.state, status.restarts, status.last) == ("agent", "running", 1, "killed by SIGKILL")

    node.stop_service("agent")
    assert node.services()[0].state == "stopped"
    assert node.service_pid("agent") == 0
    with pytest.raises(WrongState):
        node.kill_service("agent", signal.SIGTERM)
    node.start_service("agent")
    assert node.service_pid("agent")
    node.stop_service("agent")
    node.kill()
    node.boot()
    assert node.service_pid("agent"), "a boot starts what was stopped by hand"
    with pytest.raises(NotFound, match="no service nothing"):
        node.start_service("nothing")


def test_a_service_that_ignores_sigterm_is_killed_after_its_grace(lab: Lab) -> None:
    node = lab.node("node1")
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    node.set_service("stubborn", ["python3", "-c", deaf])
    until(lambda: "deaf" in (node.log_dir / "stubborn.log").read_text())
    node.stop_service("stubborn", grace=0.2)
    assert node.services()[0].last == "killed by SIGKILL"


def test_a_service_that_cannot_run_is_tried_ever_more_seldom(lab: Lab) -> None:
    node = lab.node("node1")
    node.set_service("broken", ["false"])
    node.set_service("absent", ["/no/such/program"])
    until(lambda: {s.name: s.restarts for s in node.services()}["broken"] >= 3)
    began = time.monotonic()
    before = {s.name: s.restarts for s in node.services()}["broken"]
    until(lambda: time.monotonic() - began > 1)
    assert {s.name: s.restarts for s in node.services()}["broken"] - before <= 2
    states = {s.name: s for s in node.services()}
    assert states["broken"].last == "exit status 1"
    assert "No such file" in states["absent"].last
    assert states["absent"].state == "restarting"


def test_orphans_are_reaped(lab: Lab) -> None:
    node = lab.node("node1")
    node.exec(["sh", "-c", "for i in 1 2 3 4 5; do (setsid sh -c 'sleep 0.01' &) ; done"], check=True)
    until(lambda: "sleep" not in node.exec(["ps", "-e", "-o", "comm="]).stdout)
    assert "Z" not in node.exec(["ps", "-e", "-o", "stat="]).stdout


def test_exec_keeps_status_streams_and_deadline(lab: Lab) -> None:
    node = lab.node("node1")
    done = node.exec(["sh", "-c", "cat; echo oops >&2; pwd; exit 7"], input="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n/\n", "oops\n")
    with pytest.raises(HostError, match="oops"):
        node.exec(["sh", "-c", "echo oops >&2; exit 1"], check=True)
    with pytest.raises(DeadlineExceeded):
        node.exec(["sleep", "321"], timeout=0.5)
    until(lambda: "sleep 321" not in node.exec(["ps", "-e", "-o", "args="]).stdout)
    running = node.popen(["sleep", "322"])
    until(lambda: "sleep 322" in node.exec(["ps", "-e", "-o", "args="]).stdout)
    running.kill()
    running.wait()
    until(lambda: "sleep 322" not in node.exec(["ps", "-e", "-o", "args="]).stdout)


def test_two_labs_stand_side_by_side(lab: Lab) -> None:
    other = Lab.create(f"{lab.name}-b", 1)
    try:
        assert other.record.net != lab.record.net
        assert other.node("node1").exec(["hostname"]).stdout == "node1\n"
        assert other.node("node1").pid != lab.node("node1").pid
        assert ask(other.node("node1"), lab.node("node1").address).returncode == 1
        with pytest.raises(AlreadyExists):
            Lab.create(lab.name, 1)
    finally:
        other.down()
    assert all(node.exec(["true"]).returncode == 0 for node in lab.nodes)


def test_labs_and_nodes_are_found_by_name(lab: Lab) -> None:
    assert [node.name for node in Lab.load(lab.name).nodes] == ["node1", "node2", "node3"]
    with pytest.raises(NotFound, match="no lab nowhere"):
        Lab.load("nowhere")
    with pytest.raises(NotFound, match="no node node9"):
        lab.node("node9")
    with pytest.raises(InvalidInput):
        Lab.create("Not A Name", 1)
    with pytest.raises(NotFound):
        process.ProcessLab.load(lab.name)
