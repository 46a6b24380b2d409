"""Ceph's daemons on this node: started, stopped, and kept running.

Where systemd runs, it keeps them: Debian's units ``ceph-mon@``, ``ceph-mgr@`` and ``ceph-osd@``, enabled. Elsewhere (in a lab) they are
plain daemons, which outlive the agent; a file says which are wanted, and the agent starts those again that have ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, HostError
from atoll.runtime import process
from atoll.runtime.files import read_json, write_durably
from atoll.runtime.systemd import booted_with_systemd

log = structlog.get_logger()
RUN, DATA, LOGS, UNITS = Path("/run/ceph"), Path("/var/lib/ceph"), Path("/var/log/ceph"), Path("/etc/systemd/system")
USER = "ceph"
#: Seconds for a daemon to start, to end when asked, and between looks at those that are kept running.
START, STOP, PERIOD = 60.0, 30.0, 5.0
#: A disk belongs to root after a boot; the unit's own user may not open it.
_DROP_IN = "# Made by Atoll.\n[Service]\nExecStartPre=+/bin/chown {user}:{user} {block}\n"


def name_of(kind: str, ident: str) -> str:
    """Such as ``osd.0``."""
    return f"{kind}.{ident}"


def directory(kind: str, ident: str) -> Path:
    """Where a daemon keeps what it has."""
    return DATA / kind / f"ceph-{ident}"


def settle_in() -> None:
    """The directories that all daemons need, with the right owner. Errors: HostError."""
    try:
        for path in (RUN, DATA, LOGS, DATA / "mon", DATA / "mgr", DATA / "osd"):
            path.mkdir(mode=0o750, parents=True, exist_ok=True)
            shutil.chown(path, USER, USER)
    except (OSError, LookupError) as error:
        raise HostError(f"cannot make Ceph's directories: {error}", hint="apt-get install ceph-common") from None


def pid_of(kind: str, ident: str) -> int:
    """Its process; 0: it does not run."""
    try:
        pid = int((RUN / f"{kind}.{ident}.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return 0
    # The pid may be another process' by now.
    return pid if words and os.path.basename(words[0]) == f"ceph-{kind}".encode() and ident.encode() in words else 0


class Daemons:
    """Those of this node. ``state_dir``: where it is kept which are wanted."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "ceph-daemons.json"
        self._locks: dict[str, asyncio.Lock] = {}
        self.systemd = booted_with_systemd()

    def wanted(self) -> list[tuple[str, str]]:
        """(kind, id) of those that shall run."""
        return [(kind, ident) for kind, ident in read_json(self._path, [])]

    def _want(self, kind: str, ident: str, yes: bool) -> None:
        others = [item for item in self.wanted() if item != (kind, ident)]
        write_durably(self._path, _json([*others, (kind, ident)] if yes else others))

    async def start(self, kind: str, ident: str) -> None:
        """Let it run, now and after each boot; running already is success. Errors: HostError with the end of its log."""
        async with self._locks.setdefault(name_of(kind, ident), asyncio.Lock()):
            if self.systemd:
                if kind == "osd":
                    place = UNITS / f"ceph-osd@{ident}.service.d"
                    place.mkdir(parents=True, exist_ok=True)
                    write_durably(place / "atoll.conf", _DROP_IN.format(user=USER, block=directory(kind, ident) / "block"), 0o644)
                await process.run(["systemctl", "daemon-reload"], deadline=START)
                await process.run(["systemctl", "enable", "--now", f"ceph-{kind}@{ident}.service"], deadline=START)
                return
            self._want(kind, ident, True)
            await self._spawn(kind, ident)

    async def _spawn(self, kind: str, ident: str) -> None:
        if pid_of(kind, ident):
            return
        settle_in()
        if kind == "osd":
            _own(directory(kind, ident) / "block")
        argv = [f"ceph-{kind}", "-i", ident, "--setuser", USER, "--setgroup", USER]
        try:
            await process.run(argv, deadline=START)
            await _until(lambda: pid_of(kind, ident) != 0, START, f"{name_of(kind, ident)} runs")
        except AtollError as error:
            if pid_of(kind, ident):
                return
            raise HostError(f"{name_of(kind, ident)} does not start: {error.message}{_tail(kind, ident)}") from None

    async def stop(self, kind: str, ident: str) -> None:
        """Let it end, and stay so after a boot; not running is success. Errors: DeadlineExceeded."""
        async with self._locks.setdefault(name_of(kind, ident), asyncio.Lock()):
            if self.systemd:
                await process.run(["systemctl", "disable", "--now", f"ceph-{kind}@{ident}.service"], deadline=STOP * 2)
                return
            self._want(kind, ident, False)
            for number in (signal.SIGTERM, signal.SIGKILL):
                pid = pid_of(kind, ident)
                if not pid:
                    return
                try:
                    os.kill(pid, number)
                    await _until(lambda: pid_of(kind, ident) == 0, STOP, f"{name_of(kind, ident)} has ended")
                except ProcessLookupError:
                    return
                except DeadlineExceeded:
                    if number is signal.SIGKILL:
                        raise

    async def keep(self) -> None:
        """For ever: start those again that have ended. Nothing to do where systemd runs."""
        while not self.systemd:
            for kind, ident in self.wanted():
                async with self._locks.setdefault(name_of(kind, ident), asyncio.Lock()):
                    if (kind, ident) in self.wanted() and not pid_of(kind, ident):
                        try:
                            await self._spawn(kind, ident)
                        except AtollError as error:
                            log.warning("a daemon of Ceph's does not start", daemon=name_of(kind, ident), error=error.message)
            await asyncio.sleep(PERIOD)


def _own(block: Path) -> None:
    try:
        shutil.chown(block, USER, USER)
    except (OSError, LookupError) as error:
        raise HostError(f"cannot give {block} to {USER}: {error}") from None


async def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        if loop.time() > end:
            raise DeadlineExceeded(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(0.02)


def _tail(kind: str, ident: str) -> str:
    try:
        lines = (LOGS / f"ceph-{kind}.{ident}.log").read_text(errors="replace").splitlines()[-3:]
    except OSError:
        return ""
    return "; its log ends: " + " / ".join(lines) if lines else ""


def _json(items: list[tuple[str, str]]) -> str:
    return json.dumps(sorted(items))
