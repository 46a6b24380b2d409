"""Labs of plain processes: the same interface without root."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.lab import find, host
from atoll.lab.process import ProcessLab, free_ports, remove
from atoll.model.errors import AlreadyExists, NodeUnavailable, NotFound, NotSupported

NAME = f"p{os.getpid()}"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessLab]:
    monkeypatch.setenv("ATOLL_LAB_DIR", str(tmp_path / "labs"))
    yield ProcessLab.create(NAME, 2)
    remove(NAME)


def until(condition: Callable[[], object], deadline: float = 20.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def ours() -> list[int]:
    return [pid for pid in host.marked_by_environment(NAME, rootless=True) if host.alive(pid)]


def test_nodes_have_directories_and_ports_of_their_own(lab: ProcessLab) -> None:
    one, two = lab.nodes
    assert len({one.spec.agent_port, one.spec.master_port, two.spec.agent_port, two.spec.master_port}) == 4
    assert one.exec(["sh", "-c", "echo $ATOLL_CONFIG"]).stdout == f"{lab.directory}/nodes/node1/etc/atoll.toml\n"
    assert Path(lab.shared).is_dir()
    assert oct(lab.directory.stat().st_mode)[-3:] == "700"
    assert one.exec(["sh", "-c", "cat; exit 3"], input="x").returncode == 3
    with pytest.raises(NotSupported):
        one.cut()
    with pytest.raises(AlreadyExists):
        ProcessLab.create(NAME, 1)
    assert find.names()[NAME] is True
    assert isinstance(find.load(NAME), ProcessLab)


def test_a_service_comes_back_and_its_guest_lives_on(lab: ProcessLab) -> None:
    node = lab.node("node1")
    node.set_service("agent", ["sh", "-c", f"setsid sleep 300 & echo $! > {node.run_dir}/guest; exec sleep 301"])
    until(lambda: node.service_pid("agent") and (node.run_dir / "guest").exists())
    guest = int((node.run_dir / "guest").read_text())
    pid = node.kill_service("agent", signal.SIGKILL)
    until(lambda: node.service_pid("agent") not in (0, pid))
    assert host.status_field(guest, "PPid") == [str(node.pid)], "the node adopts the guest"


def test_kill_takes_daemonized_guests_too_and_boot_starts_anew(lab: ProcessLab) -> None:
    one, two = lab.nodes
    # env -i: a guest whose environment does not tell where it belongs.
    guest = "setsid env -i sleep 300 & setsid sleep 302 & echo $! > guest; exec sleep 301"
    for node in (one, two):
        node.set_service("agent", ["sh", "-c", guest])
    until(lambda: all((node.directory / "guest").exists() and len(host.descendants(node.pid)) == 3 for node in (one, two)))
    of_one, of_two = host.descendants(one.pid), host.descendants(two.pid)
    (one.run_dir / "old.sock").touch()
    one.kill()
    assert not any(host.alive(pid) for pid in of_one)
    assert all(host.alive(pid) for pid in of_two)
    with pytest.raises(NodeUnavailable):
        one.exec(["true"])
    one.boot()
    assert one.service_pid("agent")
    assert not (one.run_dir / "old.sock").exists()
    lab.down()
    assert not any(host.alive(pid) for pid in of_two)
    assert ours() == []
    assert not lab.directory.exists()
    assert list(lab.directory.parent.iterdir()) == []
    lab.down()


def test_down_finds_what_a_dead_first_process_left(lab: ProcessLab) -> None:
    node = lab.node("node1")
    node.set_service("agent", ["sleep", "300"])
    until(lambda: node.service_pid("agent"))
    orphan = node.service_pid("agent")
    os.kill(node.pid, signal.SIGKILL)
    until(lambda: not node.running)
    assert host.alive(orphan)
    lab.down()
    assert not host.alive(orphan)
    with pytest.raises(NotFound):
        ProcessLab.load(NAME)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(10))) == 10
