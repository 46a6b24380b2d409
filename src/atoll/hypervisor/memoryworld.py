"""The guests of a whole simulated cluster, and what they do to their disks: no process, no thread, no I/O, any event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from atoll.hypervisor.fakeguest import options
from atoll.hypervisor.fakerules import WATCHDOG
from atoll.model.errors import DiskInUse, MigrationFailed
from atoll.model.messages import GuestDisk, GuestSpec, GuestStatus, MigrationFigures, Progress

#: Called around each effect with node, method and ``before`` or ``after``; may wait, and may raise to lose the call there.
Fault = Callable[[str, str, str], "Awaitable[None] | None"]
RAM_STEPS = 10


@dataclass(eq=False)
class Move:
    """One migration, with QEMU's words for its status: setup, active, pre-switchover, device, completed, failed, cancelled."""

    target: str
    copy: list[str]
    status: str = "setup"
    error: str = ""
    progress: Progress = field(default_factory=lambda: Progress(percent=0, text="connecting"))
    go: bool = False
    before: tuple[str, str, dict[str, str]] = ("running", "", {})
    began: float = 0.0
    paused: float = 0.0
    figures: MigrationFigures = field(default_factory=MigrationFigures)
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")


@dataclass(eq=False)
class MemoryGuest:
    """A guest. ``active``: it has its disks open (and locked). ``counters``: volume -> the last record it has written or read."""

    spec: GuestSpec
    node: str
    pid: int
    state: str
    reason: str = ""
    active: bool = False
    hung: bool = False
    disk_errors: dict[str, str] = field(default_factory=dict)
    arriving: str = ""
    peer: str = ""
    copy: list[str] = field(default_factory=list)
    move: Move | None = None
    feeder: MemoryGuest | None = None
    disks: dict[str, GuestDisk] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.disks = {disk.volume: disk for disk in self.spec.disks}

    @property
    def options(self) -> dict[str, str]:
        return options(self.spec.boot.append)

    @property
    def moving(self) -> bool:
        return self.move is not None and not self.move.ended

    def status(self) -> GuestStatus:
        return GuestStatus.model_validate(
            {
                "instance": self.spec.instance,
                "name": self.spec.name,
                "generation": self.spec.generation,
                "state": "hung" if self.hung else self.state,
                "reason": self.reason or (self.move.error if self.move else ""),
                "migration": self.move.status if self.move else self.arriving,
                "pid": self.pid,
                "memory": self.spec.memory,
                "vcpus": self.spec.vcpus,
                "disk_errors": self.disk_errors,
            }
        )


