"""The contract of hypervisors, as an agent uses them.

Every call is idempotent and has a deadline of its own or the caller's; guests outlive the process that calls. A hypervisor never
decides who may run: the agent has checked the generation before it calls ``start`` or ``incoming``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from atoll.model.messages import Endpoint, GuestDisk, GuestSpec, GuestStatus, MigrationFigures, Progress

#: Called with how far something is; must not block.
Report = Callable[[Progress], None]


@runtime_checkable
class Hypervisor(Protocol):
    """What an agent needs of a hypervisor. ``guest`` is an instance id."""

    name: str

    async def probe(self) -> str:
        """The accelerator that really works here, found by running it: ``kvm``, ``tcg`` or ``none``."""

    async def guests(self) -> list[GuestStatus]:
        """Every guest of this node, found from the system itself (not from memory)."""

    async def status(self, guest: str) -> GuestStatus:
        """One guest; state ``gone`` when it has no process. Never raises for a guest that hangs: state ``hung``."""

    async def start(self, spec: GuestSpec, report: Report) -> None:
        """Start it and let it run. Running already with the same generation = success; another generation = Conflict.
        Disks come with ``attached`` filled in. Errors: GuestError (with the hypervisor's words), DiskInUse."""

    async def stop(self, guest: str, grace: float, report: Report) -> bool:
        """Ask it to power off, kill it after ``grace`` seconds (0 = at once), and wait until its process is gone.
        Not running = success. True if it went by itself."""

    async def reboot(self, guest: str, hard: bool) -> None:
        """Ask for a reboot, or reset it (hard). Errors: GuestError when not running."""

    async def plug(self, guest: str, disk: GuestDisk) -> None:
        """Plug a disk into its slot. Plugged already = success."""

    async def unplug(self, guest: str, volume: str, timeout: float) -> None:
        """Take a disk out; the guest must let go of it. Not there = success. Errors: DeadlineExceeded, GuestError."""

    async def resize(self, guest: str, volume: str, size: int) -> None:
        """Tell the guest that a disk has grown to ``size`` bytes."""

    async def resume(self, guest: str) -> None:
        """Let a paused or incoming-and-complete guest run; what a disk's error has stopped is tried again. Running = success.
        Errors: GuestError."""

    async def incoming(self, spec: GuestSpec, copy: list[str], peer: str, report: Report) -> Endpoint:
        """Start a paused guest that waits for a migration; ``copy`` names volumes that will come over NBD. ``peer`` is the name of
        the only node whose certificate may connect. Started already with the same generation = its endpoint again."""

    async def migrate_out(self, guest: str, to: Endpoint, copy: list[str], report: Report) -> None:
        """Move memory (and the disks in ``copy``) until the guest is paused before its switchover; a watchdog process cancels if
        nobody goes on. Called again: joins the running migration. Errors: MigrationFailed (the guest runs on here)."""

    async def migrate_continue(self, guest: str, report: Report) -> MigrationFigures:
        """From the pause to ``completed``: the commit point. Completed already = its figures. Errors: MigrationFailed (the guest
        runs here), GuestError (not known: ask ``status``)."""

    async def migrate_cancel(self, guest: str) -> GuestStatus:
        """Cancel, wait until the guest runs again here, and give its status; state ``migrated`` if it had completed before."""

    async def await_incoming(self, guest: str, timeout: float) -> GuestStatus:
        """On the target: wait until everything has been loaded; state ``paused`` then, ``gone`` if loading failed."""

    async def kill(self, guest: str) -> None:
        """End its process at once and wait until it is gone. Gone = success."""

    def console(self, guest: str) -> str:
        """Path of the Unix socket of its serial console."""


@runtime_checkable
class HypervisorFactory(Protocol):
    """How an agent makes one: the directory for run-time files, and the directory of this node's TLS certificates."""

    def __call__(self, run_dir: str, tls_dir: str, address: str) -> Hypervisor:
        """Make it; touches nothing yet."""
