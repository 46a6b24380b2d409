"""Disks for OSDs: whether one may be taken, whose it is, and erasing it."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from atoll.model.errors import Conflict, HostError
from atoll.runtime import process

_MAGIC = b"bluestore block device\n"
#: Bytes that are erased at the beginning and at the end; smaller disks than that of a megabyte are of no use anyway.
_HEAD, _TAIL = 16 << 20, 1 << 20
#: What Ceph's own start needs, in bytes.
SMALLEST = 1 << 30
_BY_ID = Path("/dev/disk/by-id")


@dataclass(frozen=True)
class Disk:
    """A block device as it is now. ``osd``: the uuid of the OSD whose it is; empty: nobody's."""

    path: str
    size: int
    osd: str


def look(path: str) -> Disk:
    """Errors: HostError in words that fit behind the device's name (it is not there, no block device)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            "is not there" if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENOMEDIUM) else f"cannot be read: {error.strerror}"
        ) from None
    try:
        if not stat.S_ISBLK(os.fstat(handle).st_mode):
            raise HostError("is not a block device")
        size = os.lseek(handle, 0, os.SEEK_END)
        head = os.pread(handle, 4096, 0)
    except OSError as error:
        raise HostError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    return Disk(path, size, _osd_of(head))


def _osd_of(head: bytes) -> str:
    if not head.startswith(_MAGIC):
        return ""
    return head[len(_MAGIC) :].split(b"\n", 1)[0].decode(errors="replace").strip()


async def objection(path: str, ours: frozenset[str] = frozenset()) -> tuple[str, int]:
    """Why the disk cannot be taken for an OSD (empty: it can), and its size. ``ours``: uuids of OSDs whose it may be already."""
    try:
        disk = look(path)
    except HostError as error:
        return error.message, 0
    if disk.osd:
        return ("" if disk.osd in ours else f"has the data of another OSD ({disk.osd})"), disk.size
    if disk.size < SMALLEST:
        return f"has {disk.size >> 20} MiB only; an OSD needs 1 GiB", disk.size
    try:
        # Exclusively: refused while it is mounted, or under a RAID, a volume group or a mapping.
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return (
            "is in use (mounted, or part of something)" if error.errno == errno.EBUSY else f"cannot be opened: {error.strerror}"
        ), disk.size
    found = await process.run(["blkid", "-p", "-o", "export", path], deadline=30, check=False)
    # 2: nothing was recognised.
    if found.rc != 2:
        words = [line for line in found.stdout.splitlines() if line.startswith(("TYPE=", "PTTYPE="))]
        return f"is not empty: {', '.join(words) or found.stderr.strip() or 'something is on it'}", disk.size
    return "", disk.size


async def take(path: str, uuid: str) -> Disk:
    """The disk, if it is this OSD's or may become it. Errors: Conflict."""
    why, _ = await objection(path, frozenset({uuid}))
    if why:
        raise Conflict(f"{path} {why}", hint=f"wipefs -a {path} if nothing on it is needed")
    return look(path)


def erase(path: str, uuid: str) -> bool:
    """Make the disk empty if it is this OSD's; nobody else's is touched. False: it is not. Errors: HostError."""
    try:
        disk = look(path)
    except HostError:
        return False
    if disk.osd != uuid:
        return False
    try:
        handle = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            # The label last: while it is there, the disk can be told to be this OSD's.
            _zero(handle, 1 << 20, min(_HEAD, disk.size))
            _zero(handle, max(0, disk.size - _TAIL), disk.size)
            os.fsync(handle)
            _zero(handle, 0, 1 << 20)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise HostError(f"cannot erase {path}: {error.strerror}") from None
    return True


def _zero(handle: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(handle, bytes(min(1 << 20, end - start)), start)


def lasting(path: str) -> str:
    """A name of the disk that is the same after a reboot: one below /dev/disk/by-id where there is one."""
    real = os.path.realpath(path)
    if path.startswith("/dev/disk/") or not _BY_ID.is_dir():
        return path
    names = sorted(_BY_ID.iterdir(), key=lambda entry: (not entry.name.startswith("wwn-"), entry.name))
    return next((str(entry) for entry in names if os.path.realpath(entry) == real), path)
