"""Block devices that the kernel has made of images: what both of its ways have in common."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, HostError
from atoll.storage.rbd.mapping import tool
from atoll.storage.rbd.mapping.way import Image

#: Seconds for a first answer of Ceph's, for what was written to get there, for a read, and for the kernel to tell a new size.
_ANSWER, _FLUSH, _READ, _GROW = 15.0, 8.0, 6.0, 15.0
#: Seconds in which whoever only looks at a device has looked.
_LOOK = 3.0
#: The kernel's word for a module that it does not have comes at once, and loading takes a second on a slow machine.
_LOAD = 15.0


def load(module: str) -> str:
    """Load a module of the kernel's; why it cannot be, or nothing."""
    try:
        tool.run(["modprobe", module], _LOAD)
    except (HostError, DeadlineExceeded) as error:
        return str(error.details.get("words", error.message))
    return ""


def attribute(device: str, name: str) -> str:
    """What the kernel says of a device (``size``, ``ro``...); empty where it is gone."""
    try:
        return (Path("/sys/block") / os.path.basename(device) / name).read_text().strip()
    except OSError:
        return ""


def size(device: str) -> int:
    """In bytes."""
    return int(attribute(device, "size") or 0) * 512


def as_wanted(image: Image, device: str) -> str:
    """The device, if it is in the mode that was asked for. Errors: Conflict."""
    if (attribute(device, "ro") == "1") != image.read_only:
        mode = "to be written" if image.read_only else "to be read only"
        raise Conflict(f"volume {image.volume} is mapped here already, {mode}", hint="atoll instance deactivate-disks INSTANCE")
    return device


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait where nothing wakes us. Errors: DeadlineExceeded."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise DeadlineExceeded(f"after {seconds:.0f} s still not: {what}", hint="ceph -s; dmesg | tail")
        time.sleep(0.02)


def appeared(device: str) -> str:
    """The device, when its node is there."""
    until(lambda: os.path.exists(device), _GROW, f"{device} is there")
    return device


def grown(image: Image, device: str, wanted: int) -> int:
    """The size of the device when it is as large as the image. Errors: HostError (not mapped), DeadlineExceeded."""
    if not device:
        raise HostError(f"{image.spec} is not mapped here", hint="atoll instance activate-disks INSTANCE")
    until(lambda: size(device) >= wanted, _GROW, f"{device} has {wanted} bytes, as {image.spec} has")
    return size(device)


def written_out(image: Image, device: str, question: Sequence[str]) -> str:
    """All that was written through it is in Ceph; why it is not and never will be, or nothing. Errors: DeadlineExceeded (no answer).

    Ceph must answer, too, as ending a mapping hangs where it does not. ``question``: a program that ends when Ceph has answered, whatever
    it says. What is read does not tell: where an object map knows of nothing, nobody asks Ceph.
    """
    try:
        with suppress(HostError):
            tool.run(question, _ANSWER)
        tool.run(["sync", device], _FLUSH)
        tool.run(["dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"], _READ)
    except DeadlineExceeded:
        raise DeadlineExceeded(
            f"what was written to {device} does not get into Ceph: {image.spec} stays mapped", hint="ceph -s; then try again"
        ) from None
    except HostError as error:
        return f"writing out {device}: {error.details.get('words', error.message)}"
    return ""


def users(device: str, but: int = 0) -> list[int]:
    """The processes that have it open, one excepted. Errors: none; what ends meanwhile has it no more."""
    try:
        wanted = os.stat(device).st_rdev
    except FileNotFoundError:
        return []
    return sorted({pid for pid, number in _open_files() if number == wanted and pid != but})


def _open_files() -> Iterator[tuple[int, int]]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            files = os.listdir(f"/proc/{entry}/fd")
        except OSError:
            continue
        for file in files:
            try:
                yield int(entry), os.stat(f"/proc/{entry}/fd/{file}").st_rdev
            except OSError:
                continue


def refuse_users(image: Image, device: str, but: int = 0) -> None:
    """Errors: DiskInUse, where somebody has it open, mounted, or something is made of it. udev looks at devices for a moment."""
    end = time.monotonic() + _LOOK
    while found := _who(device, but):
        if time.monotonic() > end:
            raise in_use(image, device, ", ".join(found))
        time.sleep(0.05)


def _who(device: str, but: int) -> list[str]:
    found = [f"pid {pid}" for pid in users(device, but)]
    found += [entry.name for entry in (Path("/sys/block") / os.path.basename(device) / "holders").glob("*")]
    return found or (["a mount"] if _mounted(device) else [])


def in_use(image: Image, device: str, who: str = "somebody") -> DiskInUse:
    """What to say then."""
    return DiskInUse(
        f"{device}, which is {image.spec}, is still in use by {who}", hint=f"fuser -v {device}; findmnt {device}; lsblk {device}"
    )


def _mounted(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
