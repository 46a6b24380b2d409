"""Removes all that belongs to a lab, by looking at the system only: it works when the lab's files are lost or were never written.

Signs of a lab: processes with its marker, network namespaces with its name, mounts and loop devices below its directory.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from atoll.lab import loops, network
from atoll.lab.host import alive, kill_and_wait, marked, namespace, processes, run
from atoll.lab.lock import holder, lab_lock
from atoll.model.errors import HostError


def traces(name: str, directory: Path) -> list[str]:
    """What is left of a lab, one line each; empty when nothing is."""
    found = [f"process {pid} of {node}" for pid, (_, node) in marked(name).items() if alive(pid)]
    found += [f"network namespace {entry}" for entry in network.namespaces(name)]
    found += [f"mount {path}" for path in mounts(directory)]
    found += [f"loop device {device}" for device in loops.below(directory)]
    if directory.exists():
        found.append(f"directory {directory}")
    return found


def mounts(directory: Path) -> list[str]:
    """What is mounted at or below a directory, the deepest first."""
    prefix = f"{directory}/"
    found = []
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            path = line.split()[4].encode().decode("unicode_escape")
            if path == str(directory) or path.startswith(prefix):
                found.append(path)
    return sorted(found, key=len, reverse=True)


def sweep(name: str, directory: Path) -> None:
    """Remove it all; fine when nothing is there. Safe after a SIGKILL of any other command at any moment.

    Raises InUse while another command works on the lab; HostError when something cannot be removed.
    """
    if not alive(holder(directory) or -1):
        # A command that was killed may have left a half-made node, which holds the lock it inherited.
        _kill_marked(name)
    with lab_lock(directory):
        sweep_locked(name, directory)


def sweep_locked(name: str, directory: Path) -> None:
    """``sweep`` for those who hold the lab's lock."""
    _kill_marked(name)
    _kill_in_networks(name)
    for entry in network.namespaces(name):
        network.remove(entry)
    # The names of its nodes may be lost with its files.
    loops.unmap(name, directory, *(f"node{number}" for number in range(1, 65)))
    for path in mounts(directory):
        run(["umount", path])
    loops.detach(directory)
    if directory.exists():
        shutil.rmtree(directory)
    left = traces(name, directory)
    if left:
        raise HostError(f"the lab {name} is not quite gone: {'; '.join(left)}", hint=f"atoll lab down {name}")


def _kill_marked(name: str, deadline: float = 30.0) -> None:
    """Until none is left: one that is being started may have a child that is not in our list yet."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        known = [pid for pid in marked(name) if alive(pid)]
        for pid in known:
            kill_and_wait(pid)
        if not known:
            return
    raise HostError(f"processes of the lab {name} come back", hint=f"atoll lab down {name}")


def _kill_in_networks(name: str) -> None:
    """Programs that somebody runs in a node's network only; they would keep it."""
    numbers = {os.stat(f"{network.NETNS_DIR}/{entry}").st_ino for entry in network.namespaces(name)} - {namespace("self", "net")}
    for pid in processes():
        if namespace(pid, "net") in numbers:
            kill_and_wait(pid)
