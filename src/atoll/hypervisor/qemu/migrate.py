"""The source's side of a live migration: up to the pause before the switchover, over the commit point, or back.

QEMU itself remembers how far a migration is, so each of these may be called again, also by another process: it joins what is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.hypervisor.contract import Report
from atoll.hypervisor.qemu import guard, mirror, tls
from atoll.hypervisor.qemu.files import Account, GuestFiles
from atoll.hypervisor.qemu.qmp import Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.errors import Conflict, GuestError, MigrationFailed, WrongState
from atoll.model.messages import Endpoint, MigrationFigures, Progress
from atoll.model.units import format_size

PAUSED = "pre-switchover"
#: States between the pause and the commit point.
BEYOND = ("device", "postcopy-active", "postcopy-paused", "postcopy-recover")
ENDED = ("none", "failed", "cancelled", "completed")
#: ``return-path``: completed on the source means loaded on the target.
CAPABILITIES = ("events", "pause-before-switchover", "auto-converge", "return-path")
#: ``late-block-activate``: the target opens its disks for writing when it is told to run, not when it has loaded.
INCOMING_CAPABILITIES = ("events", "return-path", "late-block-activate")


@dataclass(frozen=True, slots=True)
class Source:
    """A running guest that is to leave."""

    session: Session
    files: GuestFiles
    tls_dir: Path
    owner: Account | None
    tuning: Tuning

    async def info(self, limit: float | None = None) -> dict[str, Any]:
        """QEMU's account of the migration away from here; always with a ``status``."""
        info: dict[str, Any] = await self.session.execute("query-migrate", limit=limit)
        return {**info, "status": leaving(info) or "none"}


def leaving(info: dict[str, Any]) -> str:
    """The status of a migration; empty where there is none, or only the one by which the guest has come here."""
    status = str(info.get("status", ""))
    # QEMU goes on to say ``completed`` of a guest that has arrived: taken for its own departure, that would give it away.
    return "" if status == "completed" and "ram" not in info else status


def capabilities(names: Sequence[str]) -> dict[str, Any]:
    """The argument of migrate-set-capabilities."""
    return {"capabilities": [{"capability": name, "state": True} for name in names]}


