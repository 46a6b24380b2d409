"""A lab without root: each node is a few plain processes with directories and ports of its own on 127.0.0.1.

It shows everything but what namespaces give: no network to cut, no power cut that loses data, no mount to lose.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from atoll.lab import layout
from atoll.lab.base import BaseLab, BaseNode, LabRecord, Say, environment, quiet
from atoll.lab.host import alive, descendants, kill_and_wait, marked, marked_by_environment, send, status_field
from atoll.lab.launch import launch
from atoll.lab.lock import lab_lock
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.model.errors import AlreadyExists, HostError, NotFound, NotSupported, WrongState

ADDRESS = "127.0.0.1"


class ProcessNode(BaseNode):
    """A node of plain processes: ``etc``, ``state``, ``run`` and ``log`` in its directory."""

    rootless = True

    @property
    def config_path(self) -> str:
        return str(self.directory / "etc/atoll.toml")

    def write_config(self, text: str) -> None:
        Path(self.config_path).write_text(text)

    @property
    def root(self) -> Path:
        """It sees what everybody sees."""
        return Path("/")

    @property
    def connected(self) -> bool:
        """There is no cable to pull."""
        return self.running

    def _is_first(self, pid: int) -> bool:
        return int((status_field(pid, "PPid") or ["0"])[0]) not in marked(self.lab, rootless=True)

    def command(self, argv: Sequence[str], *, bound: bool = True) -> list[str]:
        # Asked for the error it raises: without power nothing can be run in it.
        _ = self.pid
        return list(argv)

    def kill(self) -> None:
        """SIGKILL all of the node's processes, its guests included. What they wrote stays: the machine has not lost power."""
        with lab_lock(self.directory.parents[1]):
            kill_processes(self.lab, self.name, self.pid)

    def boot(self) -> None:
        """Start the node's first process and its services. Raises WrongState when it has power."""
        with lab_lock(self.directory.parents[1]) as lock:
            self.boot_locked(self.spec, lock)

    def boot_locked(self, spec: NodeSpec, lock: int) -> None:
        """``boot`` for those who hold the lab's lock."""
        if self.running:
            raise WrongState(f"{self.name} of the lab {self.lab} has power", hint=f"atoll lab kill {self.name}")
        for part in ("etc", "state", "run", "log"):
            (self.directory / part).mkdir(mode=0o700, exist_ok=True)
        self.clear_run_dir()
        launch(self.directory, spec, lock)

    def cut(self) -> None:
        raise NotSupported("a node of plain processes has no network of its own to cut", hint="sudo atoll lab up makes real nodes")

    heal = cut


class ProcessLab(BaseLab[ProcessNode]):
    """Nodes as plain processes, for everybody."""

    @classmethod
    def create(cls, name: str, nodes: int = 3, *, say: Say = quiet) -> Self:
        """Make a lab of plain processes and start its nodes. Raises AlreadyExists; InvalidInput. After an error nothing of it is left."""
        directory = layout.lab_dir(name, rootless=True)
        names_ = layout.node_names(nodes)
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with lab_lock(directory) as lock:
            if directory.exists() or marked(name, rootless=True):
                raise AlreadyExists(f"there is a lab {name}, or what is left of one", hint=f"atoll lab down {name}")
            try:
                directory.mkdir(mode=0o700)
                LabRecord(name, names_, True, ADDRESS).write(directory)
                (directory / "shared").mkdir()
                ports = iter(free_ports(2 * nodes))
                for node_name in names_:
                    place = directory / "nodes" / node_name
                    place.mkdir(mode=0o700, parents=True)
                    node = ProcessNode(place, name)
                    spec = NodeSpec(
                        lab=name,
                        node=node_name,
                        address=ADDRESS,
                        namespaces=False,
                        environment=environment(name, node_name, node.config_path, rootless=True),
                        agent_port=next(ports),
                        master_port=next(ports),
                    )
                    node.boot_locked(spec, lock)
                    say(f"{node_name} is up, its agent's port is {spec.agent_port}")
            except BaseException:
                _remove_locked(name, directory)
                raise
        return cls(directory)

    @classmethod
    def load(cls, name: str) -> Self:
        """A lab that exists. Raises NotFound."""
        lab = cls(layout.lab_dir(name, rootless=True))
        if not lab.record.rootless:
            raise NotFound(f"the lab {name} is one of real nodes", hint="Lab.load")
        return lab

    @property
    def shared(self) -> str:
        return str(self.directory / "shared")

    def _node(self, name: str) -> ProcessNode:
        return ProcessNode(self.directory / "nodes" / name, self.name)

    def down(self) -> None:
        """No process or file is left. Fine when it is gone already."""
        remove(self.name)


def remove(name: str) -> None:
    """Remove a lab of plain processes by its name, whatever is left of it."""
    directory = layout.lab_dir(name, rootless=True)
    with lab_lock(directory):
        _remove_locked(name, directory)


def names() -> list[str]:
    """Every lab of plain processes of this user."""
    return sorted(entry.parent.name for entry in layout.rootless_root().glob("*/lab.json") if LabRecord.read(entry.parent).rootless)


def kill_processes(lab: str, node: str | None, first: int = 0, deadline: float = 20.0) -> None:
    """SIGKILL everything of a node, or of all nodes: what descends from its first process and what inherited its marker.

    The first process adopts orphans, so daemonized guests descend from it as long as it lives: it is stopped, and killed last.
    """
    end = time.monotonic() + deadline
    while True:
        firsts = [pid for pid, known in marked(lab, rootless=True).items() if node in (None, known[1])]
        if first and first not in firsts and alive(first):
            firsts.append(first)
        for pid in firsts:
            send(pid, signal.SIGSTOP)
        followers = {child for pid in firsts for child in descendants(pid)}
        followers |= {pid for pid, known_node in marked_by_environment(lab, rootless=True).items() if node in (None, known_node)}
        followers -= {os.getpid(), *firsts}
        living = [pid for pid in followers if alive(pid)]
        for pid in living:
            kill_and_wait(pid)
        if not living:
            for pid in firsts:
                kill_and_wait(pid)
            if not firsts:
                return
        if time.monotonic() > end:
            raise HostError(f"processes of the lab {lab} come back", hint=f"atoll lab down {lab}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody uses on 127.0.0.1 at the moment, below those that the kernel gives to clients."""
    found: list[int] = []
    # Start where other labs, made by other processes, most likely do not look.
    start = 20000 + (os.getpid() * 61) % 10000
    for step in range(10000):
        port = 20000 + (start - 20000 + step) % 10000
        with socket.socket() as probe:
            # Without this a port that was in use a moment ago counts as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise HostError(f"no {count} free TCP ports between 20000 and 30000 on {ADDRESS}", hint="ss -tln shows who uses them")


def _remove_locked(name: str, directory: Path) -> None:
    kill_processes(name, None)
    if directory.exists():
        shutil.rmtree(directory)
