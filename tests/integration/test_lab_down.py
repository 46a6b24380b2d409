"""``down`` leaves nothing, whatever happened before it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from atoll.lab import find, host, layout, lock, loops, network
from atoll.lab.lab import Lab, names, remove
from atoll.lab.lock import lab_lock
from atoll.lab.sweep import mounts, traces
from atoll.model.errors import HostError, InUse, NotFound

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and loop devices need root")]

NAME = f"d{os.getpid()}"

#: ``up`` that is killed some seconds after it starts its Nth program.
KILLED_UP = f"""
import os, signal, sys, threading
from atoll.lab.lab import Lab
number, delay, seen = int(sys.argv[1]), float(sys.argv[2]), []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hook(event, _):
    if event == "subprocess.Popen":
        seen.append(event)
        if len(seen) == number:
            threading.Timer(delay, die).start() if delay else die()

sys.addaudithook(hook)
Lab.create({NAME!r}, 3, disks=1)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATOLL_LAB_DIR", str(tmp_path / "labs"))
    yield layout.lab_dir(NAME)
    remove(NAME)


def everything(place: Path) -> list[str]:
    """All that a lab of this name or place could leave, without the help of the code under test where that is possible."""
    found = [name for name in os.listdir("/run/netns") if NAME in name] if os.path.isdir("/run/netns") else []
    for text in (
        Path("/proc/self/mountinfo").read_text(),
        subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout,
    ):
        found += [line for line in text.splitlines() if str(place) in line or f"atoll-{NAME}-" in line]
    for pid in host.processes():
        try:
            told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if pid != os.getpid() and (f":{NAME}:".encode() in told or str(place).encode() in told):
            found.append(f"process {pid}: {told[:200]!r}")
    # The directory of labs stays, empty: no lab, no lock.
    return found + ([str(entry) for entry in place.parent.iterdir()] if place.parent.exists() else [])


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def test_down_leaves_nothing_and_may_be_repeated(place: Path) -> None:
    links = interfaces()
    lab = Lab.create(NAME, 3, disks=1)
    assert interfaces() == links, "a lab's interfaces stay out of the machine's own network"
    assert len(everything(place)) > 10
    assert len(network.namespaces(NAME)) == 4
    lab.node("node1").set_service("s", ["sleep", "1000"])
    lab.node("node1").exec(["sh", "-c", "setsid sleep 1001 > /dev/null 2>&1 &"], check=True)
    held = lab.node("node2").popen(["sleep", "1002"])
    only_its_network = subprocess.Popen(["ip", "netns", "exec", f"atoll-{NAME}-node3", "sleep", "1003"])
    lab.node("node3").exec(["sh", "-c", "truncate -s 64M /var/lib/atoll/x"], check=True)
    lab.down()
    held.wait(20)
    only_its_network.wait(20)
    assert everything(place) == []
    assert interfaces() == links
    lab.down()
    assert NAME not in names()
    assert everything(place) == []


def test_down_with_nodes_off_or_cut_and_files_open(place: Path) -> None:
    lab = Lab.create(NAME, 2)
    lab.node("node1").kill()
    lab.node("node2").cut()
    busy = lab.node("node2").popen(
        ["sh", "-c", "exec 3>/srv/shared/a 4>/var/lib/atoll/b; cd /srv/shared; echo in; sleep 1000"], stdout=subprocess.PIPE
    )
    assert busy.stdout.readline() == b"in\n"
    lab.down()
    busy.wait(20)
    busy.stdout.close()
    assert everything(place) == []


def test_down_works_when_every_file_is_lost(place: Path) -> None:
    Lab.create(NAME, 2)
    shutil.rmtree(place)
    assert NAME in names()
    with pytest.raises(NotFound):
        find.load(NAME)
    find.remove(NAME)
    assert everything(place) == []


def test_each_sign_alone_tells_that_there_is_a_lab(place: Path) -> None:
    lab = Lab.create(NAME, 1)
    shutil.rmtree(place)
    for entry in list(network.namespaces(NAME)):
        network.remove(entry)
    host.kill_and_wait(lab.node("node1").pid)
    assert NAME in names(), "by its loop devices"
    loops.detach(place)
    assert NAME not in names()
    network.make_switch(NAME)
    assert NAME in names(), "by its network"
    place.mkdir()
    network.remove(layout.netns_name(NAME, "switch"))
    assert NAME in names(), "by its directory"


def test_a_subnet_is_never_given_twice() -> None:
    first = network.subnet(NAME, [])
    second = network.subnet(NAME, [first])
    assert network.subnet(NAME, []) == first
    assert len({first, second, network.subnet(NAME, [first, second])}) == 3
    assert network.subnet("z", ["10.127.255"] + [f"10.127.{n}" for n in range(255)]).startswith("10.")


@pytest.mark.slow
def test_down_after_up_was_killed_at_any_moment(place: Path) -> None:
    left = []
    for number in range(1, 100):
        # At once, or while the helper that was just started is at work.
        delay = (0.0, 0.002, 0.01)[number % 3]
        up = subprocess.run([sys.executable, "-c", KILLED_UP, str(number), str(delay)], capture_output=True, timeout=60, check=False)
        if up.returncode == 0:
            break
        assert up.returncode == -signal.SIGKILL, up.stderr
        left.append(len(everything(place)))
        remove(NAME)
        assert everything(place) == [], f"killed {delay} s after its program number {number} was started"
    assert len(left) > 15, "each helper program of the lab was to be a moment to be killed at"
    assert len(set(left)) > 5, f"the kills came at too few different moments: {left}"


def test_down_waits_for_another_command_and_then_refuses(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab.create(NAME, 1)
    free = threading.Event()
    taken = threading.Event()

    def work() -> None:
        with lab_lock(place):
            taken.set()
            free.wait(30)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert taken.wait(10)
        with pytest.raises(InUse, match=f"process {os.getpid()}"), lab_lock(place, deadline=0.2):
            pass
        assert lab.node("node1").running
    finally:
        free.set()
        worker.join()
    lab.down()
    assert everything(place) == []


def test_a_lock_on_a_removed_file_is_no_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.with_name(f".{NAME}.lock")
    calls: list[int] = []

    def late(handle: int, what: int) -> None:
        # Whoever held the lock before us removes its file between our opening and locking it.
        if not calls:
            path.unlink()
        calls.append(handle)
        fcntl.flock(handle, what)

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=late, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
    with lab_lock(place) as held:
        assert os.path.samestat(os.fstat(held), path.stat())
    assert len(calls) == 2
    assert not path.exists()


def test_an_up_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loops.make_xfs

    def fail_on_third(path: Path, size: int, keep: object = ()) -> None:
        if "node3" in str(path):
            raise HostError("no space left")
        real(path, size, keep)  # type: ignore[arg-type]

    monkeypatch.setattr(loops, "make_xfs", fail_on_third)
    with pytest.raises(HostError, match="no space left"):
        Lab.create(NAME, 3)
    assert everything(place) == []


def test_one_lab_down_does_not_touch_one_with_a_longer_name(place: Path) -> None:
    longer = Lab.create(f"{NAME}-node1", 1)
    try:
        Lab.create(NAME, 1)
        remove(NAME)
        assert longer.node("node1").exec(["hostname"]).stdout == "node1\n"
        assert traces(NAME, place) == []
        assert mounts(place) == []
    finally:
        longer.down()
