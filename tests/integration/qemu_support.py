"""Real guests for tests: two hypervisors on this machine, certificates, a disk, and ways to look and to break."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from atoll.hypervisor.qemu import QemuHypervisor
from atoll.lab.guest import GuestImage, RingReport, acks, append, build, check_ring
from atoll.model.ids import new_id
from atoll.model.messages import Attached, GuestDisk, GuestSpec, Progress
from atoll.model.objects import Boot
from atoll.model.units import MIB
from atoll.runtime.certs import create_ca, issue

#: Where test runs share one guest image.
CACHE = Path(os.environ.get("ATOLL_TEST_CACHE", "/var/tmp/atoll-guest"))


class Authority:
    """The certificate authority of a cluster."""

    def __init__(self) -> None:
        self._ca = create_ca("test")

    def node(self, place: Path, name: str) -> Path:
        """Write ca.pem, cert.pem and key.pem of a node into ``place``."""
        pair = issue(self._ca, "node", name, name, ["127.0.0.1"])
        place.mkdir(parents=True)
        (place / "ca.pem").write_text(self._ca.cert_pem)
        (place / "cert.pem").write_text(pair.cert_pem)
        (place / "key.pem").write_text(pair.key_pem)
        return place


@dataclass
class Reports:
    """Collects progress."""

    seen: list[Progress] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)


@dataclass
class World:
    """Hypervisors ``a`` and ``b`` on 127.0.0.1, and what is needed to make guests on them."""

    place: Path
    image: GuestImage
    authority: Authority
    report: Reports = field(default_factory=Reports)
    #: Whose guests' disks are, as connectors hand them over; empty = root's.
    user: str = ""
    _made: list[QemuHypervisor] = field(default_factory=list)

    def hypervisor(self, node: str, *, tls: bool = True, user: str = "") -> QemuHypervisor:
        """A hypervisor of a node, as a newly started agent would make it."""
        tls_dir = self.place / f"tls-{node}"
        if tls and not tls_dir.exists():
            self.authority.node(tls_dir, node)
        made = QemuHypervisor(self.place / node, tls_dir, "127.0.0.1", node, user)
        self.user = user or self.user
        # Others use this machine too: being slow is not what is tested.
        made.tuning.answer_busy = 10.0
        self._made.append(made)
        return made

    def disk(self, slot: int, size: int = 16 * MIB, name: str = "") -> GuestDisk:
        """A disk in a sparse file, attached as the shared file driver does it."""
        volume = new_id("vol", random.SystemRandom())
        path = self.place / (name or f"{volume}.raw")
        with open(path, "ab") as image:
            image.truncate(size)
        if self.user:
            shutil.chown(path, self.user)
        blockdev = {"driver": "file", "filename": str(path), "locking": "on"}
        return GuestDisk(volume=volume, slot=slot, size=size, attached=Attached(volume=volume, path=str(path), blockdev=blockdev))

    def spec(self, *disks: GuestDisk, generation: int = 1, more: str = "", memory: int = 128 * MIB) -> GuestSpec:
        """A guest with these disks (or one new disk) that writes to its first. ``more``: words for its kernel command line."""
        instance = new_id("i", random.SystemRandom())
        boot = Boot(kernel=str(self.image.kernel), initrd=str(self.image.initrd), append=append(ctr="vda", ctrdelay=5000, more=more))
        return GuestSpec(
            instance=instance, name="test", generation=generation, memory=memory, boot=boot, disks=list(disks) or [self.disk(0)]
        )

    def ring(self, spec: GuestSpec, *hypervisors: QemuHypervisor) -> RingReport:
        """Check the first disk against everything acknowledged on these hypervisors' consoles."""
        seen = [ack for hypervisor in hypervisors for ack in acks(text(hypervisor, spec))]
        return check_ring(image(spec.disks[0]), max(seen))

    async def end(self) -> None:
        """Kill every guest."""
        for hypervisor in self._made:
            for guest in await hypervisor.guests():
                if guest.pid and stopped(guest.pid):
                    os.kill(guest.pid, signal.SIGCONT)
                await hypervisor.kill(guest.instance)


