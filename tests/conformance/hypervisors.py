"""What the suite of hypervisors needs of each form: two nodes, disks, guests that count, and ways to harm them.

To add a form, write a subclass of ``Harness`` and a fixture for it in ``test_hypervisor.py``.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from atoll.hypervisor.contract import Hypervisor
from atoll.hypervisor.fake import FakeHypervisor
from atoll.hypervisor.memory import MemoryHypervisor, World
from atoll.model.messages import Attached, Endpoint, GuestDisk, GuestSpec, GuestStatus, Progress
from atoll.model.objects import Boot

MIB = 1024**2
INSTANCE = "i-0123456789abcdef0"
NODES = ("north", "south")


def quiet(progress: Progress) -> None:
    """A report that nobody reads."""


async def eventually(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something holds that nobody announces."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"it did not come true within {seconds} s"
        await asyncio.sleep(0.01)


def ring(data: bytes, slots: int = 2048) -> tuple[int, list[int]]:
    """The newest record of a ring, and those that should be there and are not."""
    found = {}
    for slot in range(slots):
        magic, n, inverse = struct.unpack_from("<8sQQ", data, slot * 512)
        if magic == b"CTRREC01" and inverse == n ^ 0xFFFFFFFFFFFFFFFF:
            found[slot] = n
    top = max(found.values(), default=0)
    return top, [n for n in range(max(1, top - slots + 1), top + 1) if found.get(n % slots) != n]


class Harness(ABC):
    """Two nodes. ``appends`` are words for the guest's kernel command line; ``slow`` makes its memory take a while to move."""

    slow: str = "fake.ram=30"
    deaf: str = "acpi=off"
    #: For guests that do not let go of a disk; None = this form has none.
    clinging: str | None = "fake.unplug=off"
    #: Whether the contract's file locks stop a second start.
    locking = True

    def __init__(self) -> None:
        self.nodes: dict[str, Hypervisor] = {node: self.new(node) for node in NODES}
        self.a, self.b = (self.nodes[node] for node in NODES)

    @abstractmethod
    def new(self, node: str) -> Hypervisor:
        """A new object for a node, as after a restart of its agent."""

    @abstractmethod
    def disk(self, volume: str, slot: int = 0, size: int = 4 * MIB, *, node: str = "", mode: str = "rw") -> GuestDisk:
        """A disk that both nodes see, or (``node``) only that one; made when it is not there."""

    @abstractmethod
    def grow(self, volume: str, size: int) -> None:
        """Grow a volume's image."""

    @abstractmethod
    async def records(self, node: str, count: int = 5, instance: str = INSTANCE) -> None:
        """Wait until the guest on this node has written that many more records."""

    @abstractmethod
    def check(self, volume: str = "vol-0", *, node: str = "") -> int:
        """Assert that every acknowledged record is on the disk; gives the newest."""

    @abstractmethod
    def lives(self, pid: int | None) -> bool:
        """Whether there is such a process, asked of the system itself."""

    @abstractmethod
    async def kill_process(self, node: str, instance: str = INSTANCE) -> None:
        """kill -9, from outside."""

    @abstractmethod
    async def hang(self, node: str, hung: bool = True, instance: str = INSTANCE) -> None:
        """SIGSTOP, or SIGCONT."""

    @abstractmethod
    async def power_off_itself(self, node: str, instance: str = INSTANCE) -> None:
        """The guest ends by itself."""

    @abstractmethod
    def watchdog(self, seconds: float) -> None:
        """Set the time after which a migration that nobody goes on with is cancelled."""

    def spec(self, *appends: str, generation: int = 1, instance: str = INSTANCE, disks: list[GuestDisk] | None = None) -> GuestSpec:
        """A guest with one disk that writes records."""
        boot = Boot(append=" ".join(("ctr=vda", *appends)))
        found = [self.disk("vol-0")] if disks is None else disks
        return GuestSpec(instance=instance, name="web1", generation=generation, memory=64 * MIB, boot=boot, disks=found)

    async def state(self, node: str, instance: str = INSTANCE) -> str:
        """Its state on a node."""
        return (await self.nodes[node].status(instance)).state

    async def until(self, node: str, wanted: Callable[[GuestStatus], bool], seconds: float = 30.0) -> GuestStatus:
        """Wait for a status."""
        deadline = time.monotonic() + seconds
        while not wanted(status := await self.nodes[node].status(INSTANCE)):
            assert time.monotonic() < deadline, f"still {status}"
            await asyncio.sleep(0.02)
        return status

    async def paired(self, *appends: str) -> Endpoint:
        """A guest that runs on the first node, and one that waits for it on the second."""
        await self.a.start(self.spec(*appends), quiet)
        await self.records(NODES[0])
        return await self.b.incoming(self.spec(*appends, generation=2), [], NODES[0], quiet)


