"""Start the watchdog of a migration, detached from the agent: the agent may be what dies."""

from __future__ import annotations

import asyncio
import os
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
    """See to it that a watchdog watches, before the guest can come to its pause. Errors: GuestError."""
    if watchdogs(files):
        return
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
