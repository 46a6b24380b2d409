"""Makes a cluster of the nodes of a lab, with the commands that an administrator would type."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.lab.base import LabRecord, Say, quiet
from atoll.lab.lab import Lab
from atoll.lab.nodes import Node
from atoll.lab.process import ProcessLab, ProcessNode
from atoll.model.errors import DeadlineExceeded, HostError
from atoll.runtime.config import Config, dump

AnyLab = Lab | ProcessLab
AnyNode = Node | ProcessNode

#: The CLI of the running interpreter.
ATOLL = [sys.executable, "-m", "atoll.cli.main"]


def make_cluster(lab: AnyLab, hypervisor: str = "qemu", *, deadline: float = 60.0, say: Say = quiet) -> None:
    """A cluster with the lab's name: node1 is the master, every node runs an agent. Returns when all nodes are alive.

    ``deadline``: seconds for the nodes to come alive after the last has joined; some times as long where there are kernel nodes.
    Raises HostError with what a command said.
    """
    first, *others = lab.nodes
    deadline *= max(node.slowness for node in lab.nodes)
    for node in (first, *others):
        node.write_config(dump(base_config(node, hypervisor)))
    first.exec(
        [
            *ATOLL,
            "cluster",
            "init",
            lab.name,
            "--node",
            first.name,
            "--address",
            first.address,
            "--hypervisor",
            hypervisor,
            "--config",
            first.config_path,
        ],
        check=True,
    )
    _start(first, "master")
    _start(first, "agent")
    wait_for_master(first, deadline)
    say(f"{first.name} is the master")
    for node in others:
        join(first, node)
        say(f"{node.name} has joined")
    wait_alive(first, [node.name for node in lab.nodes], deadline)
    record = LabRecord.read(lab.directory)
    record.cluster = hypervisor
    record.write(lab.directory)
    lab.record = record
    say(f"all {len(lab.nodes)} nodes are alive")


def join(master: AnyNode, node: AnyNode) -> None:
    """Let a node join the cluster of ``master`` with a fresh token, and start its agent."""
    token = master.exec([*ATOLL, "node", "token", node.name], check=True).stdout
    url = f"https://{master.address}:{master.spec.master_port}"
    node.exec(
        [
            *ATOLL,
            "node",
            "join",
            "--master",
            url,
            "--name",
            node.name,
            "--address",
            node.address,
            "--token-file",
            "-",
            "--config",
            node.config_path,
        ],
        input=token,
        check=True,
    )
    _start(node, "agent")


def base_config(node: AnyNode, hypervisor: str) -> Config:
    """What a node's atoll.toml holds before it belongs to a cluster: a real node's paths and ports are the defaults."""
    spec = node.spec
    if isinstance(node, Node):
        return Config(node=node.name, address=node.address, hypervisor=hypervisor)
    home = node.directory
    return Config(
        node=node.name,
        address=node.address,
        hypervisor=hypervisor,
        etc_dir=home / "etc",
        state_dir=home / "state",
        run_dir=home / "run",
        log_dir=home / "log",
        agent_port=spec.agent_port,
        master_port=spec.master_port,
        guest_user="",
    )


def wait_for_master(node: AnyNode, deadline: float = 60.0) -> None:
    """Until the master on this node answers. ``deadline`` in seconds; raises DeadlineExceeded with the end of its log."""
    _poll(node, lambda rows: True, deadline, "the master answers", "master")


def wait_alive(master: AnyNode, names: list[str], deadline: float = 60.0) -> None:
    """Until the master calls all these nodes alive. ``deadline`` in seconds; raises DeadlineExceeded with the end of a log."""
    wanted = set(names)

    def all_there(rows: list[dict[str, Any]]) -> bool:
        return wanted <= {row["name"] for row in rows if row.get("alive")}

    _poll(master, all_there, deadline, f"{', '.join(names)} are alive", "agent")


def daemon(role: str, config: str) -> list[str]:
    """The command line of ``master`` or ``agent``."""
    return [sys.executable, "-m", f"atoll.{role}.daemon", "--config", config]


def _start(node: AnyNode, role: str) -> None:
    node.set_service(role, daemon(role, node.config_path))


def _poll(node: AnyNode, condition: Callable[[list[dict[str, Any]]], bool], deadline: float, what: str, service: str) -> None:
    end = time.monotonic() + deadline
    said = ""
    while True:
        done = node.exec([*ATOLL, "node", "list", "--format", "json"], timeout=max(1.0, end - time.monotonic()))
        said = (done.stderr or done.stdout).strip()
        if done.returncode == 0:
            try:
                rows = json.loads(done.stdout)
            except json.JSONDecodeError:
                raise HostError(f"'atoll node list --format json' did not print JSON: {said[:200]}") from None
            if condition(rows):
                return
            said = ", ".join(f"{row.get('name')} is {'alive' if row.get('alive') else 'silent'}" for row in rows)
        if time.monotonic() > end:
            log = _tail(node.log_dir / f"{service}.log")
            raise DeadlineExceeded(
                f"after {deadline:.0f} s still not: {what}; the master says: {said[-300:]}{log}", hint="atoll lab status"
            )
        time.sleep(0.1)


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()[-5:]
    except FileNotFoundError:
        return ""
    return "\n" + "\n".join([f"the end of {path}:", *lines])