class World:
    """All guests of all nodes; they outlive the hypervisor objects.

    ``locking`` True: a disk that somebody writes cannot be opened elsewhere, as with file locks that every node sees. False: writers
    are *none*, nothing stops a second writer, and ``violations`` tells. Times are seconds of the running loop.
    """

    def __init__(self, locking: bool = True) -> None:
        self.locking = locking
        self.guests: dict[tuple[str, str], MemoryGuest] = {}
        #: What must never happen, in words, in order: two writers, an instance that runs twice, records that are lost.
        self.violations: list[str] = []
        #: Volume -> the highest record that a guest was told is durable.
        self.acknowledged: dict[str, int] = {}
        #: Image -> the highest record in it, and volume -> all its images that were ever written.
        self.images: dict[str, int] = {}
        self.written: dict[str, set[str]] = {}
        self.fault: Fault | None = None
        #: What becomes of a write to a volume now: ``full`` or ``failed``; it stops its guest. Default: all goes well.
        self.trouble: Callable[[str, str], str] = lambda node, volume: ""
        #: Whether a migration stream between two nodes is cut.
        self.unreachable: Callable[[str, str], bool] = lambda a, b: False
        #: Which image a volume is on a node: another one per node for node-local pools. Default: all nodes see the same.
        self.image: Callable[[str, str], str] = lambda node, volume: volume
        self.latency, self.start_time, self.ram_time, self.powerdown_time, self.watchdog = 0.01, 0.1, 0.5, 0.2, WATCHDOG
        self._pids = itertools.count(1000)
        self._changed = asyncio.Event()

    # --- for tests ---

    def tick(self, records: int = 1) -> None:
        """Every running guest writes ``records`` records to each of its writable disks, and has them acknowledged."""
        for guest in list(self.guests.values()):
            for volume, disk in guest.disks.items():
                if guest.state == "running" and not guest.hung and disk.mode == "rw":
                    for _ in range(records):
                        if guest.state == "running":
                            self._write(guest, volume)

    def missing(self) -> dict[str, int]:
        """Volume -> how many acknowledged records no image of it holds. Empty when nothing is lost."""
        tops = {volume: max(self.images.get(image, 0) for image in images) for volume, images in self.written.items()}
        return {volume: top - tops[volume] for volume, top in self.acknowledged.items() if tops[volume] < top}

    def running(self, instance: str) -> list[str]:
        """The nodes on which an instance runs."""
        return sorted(node for (node, name), guest in self.guests.items() if name == instance and guest.state == "running")

    def power_cut(self, node: str, silent: bool = False) -> None:
        """All guests of a node end. ``silent``: the other ends of their streams hear nothing of it, as when the link died first."""
        for guest in [guest for guest in self.guests.values() if guest.node == node]:
            self.remove(guest, silent=silent)

    def kill_guest(self, instance: str, node: str) -> None:
        """As ``kill -9`` of its process; not there = nothing to do."""
        if guest := self.guests.get((node, instance)):
            self.remove(guest)

    def end_guest(self, instance: str, node: str) -> None:
        """The guest powers itself off."""
        self._shut_down(self.guests[node, instance])

    def hang(self, instance: str, node: str, hung: bool = True) -> None:
        """As SIGSTOP of its process (False: SIGCONT)."""
        self.guests[node, instance].hung = hung
        self.notify()

    # --- waiting ---

    def notify(self) -> None:
        """Something has changed: whoever waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until it is so; False if it was not within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    await self._changed.wait()
        except TimeoutError:
            return done()
        return True

    # --- guests ---

    def present(self, guest: MemoryGuest) -> bool:
        """Whether it still has its process."""
        return self.guests.get((guest.node, guest.spec.instance)) is guest

    def make(self, spec: GuestSpec, node: str, incoming: bool, peer: str = "", copy: list[str] | None = None) -> None:
        """A new guest. Errors: DiskInUse."""
        guest = MemoryGuest(spec, node, next(self._pids), "incoming", peer=peer, copy=copy or [])
        if not incoming:
            self.activate(guest)
        self.guests[node, spec.instance] = guest
        if not incoming:
            for volume in guest.disks:
                self._read(guest, volume)
            self.become(guest, "running")
        self.notify()

    def remove(self, guest: MemoryGuest, silent: bool = False) -> None:
        """End its process, and what hangs on its streams."""
        if not self.present(guest):
            return
        del self.guests[guest.node, guest.spec.instance]
        guest.active = False
        if guest.moving and guest.move and guest.move.task:
            guest.move.task.cancel()
            for other in list(self.guests.values()):
                if other.feeder is guest and other.state == "incoming" and not silent and not self.unreachable(guest.node, other.node):
                    self.remove(other)  # load of migration failed
        source = guest.feeder
        if source and source.move and not source.move.ended and not silent and not self.unreachable(source.node, guest.node):
            source.move.error = "the target closed the stream"
        self.notify()

    def become(self, guest: MemoryGuest, state: str, reason: str = "", disk_errors: dict[str, str] | None = None) -> None:
        """Its new state; two writers are seen here."""
        guest.state, guest.reason, guest.disk_errors = state, reason, disk_errors or {}
        self.notify()
        if state != "running":
            return
        for other in self.guests.values():
            if other is guest or other.state != "running":
                continue
            if other.spec.instance == guest.spec.instance:
                self._violated(f"{guest.spec.instance} runs on {other.node} and on {guest.node}")
            for volume in self._shared(guest, other):
                if guest.disks[volume].mode == other.disks[volume].mode == "rw":
                    writers = " and ".join(f"{one.spec.instance} on {one.node}" for one in (other, guest))
                    self._violated(f"{volume} is written by {writers}")

    def activate(self, guest: MemoryGuest, volume: str | None = None) -> None:
        """Open its disks (or the one just plugged). Errors: DiskInUse."""
        for other in self.guests.values() if self.locking else ():
            if other is guest or not other.active:
                continue
            for shared in self._shared(guest, other):
                if volume in (None, shared) and "rw" in (guest.disks[shared].mode, other.disks[shared].mode):
                    raise DiskInUse(f"{shared} is in use by {other.spec.instance} on {other.node} (pid {other.pid})")
        guest.active = True

    def plug(self, guest: MemoryGuest, disk: GuestDisk) -> None:
        """Another disk. Errors: DiskInUse."""
        guest.disks[disk.volume] = disk
        try:
            self.activate(guest, disk.volume)
        except DiskInUse:
            del guest.disks[disk.volume]
            raise
        self._read(guest, disk.volume)
        self.become(guest, guest.state, guest.reason, guest.disk_errors)

    def press_power(self, guest: MemoryGuest) -> None:
        """The power button; a guest with ``acpi=off`` ignores it."""
        if guest.options.get("acpi") != "off":
            asyncio.get_running_loop().call_later(self.powerdown_time, self._shut_down, guest)

    def _shut_down(self, guest: MemoryGuest) -> None:
        if self.present(guest) and guest.state == "running" and not guest.hung:
            self.become(guest, "shutdown", "by the guest")

    def _shared(self, one: MemoryGuest, other: MemoryGuest) -> list[str]:
        both = [volume for volume in one.disks if volume in other.disks]
        return [volume for volume in both if self.image(one.node, volume) == self.image(other.node, volume)]

    def _violated(self, text: str) -> None:
        if text not in self.violations:
            self.violations.append(text)

    def _read(self, guest: MemoryGuest, volume: str) -> None:
        guest.counters[volume] = found = self.images.get(self.image(guest.node, volume), 0)
        if found < self.acknowledged.get(volume, 0):
            self._violated(f"{volume} on {guest.node} ends at record {found}, but {self.acknowledged[volume]} was acknowledged")

    def _write(self, guest: MemoryGuest, volume: str) -> None:
        if what := self.trouble(guest.node, volume):
            self.become(guest, "paused", f"io-error: {volume}", {volume: what})
            return
        image, n = self.image(guest.node, volume), guest.counters.get(volume, 0) + 1
        if self.images.get(image, 0) != n - 1:
            text = f"{volume}: {guest.spec.instance} on {guest.node} writes record {n} after record {self.images.get(image, 0)}"
            self._violated(text)
        self.images[image] = guest.counters[volume] = n
        self.written.setdefault(volume, set()).add(image)
        self.acknowledged[volume] = max(n, self.acknowledged.get(volume, 0))

    # --- migration ---

    def begin_move(self, guest: MemoryGuest, target: str, copy: list[str]) -> Move:
        """Start to move a guest; it goes on without whoever asked."""
        guest.move = move = Move(target, copy, began=asyncio.get_running_loop().time())
        move.task = asyncio.create_task(self._leave(guest, move))
        return move

    def stay(self, guest: MemoryGuest, move: Move, status: str, why: str) -> None:
        """A migration ends without success: the guest goes on here, and its target ends."""
        paused = move.status in ("pre-switchover", "device")
        move.status, move.error = status, why
        for other in list(self.guests.values()):
            if other.feeder is guest and other.state == "incoming" and not self.unreachable(guest.node, other.node):
                self.remove(other)
        if paused:
            self.become(guest, *move.before)
        self.notify()

    async def _leave(self, guest: MemoryGuest, move: Move) -> None:
        try:
            await self._transfer(guest, move)
        except MigrationFailed as error:
            if self.present(guest):
                self.stay(guest, move, "failed", error.message)

    async def _transfer(self, guest: MemoryGuest, move: Move) -> None:
        target = self.guests.get((move.target, guest.spec.instance))
        await self._flow(guest, move, target, self.latency)
        if target is None or target.state != "incoming" or target.feeder or not self.present(target):
            raise MigrationFailed(f"{move.target} refuses: nothing waits for {guest.spec.instance} there")
        if target.peer and target.peer != guest.node:
            raise MigrationFailed(f"{move.target} refuses: only {target.peer} may connect, not {guest.node}")
        if {(d.volume, d.slot) for d in target.disks.values()} != {(d.volume, d.slot) for d in guest.disks.values()}:
            raise MigrationFailed(f"{move.target} refuses: it differs in disks")
        target.feeder, target.arriving, move.status = guest, "active", "active"
        self.notify()
        for step in range(RAM_STEPS):
            await self._flow(guest, move, target, float(guest.options.get("fake.ram") or self.ram_time) / RAM_STEPS)
            if guest.state == "shutdown":
                raise MigrationFailed("the guest has ended meanwhile")
            move.progress = Progress(percent=(step + 1) * 100 / RAM_STEPS, text="memory")
            self.notify()
        loop = asyncio.get_running_loop()
        move.before, move.paused, move.status = (guest.state, guest.reason, guest.disk_errors), loop.time(), "pre-switchover"
        self.become(guest, "paused", "migration")
        if not await self.wait(lambda: move.go or bool(move.error), self.watchdog):
            await self.wait(lambda: not guest.hung)
            self.stay(guest, move, "cancelled", f"the watchdog cancelled it: nobody went on for {self.watchdog:g} s")
            return
        move.status = "device"
        await self._flow(guest, move, target, self.latency)
        # Nothing is awaited from here to the end: a cancel comes before the commit point or after it, not in between.
        for volume in move.copy:
            image = self.image(move.target, volume)
            self.images[image] = self.images.get(self.image(guest.node, volume), 0)
            self.written.setdefault(volume, set()).add(image)
        guest.active, now = False, loop.time()
        move.figures = MigrationFigures(total_ms=round((now - move.began) * 1e3), downtime_ms=round((now - move.paused) * 1e3), ram_bytes=1)
        move.status = "completed"
        self.become(guest, "migrated")
        self._arrive(guest, target)

    def _arrive(self, guest: MemoryGuest, target: MemoryGuest) -> None:
        try:
            self.activate(target)
        except DiskInUse:
            self.remove(target)  # load of migration failed
            return
        target.counters, target.arriving = dict(guest.counters), "completed"
        self.become(target, "paused", "migration has arrived")

    async def _flow(self, guest: MemoryGuest, move: Move, target: MemoryGuest | None, seconds: float) -> None:
        """Let the stream flow for a while; over a cut link, or with an end that hangs, it stands still. Errors: MigrationFailed."""

        def flows() -> bool:
            return not (self.unreachable(guest.node, move.target) or guest.hung or (target and target.hung))

        await self.wait(lambda: bool(move.error), seconds)
        while not await self.wait(flows, 0.1):
            continue  # asked again and again: nobody tells when a link heals
        if target and (move.error or not self.present(target)):
            raise MigrationFailed(move.error or "the target closed the stream")
