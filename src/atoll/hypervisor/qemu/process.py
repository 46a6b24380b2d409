"""QEMU's processes: start, find again, end. A process is known by the pid file in its own command line, never by a number alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from atoll.hypervisor.qemu.command import BINARY
from atoll.hypervisor.qemu.files import Account, GuestFiles
from atoll.hypervisor.qemu.qmp import Closed, Monitors
from atoll.model.errors import DeadlineExceeded, DiskInUse, GuestError, HostError

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def arguments(pid: int) -> list[str]:
    """A process' arguments; empty when it is gone (a zombie is)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def state(pid: int) -> str:
    """The state letter of proc(5): R, S, D, T ...; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def pidfile_of(pid: int) -> str:
    """The pid file that a QEMU process of this node was started with; empty for any other process."""
    argv = arguments(pid)
    if not argv or os.path.basename(argv[0]) != BINARY or "-pidfile" not in argv[:-1]:
        return ""
    # Nodes of a lab, and containers, are visible from outside, and have their guests under the same paths: those are not ours to kill.
    if _namespace(pid) != _namespace("self"):
        return ""
    return argv[argv.index("-pidfile") + 1]


def _namespace(pid: int | str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def scan() -> Iterator[tuple[int, str]]:
    """Every QEMU process of this node with its pid file."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (pidfile := pidfile_of(int(entry))):
            yield int(entry), pidfile


def find(files: GuestFiles) -> list[int]:
    """The guest's processes: one, or none."""
    wanted = str(files.pidfile)
    with contextlib.suppress(OSError, ValueError):
        pid = int(files.pidfile.read_text())
        if pidfile_of(pid) == wanted:
            return [pid]
    # No pid file yet: QEMU may still be opening its disks, or hang in that.
    return [pid for pid, pidfile in scan() if pidfile == wanted]


async def launch(
    argv: Sequence[str], files: GuestFiles, owner: Account | None, monitors: Monitors, deadline: float, inherited: Sequence[int] = ()
) -> None:
    """Start QEMU in a session of its own, as a child of the first process, and wait until it has opened its disks and answers.

    It is stopped then (``-S``). ``inherited``: descriptors that its command line names. QEMU's own ``-daemonize`` does not go together
    with its sandbox. Errors: DiskInUse, GuestError (both with QEMU's words), HostError, DeadlineExceeded.
    """
    # QEMU holds the other end for its whole life: end of file is its end, before there is any other way to tell.
    alive, held = os.pipe()
    with open(alive, "rb", buffering=0) as life, open(files.qemu_log, "ab") as log:
        begin = log.tell()
        try:
            if owner:
                os.chown(files.qemu_log, owner.uid, owner.gid)
            # It keeps nothing else of ours: no terminal, no other descriptors, no environment, no privileges.
            starter = await asyncio.create_subprocess_exec(
                *("setsid", "--fork", *argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=held,
                stderr=log,
                cwd="/",
                pass_fds=inherited,
                umask=0o077,
                env=_ENVIRONMENT,
                user=owner.uid if owner else None,
                group=owner.gid if owner else None,
                extra_groups=owner.groups if owner else None,
            )
        except OSError as error:
            raise HostError(f"{BINARY} cannot be started: {error}", hint="apt-get install util-linux qemu-system-x86") from None
        finally:
            os.close(held)
        await starter.wait()
        if await _answers_or_ends(life, files, monitors, deadline):
            return
    words = words_since(files, begin) or "it ended without a word"
    if is_lock_failure(words):
        raise DiskInUse(f"a disk of guest {files.guest} is open for writing elsewhere: {words}")
    raise GuestError(f"QEMU did not start guest {files.guest}: {words}")


async def _answers_or_ends(life: BinaryIO, files: GuestFiles, monitors: Monitors, deadline: float) -> bool:
    """True once QEMU answers, False when it has ended. Errors: DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(life, ended.set)
    end = loop.time() + deadline
    try:
        while not ended.is_set() and (left := end - loop.time()) > 0:
            answer = asyncio.ensure_future(_answers(files, monitors, left))
            death = asyncio.ensure_future(ended.wait())
            try:
                await asyncio.wait({answer, death}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if answer.done() and answer.result():
                    return True
            finally:
                death.cancel()
                answer.cancel()
            with contextlib.suppress(TimeoutError):  # its socket is not there yet, and nothing tells when it is
                await asyncio.wait_for(ended.wait(), 0.02)
    finally:
        loop.remove_reader(life)
    if ended.is_set():
        return False
    raise DeadlineExceeded(f"QEMU of guest {files.guest} was not ready after {deadline:.0f} s", hint="atoll pool check POOL")


async def _answers(files: GuestFiles, monitors: Monitors, limit: float) -> bool:
    try:
        async with monitors.session(files.qmp, command=limit) as session:
            await session.execute("query-status")
            return True
    except (Closed, TimeoutError):
        return False


def words_since(files: GuestFiles, offset: int) -> str:
    """What QEMU has said after that point of its log, in one line."""
    try:
        text = files.qemu_log.read_bytes()[offset:].decode(errors="replace")
    except OSError:
        return ""
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())[-1000:]


def is_lock_failure(words: str) -> bool:
    """Whether QEMU says that somebody else holds an image."""
    return "Failed to get" in words and "lock" in words


async def end(files: GuestFiles, deadline: float, *, number: int = signal.SIGKILL) -> None:
    """Signal the guest's processes and wait until they are gone. Errors: DeadlineExceeded (it hangs in the kernel)."""
    for pid in find(files):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Looked at again, now that the handle keeps this very process: its number cannot have been given to another since.
            if pidfile_of(pid) == str(files.pidfile):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
                await _ended(handle, pid, files.guest, deadline)
        finally:
            os.close(handle)


async def gone(files: GuestFiles, deadline: float) -> bool:
    """Wait until the guest has no process; False when it still has one at the deadline (seconds)."""
    for pid in find(files):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            await _ended(handle, pid, files.guest, deadline)
        except DeadlineExceeded:
            return False
        finally:
            os.close(handle)
    return not find(files)


async def _ended(handle: int, pid: int, guest: str, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), deadline)
    except TimeoutError:
        raise DeadlineExceeded(
            f"process {pid} of guest {guest} did not end within {deadline:.0f} s (state {state(pid)})",
            hint="its storage may hang: dmesg | tail",
        ) from None
    finally:
        loop.remove_reader(handle)