def uri(host: str, port: int) -> str:
    """A migration URI; IPv6 addresses are put in brackets."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


async def out(source: Source, to: Endpoint, copy: list[str], report: Report) -> None:
    """From the first byte to the pause. Errors: MigrationFailed (the guest runs on here), Conflict (it moves elsewhere), WrongState."""
    wanted = {"to": to.model_dump(mode="json"), "copy": sorted(copy)}
    while (status := (await source.info())["status"]) == "cancelling":
        await _changed(source, 0.5)
    if status == "completed":
        return
    if status not in ENDED:
        if source.files.load("migration") != wanted:
            raise Conflict(f"guest {source.files.guest} is migrating already, to another place or with other disks", hint="atoll job list")
        await guard.ensure(source.files, source.tuning.watchdog)
        await _until_paused(source, report, bool(copy))
        return
    runstate = (await source.session.execute("query-status"))["status"]
    if runstate not in ("running", "paused", "io-error"):
        raise WrongState(f"guest {source.files.guest} cannot migrate: it is {runstate}")
    source.files.save("migration", wanted)
    try:
        await _begin(source, to, copy, report)
    except Refused as error:
        await _settle(source)
        raise MigrationFailed(f"QEMU refused to migrate guest {source.files.guest}: {error}") from None
    except MigrationFailed:
        await _settle(source)
        raise
    await _until_paused(source, report, bool(copy))


async def _begin(source: Source, to: Endpoint, copy: list[str], report: Report) -> None:
    session, tuning = source.session, source.tuning
    if not to.tls:
        raise MigrationFailed(f"node {to.node} offers no TLS; guests never move unencrypted")
    if not {job["id"] for job in await session.execute("query-jobs")}:
        # Copies that an earlier call has begun use these credentials; they stay then.
        await mirror.abandon(session, tuning)
        await tls.use(session, source.files, source.tls_dir, source.owner)
    await session.execute("migrate-set-capabilities", capabilities(CAPABILITIES))
    await session.execute(
        "migrate-set-parameters",
        {
            "tls-creds": tls.CREDENTIALS,
            "tls-hostname": to.node,
            "downtime-limit": tuning.downtime_ms,
            "max-bandwidth": tuning.bandwidth,
        },
    )
    if copy:
        if to.nbd_port is None:
            raise MigrationFailed(f"node {to.node} is not ready to take disks")
        report(Progress(percent=0, text=f"copying {len(copy)} disk(s)"))
        await mirror.begin(session, to, copy, tuning)

        def copied(done: int, total: int) -> None:
            report(Progress(percent=80.0 * done / max(total, 1), text=f"disks: {format_size(done)} of {format_size(total)}"))

        await mirror.until_equal(session, copy, tuning, copied)
    await guard.start(source.files, tuning.watchdog)
    await session.execute("migrate", {"uri": uri(to.host, to.port)})


async def _until_paused(source: Source, report: Report, copied: bool) -> None:
    loop = asyncio.get_running_loop()
    first = 80.0 if copied else 0.0
    sent, since = -1, loop.time()
    stalled = False
    with source.session.events("MIGRATION") as events:
        while True:
            info = await source.info()
            status, ram = info["status"], info.get("ram", {})
            if status in (PAUSED, "completed", *BEYOND):
                report(Progress(percent=99.0, text="memory: all sent; waiting for the switchover"))
                return
            if status in ENDED:
                await _settle(source)
                reason = f"nothing was sent for {source.tuning.stall:.0f} s" if stalled else _reason(info)
                raise MigrationFailed(f"the migration of guest {source.files.guest} failed: {reason}; it runs on here")
            if ram:
                report(_memory(ram, first))
            if ram.get("transferred", 0) != sent:
                sent, since = ram.get("transferred", 0), loop.time()
            elif not stalled and loop.time() - since > source.tuning.stall:
                # TCP alone would wait for a dead link for many minutes.
                stalled = True
                await source.session.execute("migrate_cancel")
            await events.next(0.25)


def _memory(ram: dict[str, Any], first: float) -> Progress:
    total, remaining = int(ram.get("total", 0)), int(ram.get("remaining", 0))
    share = 1 - remaining / total if total else 0.0
    return Progress(percent=first + (98.0 - first) * max(share, 0.0), text=f"memory: {format_size(remaining)} of {format_size(total)} left")


async def proceed(source: Source, report: Report) -> MigrationFigures:
    """From the pause to ``completed``, the commit point. Errors: MigrationFailed (the guest runs here), GuestError (not known)."""
    info = await source.info()
    if info["status"] == PAUSED:
        wanted = source.files.load("migration") or {}
        report(Progress(percent=99.0, text="switching over"))
        try:
            await mirror.finish(source.session, wanted.get("copy", []), source.tuning)
            # Until the target has read all there is, QEMU may not answer; the watchdog ends that first.
            await source.session.execute("migrate-continue", {"state": PAUSED}, limit=source.tuning.switchover)
        except Refused:
            pass  # it has moved on, or the watchdog was faster: its state tells
        except MigrationFailed:
            await back(source)
            raise
    elif info["status"] not in (*ENDED, *BEYOND, "cancelling"):
        raise GuestError(f"the migration of guest {source.files.guest} is not at its switchover yet, but {info['status']}")
    async with asyncio.timeout(source.tuning.switchover):
        with source.session.events("MIGRATION") as events:
            while (info := await source.info(source.tuning.switchover))["status"] not in ENDED:
                await events.next(0.25)
    if info["status"] != "completed":
        await _settle(source)
        raise MigrationFailed(f"the migration of guest {source.files.guest} failed at its switchover: {_reason(info)}; it runs on here")
    report(Progress(percent=100.0, text="everything is on the target"))
    return figures(await _handed_over(source))


async def _handed_over(source: Source) -> dict[str, Any]:
    """QEMU says ``completed`` a moment before it has its figures, and before it shows that this guest is no longer its own."""
    async with asyncio.timeout(source.tuning.command):
        while (await source.session.execute("query-status"))["status"] == "finish-migrate":
            await _changed(source, 0.01)
    return await source.info()


def _reason(info: dict[str, Any]) -> str:
    if info["status"] == "cancelled":
        return "it was cancelled, by request or by its watchdog"
    if info["status"] == "none":
        return "there is none"
    return str(info.get("error-desc", "the connection broke, or its watchdog dropped it"))


def figures(info: dict[str, Any]) -> MigrationFigures:
    """A completed migration's figures."""
    ram = info.get("ram", {})
    return MigrationFigures(
        total_ms=int(info.get("total-time", 0)), downtime_ms=int(info.get("downtime", 0)), ram_bytes=int(ram.get("transferred", 0))
    )


async def back(source: Source) -> None:
    """Cancel, unless it has completed, and wait until the guest runs here again. No migration = success."""
    with source.session.events("MIGRATION") as events:
        while (status := (await _info_or_yank(source))["status"]) not in ENDED:
            if status != "cancelling":
                await source.session.execute("migrate_cancel")
            await events.next(0.25)
    if status != "completed":
        await _settle(source)


async def _info_or_yank(source: Source) -> dict[str, Any]:
    try:
        return await source.info(source.tuning.answer_busy)
    except TimeoutError:
        await source.session.yank()
        return await source.info()


async def _settle(source: Source) -> None:
    """After a failure: wait until QEMU has let the guest run on, and remove what the migration has left."""
    async with asyncio.timeout(source.tuning.command):
        with source.session.events("RESUME", "STOP") as events:
            while (await source.session.execute("query-status"))["status"] in ("finish-migrate", "postmigrate"):
                await events.next(0.1)
    await mirror.abandon(source.session, source.tuning)
    await tls.drop(source.session)


async def _changed(source: Source, limit: float) -> None:
    with source.session.events("MIGRATION") as events:
        await events.next(limit)
