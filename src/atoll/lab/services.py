"""Talking to the first process of a node about its services."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.lab.host import namespace, processes, status_field
from atoll.model.errors import HostError, NodeUnavailable, NotFound

_PACKET = 1 << 18


@dataclass(frozen=True)
class ServiceStatus:
    """A service as its node's first process sees it."""

    name: str
    argv: tuple[str, ...]
    state: Literal["running", "restarting", "stopped"]
    #: On the machine that carries the lab; 0 when it does not run.
    pid: int
    #: How often it was started again since the node's boot.
    restarts: int
    #: How it ended last; empty if it never did.
    last: str


def order(directory: Path, request: Mapping[str, Any], deadline: float = 20.0) -> list[dict[str, Any]]:
    """Give an order to the node that lives in ``directory``; the state of all its services comes back.

    Raises NodeUnavailable when the node has no power; HostError when it refuses.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(deadline)
    try:
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            # By way of the open directory: the whole path may be longer than a socket's may be.
            connection.connect(f"/proc/self/fd/{handle}/control.sock")
        finally:
            os.close(handle)
        connection.send(json.dumps(dict(request)).encode())
        reply = json.loads(connection.recv(_PACKET) or b'{"error": "it ended"}')
    except (FileNotFoundError, ConnectionError):
        raise NodeUnavailable(f"{directory.name} has no power", hint=f"atoll lab boot {directory.name}") from None
    except TimeoutError:
        raise NodeUnavailable(f"{directory.name} did not answer within {deadline:.0f} s", hint="atoll lab status") from None
    finally:
        connection.close()
    return answered(directory.name, request, reply)


def answered(node: str, request: Mapping[str, Any], reply: dict[str, Any]) -> list[dict[str, Any]]:
    """What a reply says of the services. Raises HostError when the node refused."""
    if "error" in reply:
        raise HostError(f"{node} refused {request['order']}: {reply['error']}", hint="its init.log may say more")
    services: list[dict[str, Any]] = reply["services"]
    return services


def statuses(directory: Path, first: int) -> list[ServiceStatus]:
    """All services of the node whose first process is ``first``."""
    return [
        ServiceStatus(s["name"], tuple(s["argv"]), s["state"], outside(first, s["pid"]), s["restarts"], s["last"])
        for s in order(directory, {"order": "status"})
    ]


def define(directory: Path, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Write a service into ``services.json``: it starts at each boot from now on. Nothing is started yet."""
    path = directory / "services.json"
    known = defined(directory)
    known[name] = {"argv": list(argv), "environment": dict(environment or {})}
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(known, indent=1))
    os.replace(partial, path)


def defined(directory: Path) -> dict[str, Any]:
    """What ``services.json`` says."""
    try:
        known: dict[str, Any] = json.loads((directory / "services.json").read_text())
    except FileNotFoundError:
        return {}
    return known


def require(directory: Path, name: str) -> None:
    """Raises NotFound for a service that the node does not have."""
    if name not in defined(directory):
        have = ", ".join(defined(directory)) or "none"
        raise NotFound(f"{directory.name} has no service {name}; it has: {have}", hint="atoll lab status")


def outside(first: int, inside: int) -> int:
    """The machine's number for the process that the node of ``first`` calls ``inside``; 0 when it is gone."""
    if not inside:
        return 0
    within = namespace(first, "pid")
    if within == namespace("self", "pid"):
        return inside
    for pid in processes():
        if status_field(pid, "NSpid")[-1:] == [str(inside)] and namespace(pid, "pid") == within:
            return pid
    return 0
