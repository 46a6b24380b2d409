"""What a guest does, as seen from outside."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from atoll.hypervisor.contract import Report
from atoll.hypervisor.qemu import process
from atoll.hypervisor.qemu.files import GuestFiles
from atoll.hypervisor.qemu.migrate import leaving
from atoll.hypervisor.qemu.qmp import Closed, Monitors, Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.messages import GuestStatus, Progress

State = Literal["running", "paused", "incoming", "migrated", "shutdown"]
#: QEMU's run states that are not ``paused``.
STATES: dict[str, State] = {
    "running": "running",
    "suspended": "running",
    "inmigrate": "incoming",
    "postmigrate": "migrated",
    "shutdown": "shutdown",
}
REASONS = {
    "io-error": "io-error: its storage failed",
    "prelaunch": "it has not begun to run",
    "inmigrate": "it waits for its memory",
    "postmigrate": "it has been handed over to the target of its migration",
    "finish-migrate": "it stands still for its migration",
    "guest-panicked": "its kernel panicked",
    "internal-error": "the accelerator failed",
    "watchdog": "its watchdog expired",
    "shutdown": "it has powered itself off",
}


#: What QEMU says of a disk that stopped its guest, in our words.
DISK_ERRORS = {"nospace": "full", "failed": "failed"}


async def look(files: GuestFiles, monitors: Monitors, tuning: Tuning, known_errors: dict[str, tuple[int, dict[str, str]]]) -> GuestStatus:
    """The guest's status; never an error, and never late. ``known_errors``: guest -> process, and what stopped it."""
    pids = process.find(files)
    if not pids:
        known_errors.pop(files.guest, None)
        return GuestStatus(instance=files.guest, state="gone")
    pid = pids[-1]
    spec = files.spec()
    known = GuestStatus(instance=files.guest, state="hung", pid=pid, reason="its process does not answer")
    if spec:
        known = known.model_copy(update={"name": spec.name, "generation": spec.generation, "memory": spec.memory, "vcpus": spec.vcpus})
    of_pid, before = known_errors.get(files.guest, (pid, None))
    before = before if of_pid == pid else None
    asking = asyncio.ensure_future(_ask(files, monitors, tuning.answer_busy, before))
    try:
        done, _ = await asyncio.wait({asking}, timeout=tuning.answer)
        # A process that works may just be busy; one that is stopped, or waits in the kernel, is not.
        if not done and process.state(pid) not in "TtD":
            done, _ = await asyncio.wait({asking}, timeout=tuning.answer_busy - tuning.answer)
        if not done:
            return known
        runstate, migration, disk_errors = asking.result()
    except Closed:
        if not process.find(files):
            return GuestStatus(instance=files.guest, state="gone")
        # No socket yet: it is opening its disks.
        return known.model_copy(update={"state": "paused", "reason": "it is being started"})
    except (TimeoutError, Refused):
        return known
    finally:
        asking.cancel()
    state: str = STATES.get(runstate, "paused")
    reason = REASONS.get(runstate, "" if runstate in ("running", "paused") else runstate)
    if disk_errors:
        known_errors[files.guest] = pid, disk_errors
    else:
        known_errors.pop(files.guest, None)
    return known.model_copy(update={"state": state, "reason": reason, "migration": migration, "disk_errors": disk_errors})


async def _ask(files: GuestFiles, monitors: Monitors, limit: float, before: dict[str, str] | None) -> tuple[str, str, dict[str, str]]:
    async with monitors.session(files.qmp, command=limit) as session:
        runstate = str((await session.execute("query-status"))["status"])
        migration = leaving(await session.execute("query-migrate"))
        if runstate != "io-error":
            return runstate, migration, {}
        # Once for each stop, and never of a guest that runs: QEMU looks at every image for this, and stands still if its storage does.
        return runstate, migration, before or failed_disks(await session.execute("query-block"))


def failed_disks(devices: list[dict[str, Any]]) -> dict[str, str]:
    """The disks whose errors stopped the guest, from QEMU's account of its block devices: volume -> ``full`` or ``failed``."""
    found = {}
    for device in devices:
        what = DISK_ERRORS.get(device.get("io-status", "ok"))
        if what:
            # /machine/peripheral/VOLUME/virtio-backend
            parts = str(device.get("qdev", "")).split("/")
            found[parts[3] if len(parts) > 3 else str(device.get("inserted", {}).get("node-name", ""))] = what
    return found


async def power_off(session: Session, grace: float, tuning: Tuning, report: Report) -> bool:
    """Press the power button until the guest has powered itself off, at most ``grace`` seconds. False when it did not, or stands still."""
    loop = asyncio.get_running_loop()
    end, press = loop.time() + grace, 0.0
    with session.events("SHUTDOWN", "STOP") as events:
        while True:
            runstate = (await session.execute("query-status"))["status"]
            if runstate == "shutdown":
                return True
            left = end - loop.time()
            if runstate not in ("running", "suspended") or left <= 0:
                return False
            if loop.time() >= press:
                await session.execute("system_powerdown")
                press = loop.time() + tuning.ask_again
            report(Progress(percent=100 * (1 - left / grace), text=f"asked to power off; {left:.0f} s left"))
            await events.next(min(left, max(press - loop.time(), 0.01), 1.0))
