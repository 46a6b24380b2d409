"""A raw bridge between this terminal and a guest's serial console."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from atoll.cli import settings
from atoll.cli.client import Client, path_of
from atoll.model.errors import HostError, InUse, NodeUnavailable, WrongState

#: Ctrl-], as in telnet and virsh.
ESCAPE = b"\x1d"


def console(name: str) -> None:
    """Connect until Ctrl-] or until the guest ends. Errors: WrongState, NodeUnavailable (it runs elsewhere), HostError."""
    path = _here(name)
    if path is not None:
        row: dict[str, Any] = {"name": name}
    else:
        row = Client().get(path_of("instance", name))
        path = settings.run_dir() / "guests" / row["id"] / "console.sock"
    if not path.exists():
        if row["state"] not in ("running", "paused", "migrating", "hung"):
            raise WrongState(f"{row['name']} is {row['state']}: it has no console", hint=f"atoll instance start {row['name']}")
        node = row["node"]
        there = f"atoll lab exec {node} --" if "/atoll-lab/" in os.environ.get("ATOLL_SOCKET", "") else f"ssh -t {node}"
        raise NodeUnavailable(f"{row['name']} runs on {node}; its console is there", hint=f"{there} atoll instance console {row['name']}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except (ConnectionRefusedError, BlockingIOError):
            raise InUse(f"nobody takes calls at {path}; perhaps another console is open", hint="close the other console") from None
        except OSError as error:
            raise HostError(f"cannot connect to {path}: {error.strerror or error}") from error
        click.echo(f"Console of {row['name']}. Ctrl-] leaves.", err=True)
        _bridge(sock)
    click.echo("\r\nLeft the console.", err=True)


def _here(name: str) -> Path | None:
    """The console of a guest of this node, found without the master: at night it may be the one that is away."""
    for spec in (settings.run_dir() / "guests").glob("*/spec.json"):
        try:
            found = json.loads(spec.read_text())
        except (OSError, ValueError):
            continue
        if name in (found.get("name"), found.get("instance")):
            return spec.parent / "console.sock" if (spec.parent / "console.sock").exists() else None
    return None


def _bridge(sock: socket.socket) -> None:
    """Both directions until either side ends, or Ctrl-]."""
    keys, screen = sys.stdin.fileno(), sys.stdout.fileno()
    listening: list[int] = [sock.fileno(), keys]
    with _raw(keys):
        while sock.fileno() in listening:
            ready, _, _ = select.select(listening, [], [])
            if sock.fileno() in ready:
                try:
                    data = sock.recv(65536)
                except ConnectionResetError:
                    return
                if not data:
                    return
                _write_all(screen, data)
            if keys in ready:
                typed = os.read(keys, 4096)
                before, escape, _ = typed.partition(ESCAPE)
                if before:
                    sock.sendall(before)
                if escape:
                    return
                if not typed:
                    # Input from a pipe has ended; what the guest still says is shown until it closes.
                    listening.remove(keys)


def _write_all(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


@contextmanager
def _raw(target: int) -> Iterator[None]:
    """The terminal passes every key through; it is restored whatever happens."""
    if not os.isatty(target):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(target)
    try:
        tty.setraw(target)
        yield
    finally:
        termios.tcsetattr(target, termios.TCSADRAIN, before)
