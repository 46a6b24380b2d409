"""Copying node-local disks while their guest runs: the target exports them over NBD, the source mirrors into the exports.

Once ``ready``, each write of the guest goes to both sides before it is acknowledged; so when the guest stands still, both are equal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from atoll.hypervisor.qemu import tls
from atoll.hypervisor.qemu.qmp import Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.errors import MigrationFailed
from atoll.model.messages import Endpoint
from atoll.model.units import format_size

#: Called with bytes copied and bytes to copy.
Copied = Callable[[int, int], None]


def _job(volume: str) -> str:
    return f"copy-{volume}"


def _node(volume: str) -> str:
    return f"{volume}-copy"


# --- target ---


async def serve(session: Session, host: str, port: int, volumes: Sequence[str], tuning: Tuning) -> None:
    """Export the volumes to the authorised peer. Raises Refused (the port is taken)."""
    await session.execute(
        "nbd-server-start",
        {"addr": {"type": "inet", "data": {"host": host, "port": str(port)}}, "tls-creds": tls.CREDENTIALS, "tls-authz": tls.PEER},
    )
    for volume in volumes:
        export = {"type": "nbd", "id": _job(volume), "node-name": volume, "name": volume, "writable": True}
        await session.execute("block-export-add", export, limit=tuning.disk_command)


async def unserve(session: Session, tuning: Tuning) -> None:
    """End all exports, so that the guest itself may write. None = success."""
    for export in await session.execute("query-block-exports"):
        with contextlib.suppress(Refused):
            await session.execute("block-export-del", {"id": export["id"], "mode": "hard"})
    async with asyncio.timeout(tuning.disk_command):
        with session.events("BLOCK_EXPORT_DELETED") as events:
            while await session.execute("query-block-exports"):
                await events.next(0.5)
    with contextlib.suppress(Refused):  # not started
        await session.execute("nbd-server-stop")


# --- source ---


async def begin(session: Session, to: Endpoint, volumes: Sequence[str], tuning: Tuning) -> None:
    """Start (or join) the copies. Raises Refused."""
    jobs = {job["id"] for job in await _jobs(session)}
    for volume in volumes:
        if _job(volume) in jobs:
            continue
        await _drop_node(session, volume, tuning)
        node = {
            "driver": "nbd",
            "node-name": _node(volume),
            "export": volume,
            "server": {"type": "inet", "host": to.host, "port": str(to.nbd_port)},
            "tls-creds": tls.CREDENTIALS,
            "tls-hostname": to.node,
        }
        await session.execute("blockdev-add", node, limit=tuning.disk_command)
        job = {
            "job-id": _job(volume),
            "device": volume,
            "target": _node(volume),
            "sync": "full",
            "copy-mode": "write-blocking",
            # A failed job stays listed with its reason until we have read it.
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-dismiss": False,
        }
        await session.execute("blockdev-mirror", job, limit=tuning.disk_command)


async def until_equal(session: Session, volumes: Sequence[str], tuning: Tuning, copied: Copied) -> None:
    """Wait until all copies are ready. Errors: MigrationFailed (a copy failed, or made no progress)."""
    loop = asyncio.get_running_loop()
    last, since = -1, loop.time()
    with session.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE") as events:
        while True:
            jobs = {job["id"]: job for job in await _jobs(session)}
            _check(jobs, volumes)
            mine = [jobs[_job(volume)] for volume in volumes]
            done, total = (sum(int(job[what]) for job in mine) for what in ("current-progress", "total-progress"))
            copied(done, total)
            if all(job["status"] == "ready" for job in mine):
                return
            if done != last:
                last, since = done, loop.time()
            elif loop.time() - since > tuning.stall:
                raise MigrationFailed(f"copying the disks has made no progress for {tuning.stall:.0f} s at {format_size(done)}")
            await events.next(0.5)


async def finish(session: Session, volumes: Sequence[str], tuning: Tuning) -> None:
    """End the copies cleanly while the guest stands still: both sides are equal and whole. Errors: MigrationFailed."""
    jobs = {job["id"]: job for job in await _jobs(session)}
    if not any(_job(volume) in jobs for volume in volumes):
        return  # finished by an earlier call: a failed one leaves its job
    _check(jobs, volumes)
    for volume in volumes:
        with contextlib.suppress(Refused):  # told so already
            await session.execute("block-job-cancel", {"device": _job(volume)})
    async with asyncio.timeout(tuning.disk_command):
        with session.events("JOB_STATUS_CHANGE") as events:
            while True:
                jobs = {job["id"]: job for job in await _jobs(session)}
                _check(jobs, volumes)
                if all(jobs[_job(volume)]["status"] == "concluded" for volume in volumes):
                    break
                await events.next(0.5)
    for volume in volumes:
        await session.execute("job-dismiss", {"id": _job(volume)})
        await _drop_node(session, volume, tuning)


async def abandon(session: Session, tuning: Tuning) -> None:
    """Drop all copies, whatever their state; the guest's own disks are not touched. None = success."""
    async with asyncio.timeout(tuning.disk_command):
        with session.events("JOB_STATUS_CHANGE") as events:
            while jobs := await _jobs(session):
                for job in jobs:
                    with contextlib.suppress(Refused):
                        if job["status"] == "concluded":
                            await session.execute("job-dismiss", {"id": job["id"]})
                            await _drop_node(session, job["id"].removeprefix("copy-"), tuning)
                        else:
                            await session.execute("block-job-cancel", {"device": job["id"], "force": True})
                if await _jobs(session):
                    await events.next(0.5)


async def _jobs(session: Session) -> list[dict[str, Any]]:
    return [job for job in await session.execute("query-jobs") if job["type"] == "mirror" and job["id"].startswith("copy-")]


def _check(jobs: dict[str, dict[str, Any]], volumes: Sequence[str]) -> None:
    for volume in volumes:
        job = jobs.get(_job(volume))
        if job is None or job.get("error"):
            why = str(job["error"]) if job else "its job is gone"
            hint = "make room in the pool there: atoll pool info POOL" if "No space left" in why else None
            raise MigrationFailed(f"copying the disk {volume} failed: {why}", hint=hint)


async def _drop_node(session: Session, volume: str, tuning: Tuning) -> None:
    with contextlib.suppress(Refused):  # not there
        await session.execute("blockdev-del", {"node-name": _node(volume)}, limit=tuning.disk_command)
