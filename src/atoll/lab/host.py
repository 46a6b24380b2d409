"""Small questions and orders to the machine that carries a lab: programs, processes, deadlines."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from atoll.lab.layout import MARKER_VARIABLE, parse_marker
from atoll.model.errors import DeadlineExceeded, HostError


def run(argv: Sequence[str], *, stdin: str = "", keep: Sequence[int] = (), deadline: float = 60.0) -> str:
    """Run a program of the system and return its output. ``keep``: file descriptors it inherits. ``deadline`` in seconds.

    Raises HostError with the program's own words; DeadlineExceeded.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, pass_fds=keep, timeout=deadline, check=False)
    except FileNotFoundError:
        raise HostError(f"the program {argv[0]} is not installed", hint="apt install iproute2 util-linux mount xfsprogs") from None
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{argv[0]} did not end within {deadline:.0f} s", hint="look for a hung device: dmesg | tail") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"{' '.join(argv[:4])}: {words[-1] if words else f'exit status {done.returncode}'}", hint="atoll lab status")
    return done.stdout


def wait_until(condition: Callable[[], bool], deadline: float, what: str) -> None:
    """Poll where nothing wakes us. ``deadline`` in seconds; raises DeadlineExceeded that says ``what`` did not come."""
    end = time.monotonic() + deadline
    pause = 0.002
    while not condition():
        if time.monotonic() > end:
            raise DeadlineExceeded(f"after {deadline:.0f} s still not: {what}", hint="atoll lab status")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def processes() -> Iterator[int]:
    """The pids of all processes we can see."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            yield int(entry)


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def status_field(pid: int, field: str) -> list[str]:
    """The words after ``field:`` in /proc/PID/status; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/status") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return line.split()[1:]
    except OSError:
        pass
    return []


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    return status_field(pid, "State")[:1] not in ([], ["Z"], ["X"])


def marked(lab: str | None = None, *, rootless: bool = False) -> dict[int, tuple[str, str]]:
    """Every process that carries a lab's marker as an argument: pid -> (lab, node). Of rootless labs, our own user's only."""
    found = {}
    for pid in processes():
        for word in command_line(pid):
            known = parse_marker(word, rootless=rootless)
            if known and (lab is None or known[0] == lab) and not (rootless and _foreign(pid)):
                found[pid] = known
    return found


def marked_by_environment(lab: str, *, rootless: bool = False) -> dict[int, str]:
    """Every process that inherited a marker of this lab: pid -> node. What we may not look into is not ours."""
    start = f"{MARKER_VARIABLE}=".encode()
    found = {}
    for pid in processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        for word in environment.split(b"\0"):
            if word.startswith(start):
                known = parse_marker(word[len(start) :].decode(errors="replace"), rootless=rootless)
                if known and known[0] == lab and not (rootless and _foreign(pid)):
                    found[pid] = known[1]
    return found


def _foreign(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid != os.getuid()
    except OSError:
        return True


def descendants(pid: int) -> list[int]:
    """All children of a process, and theirs."""
    parents: dict[int, list[int]] = {}
    for candidate in processes():
        parent = status_field(candidate, "PPid")
        if parent:
            parents.setdefault(int(parent[0]), []).append(candidate)
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def send(pid: int, number: int) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_and_wait(pid: int, deadline: float = 20.0) -> None:
    """SIGKILL, and wait until it is gone (a zombie that nobody reaps counts as gone)."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            return
        # A pidfd turns readable when the process ends, and the first process of a pid namespace ends last of all in it.
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(deadline * 1000):
            raise DeadlineExceeded(f"process {pid} did not end within {deadline:.0f} s of SIGKILL", hint="dmesg | tail")
    finally:
        os.close(handle)


def namespace(pid: int | str, kind: str) -> int:
    """The number of a process' namespace (``net``, ``mnt``, ``pid``...); 0 when it is gone or hidden from us."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0
