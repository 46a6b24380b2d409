"""Start the watchdog of a migration, detached from the agent: the agent may be what dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from atoll.hypervisor.qemu import watchdog
from atoll.hypervisor.qemu.files import GuestFiles
from atoll.hypervisor.qemu.process import arguments
from atoll.model.errors import GuestError

_DEADLINE = 20.0


def watchdogs(files: GuestFiles) -> list[int]:
    """The watchdogs of a guest, found from the system."""
    wanted = [watchdog.__file__, str(files.watchdog_qmp)]
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and arguments(int(entry))[3:5] == wanted]


async def ensure(files: GuestFiles, seconds: float) -> None:
    """See to it that a migration under way is watched. Errors: GuestError."""
    if not watchdogs(files):
        await start(files, seconds)


async def start(files: GuestFiles, seconds: float) -> None:
    """Start the watchdog of a new migration, before it begins. Errors: GuestError."""
    # One that is left from an earlier migration may be about to end, and then nobody would watch.
    for pid in watchdogs(files):
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                if pid in watchdogs(files):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", watchdog.__file__, str(files.watchdog_qmp), str(seconds)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _DEADLINE)
    except TimeoutError:
        process.kill()
        said = b"it was not ready in time"
    if said.strip() != b"ready":
        raise GuestError(f"no watchdog could be started for the migration of {files.guest}: {said.decode(errors='replace').strip()}")