class FakeHarness(Harness):
    """Guests as processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__()

    def new(self, node: str) -> FakeHypervisor:
        return FakeHypervisor(self.path / node, self.path / "tls", "127.0.0.1", node)

    def image(self, volume: str, node: str = "") -> Path:
        return self.path / f"{volume}{'@' + node if node else ''}.raw"

    def disk(self, volume: str, slot: int = 0, size: int = 4 * MIB, *, node: str = "", mode: str = "rw") -> GuestDisk:
        path = self.image(volume, node)
        if not path.exists():
            path.touch()
            os.truncate(path, size)
        blockdev = {"driver": "file", "filename": str(path)}
        attached = Attached(volume=volume, path=str(path), blockdev=blockdev)
        return GuestDisk.model_validate({"volume": volume, "slot": slot, "size": size, "mode": mode, "attached": attached})

    def grow(self, volume: str, size: int) -> None:
        os.truncate(self.image(volume), size)

    def console(self, node: str, instance: str = INSTANCE) -> str:
        try:
            return (self.path / node / instance / "console.log").read_text()
        except FileNotFoundError:
            return ""

    def acknowledged(self, node: str, instance: str = INSTANCE) -> list[int]:
        return [int(n) for n in re.findall(r"^ACK (\d+)$", self.console(node, instance), re.MULTILINE)]

    async def records(self, node: str, count: int = 5, instance: str = INSTANCE) -> None:
        lines = self.console(node, instance).count("ACK ")
        await eventually(lambda: self.console(node, instance).count("ACK ") >= lines + count)

    def check(self, volume: str = "vol-0", *, node: str = "") -> int:
        acknowledged = [n for here in NODES for n in self.acknowledged(here)]
        assert len(acknowledged) == len(set(acknowledged)), "a record was acknowledged twice: a guest did not go on where it was"
        top, missing = ring(self.image(volume, node).read_bytes()[: 2048 * 512])
        assert not missing
        assert top >= max(acknowledged) > 0
        return top

    def pid(self, node: str, instance: str = INSTANCE) -> int:
        return int((self.path / node / instance / "pid").read_text().split()[0])

    def lives(self, pid: int | None) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    async def kill_process(self, node: str, instance: str = INSTANCE) -> None:
        pid = self.pid(node, instance)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not self.lives(pid))

    async def hang(self, node: str, hung: bool = True, instance: str = INSTANCE) -> None:
        os.kill(self.pid(node, instance), signal.SIGSTOP if hung else signal.SIGCONT)

    async def power_off_itself(self, node: str, instance: str = INSTANCE) -> None:
        found = self.nodes[node]
        assert isinstance(found, FakeHypervisor)
        await found._ask(instance, "powerdown", wait=5)

    def watchdog(self, seconds: float) -> None:
        for found in self.nodes.values():
            assert isinstance(found, FakeHypervisor)
            found.watchdog = seconds

    async def close(self) -> list[int]:
        """Kill what is left, and say what was."""
        left = []
        for node in NODES:
            for guest in await self.nodes[node].guests():
                left.append(guest.pid or 0)
                await self.nodes[node].kill(guest.instance)
        return left


class MemoryHarness(Harness):
    """Guests in memory."""

    def __init__(self) -> None:
        self.world = World()
        self.local: set[str] = set()
        self.world.image = lambda node, volume: f"{volume}@{node}" if volume in self.local else volume
        self.world.start_time, self.world.ram_time, self.world.powerdown_time = 0.02, 0.1, 0.02
        super().__init__()

    def new(self, node: str) -> MemoryHypervisor:
        return MemoryHypervisor(self.world, node)

    def disk(self, volume: str, slot: int = 0, size: int = 4 * MIB, *, node: str = "", mode: str = "rw") -> GuestDisk:
        if node:
            self.local.add(volume)
        attached = Attached(volume=volume, path=volume)
        return GuestDisk.model_validate({"volume": volume, "slot": slot, "size": size, "mode": mode, "attached": attached})

    def grow(self, volume: str, size: int) -> None:
        """Images in memory have no size."""

    async def records(self, node: str, count: int = 5, instance: str = INSTANCE) -> None:
        assert self.world.running(instance) == [node]
        self.world.tick(count)

    def check(self, volume: str = "vol-0", *, node: str = "") -> int:
        assert not self.world.violations
        assert not self.world.missing()
        return self.world.images[self.world.image(node, volume)]

    def lives(self, pid: int | None) -> bool:
        return any(guest.pid == pid for guest in self.world.guests.values())

    async def kill_process(self, node: str, instance: str = INSTANCE) -> None:
        self.world.kill_guest(instance, node)

    async def hang(self, node: str, hung: bool = True, instance: str = INSTANCE) -> None:
        self.world.hang(instance, node, hung)

    async def power_off_itself(self, node: str, instance: str = INSTANCE) -> None:
        self.world.end_guest(instance, node)

    def watchdog(self, seconds: float) -> None:
        self.world.watchdog = seconds
