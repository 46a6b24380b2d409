"""Disks of the fake hypervisor's guests: QEMU's byte locks, the ring of records, what is data and what is a hole."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from atoll.hypervisor.fakeloop import CHUNK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

SLOTS, RECORD = 2048, 512
MAGIC = b"CTRREC01"
#: QEMU's byte locks (block/file-posix.c), and the bits of its permissions that guests' disks need.
PERM_BASE, SHARED_BASE = 100, 200
CONSISTENT_READ, WRITE = 0, 1


class Refused(Exception):
    """An order that cannot be carried out: the error class for the other side, and its message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def record(n: int) -> bytes:
    """Record ``n`` as it stands on the disk, 512 bytes."""
    return (MAGIC + struct.pack("<QQ", n, n ^ 0xFFFFFFFFFFFFFFFF)).ljust(RECORD, b"\0")


def newest(ring: bytes) -> int:
    """The highest valid record of a ring, 0 if there is none."""
    top = 0
    for at in range(0, len(ring) - RECORD + 1, RECORD):
        magic, n, inverse = struct.unpack_from("<8sQQ", ring, at)
        if magic == MAGIC and n ^ inverse == 0xFFFFFFFFFFFFFFFF:
            top = max(top, n)
    return top


class Disk:
    """A disk of the guest, as GuestDisk describes it; ``fd`` is -1 while it is closed (before a migration has arrived, after it left)."""

    def __init__(self, data: dict[str, Any]) -> None:
        attached = data.get("attached") or {}
        node = attached.get("blockdev") or {}
        self.locking = node.get("locking", "auto") != "off"
        while isinstance(node.get("file"), dict):
            node = node["file"]
            self.locking = self.locking and node.get("locking", "auto") != "off"
        self.volume, self.slot, self.size, self.writes = str(data["volume"]), int(data["slot"]), int(data["size"]), data.get("mode") != "ro"
        self.path, self.fd = str(attached.get("path") or node.get("filename") or ""), -1
        if not self.path:
            raise Refused("guest_error", f"{self.volume} is not attached: it has no path")

    def open(self, fill: bool = False) -> None:
        """Open and lock it; open already = nothing to do. ``fill``: its contents will come over a stream, even if the guest may only
        read them. Errors: Refused, also when somebody else writes."""
        if self.fd >= 0:
            return
        try:
            self.fd = os.open(self.path, (os.O_RDWR if self.writes or fill else os.O_RDONLY) | os.O_CLOEXEC)
            if self.locking:
                self._lock()
        except OSError as error:
            self.close()
            raise Refused("guest_error", f"Could not open '{self.path}': {error.strerror}") from None

    def close(self) -> None:
        """Close it; its locks go with it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _lock(self) -> None:
        # As QEMU: shared locks on what we do and on what we do not let others do, then look whether somebody else's contradict.
        for byte in (PERM_BASE + CONSISTENT_READ, SHARED_BASE + WRITE, *((PERM_BASE + WRITE,) if self.writes else ())):
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        taken = {SHARED_BASE + CONSISTENT_READ: "consistent read", PERM_BASE + WRITE: 'shared "write"'}
        for byte, what in {**taken, **({SHARED_BASE + WRITE: '"write"'} if self.writes else {})}.items():
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if struct.unpack("hhqqi4x", fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                self.close()
                raise Refused("disk_in_use", f"Failed to get {what} lock: is another process using the image [{self.path}]?")

    def extents(self) -> Generator[tuple[int, int, bool], None, None]:
        """Offset, length, and whether there is data, in pieces of at most one chunk where there is."""
        at, end = 0, os.lseek(self.fd, 0, os.SEEK_END)
        while at < end:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
                hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            except OSError as error:
                # ENXIO: only a hole is left; else a device that cannot tell: all of it is data
                data, hole = (end, end) if error.errno == errno.ENXIO else (at, end)
            if data > at:
                yield at, data - at, False
            for begin in range(data, hole, CHUNK):
                yield begin, min(CHUNK, hole - begin), True
            at = hole

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, leaving what is a hole a hole."""
        for at, size, data in list(self.extents()):
            begin, stop = max(at, offset), min(at + size, offset + length)
            if data and begin < stop:
                os.pwrite(self.fd, bytes(stop - begin), begin)