def image(disk: GuestDisk) -> Path:
    """The file of a disk."""
    assert disk.attached is not None
    return Path(str(disk.attached.path))


def text(hypervisor: QemuHypervisor, spec: GuestSpec) -> str:
    """What the guest has said on its console."""
    try:
        return hypervisor.console_log(spec.instance).read_text(errors="replace")
    except FileNotFoundError:
        return ""


async def until(condition: Callable[[], object], deadline: float = 40.0, what: str = "") -> None:
    """Poll what nothing tells us of."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:.0f} s: {what or condition}")
        await asyncio.sleep(0.02)


async def says(hypervisor: QemuHypervisor, spec: GuestSpec, pattern: str, deadline: float = 40.0) -> None:
    """Wait for a line on the console."""
    await until(lambda: re.search(pattern, text(hypervisor, spec), re.MULTILINE), deadline, f"{pattern!r} on the console")


async def writes(hypervisor: QemuHypervisor, spec: GuestSpec, more: int = 5, deadline: float = 40.0) -> None:
    """Wait until the guest has acknowledged some more records."""
    before = len(acks(text(hypervisor, spec)))
    try:
        await until(lambda: len(acks(text(hypervisor, spec))) >= before + more, deadline, f"{more} more records")
    except AssertionError as error:
        raise AssertionError(f"{error}; {await _looks(hypervisor, spec)}") from None


async def _looks(hypervisor: QemuHypervisor, spec: GuestSpec) -> str:
    """How a guest is that does not do what it should: its state, the time its processors and its process have used, its last words."""
    status = await hypervisor.status(spec.instance)
    times = []
    for _ in range(2):
        times.append(Path(f"/proc/{status.pid}/stat").read_text().rpartition(")")[2].split()[11:13] if status.pid else "gone")
        await asyncio.sleep(1)
    threads = [f"{t.name} {Path(t, 'wchan').read_text()}" for t in Path(f"/proc/{status.pid}/task").glob("*")] if status.pid else []
    return f"{status}; CPU in a second: {times}; threads: {threads}; console: {text(hypervisor, spec)[-400:]!r}"


async def power_off_from_within(hypervisor: QemuHypervisor, spec: GuestSpec) -> None:
    """Type it into the guest's shell, and wait until it did so."""
    reader, writer = await asyncio.open_unix_connection(hypervisor.console(spec.instance))
    listening = asyncio.create_task(reader.read())
    writer.write(b"poweroff -f\n")
    # A serial port takes a few bytes at a time; who hangs up takes the rest with him.
    for _ in range(1200):
        if (await hypervisor.status(spec.instance)).state != "running":
            break
        await asyncio.sleep(0.05)
    listening.cancel()
    writer.close()


def stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


async def pid_of(hypervisor: QemuHypervisor, spec: GuestSpec) -> int:
    """The process of a guest."""
    pid = (await hypervisor.status(spec.instance)).pid
    assert pid is not None
    return pid


async def started(hypervisor: QemuHypervisor, spec: GuestSpec, report: Reports) -> None:
    """Start a guest and wait until it writes."""
    await hypervisor.start(spec, report)
    await writes(hypervisor, spec)


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Built once, kept between runs."""
    return build(CACHE)


@pytest_asyncio.fixture
async def world(guest_image: GuestImage) -> AsyncIterator[World]:
    """Hypervisors and disks in a directory whose path is short enough for sockets; nothing is left running, whatever happens."""
    place = Path(tempfile.mkdtemp(prefix="atoll-q-", dir="/tmp"))
    place.chmod(0o755)  # guests may run as another user
    made = World(place, guest_image, Authority())
    try:
        yield made
    finally:
        await made.end()
        shutil.rmtree(place, ignore_errors=True)
