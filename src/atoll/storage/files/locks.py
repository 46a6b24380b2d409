"""QEMU's locks on image files: open-file-description locks on single bytes (block/file-posix.c).

A guest that writes an image holds byte 100 + 1 (permission WRITE) and the bytes of what it does not share from 200 on. Whoever tests the
byte from another open file sees it, on any node whose file system carries locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from atoll.model.errors import PoolUnavailable

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
#: struct flock on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hh4xqqi4x"
PERMISSION, UNSHARED, WRITE = 100, 200, 1
#: What a file system says that cannot lock.
_CANNOT = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


def explained(error: OSError) -> OSError | PoolUnavailable:
    """The error, or what it means when the file system cannot lock."""
    if error.errno in _CANNOT:
        return PoolUnavailable(f"the file system cannot lock files: {error.strerror}", hint="use another one, or the option locking=off")
    return error


def lock_for_writing(fd: int) -> bool:
    """Take the locks of a writer on an open file, which keeps them until it is closed. False: somebody else writes."""
    try:
        for byte in (PERMISSION + WRITE, UNSHARED + WRITE):
            fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
    except BlockingIOError:
        return False
    except OSError as error:
        raise explained(error) from None
    return not writer_seen(fd)


def writer_seen(fd: int) -> bool:
    """Whether somebody else has the file open as a writer. Errors: PoolUnavailable (the file system cannot lock)."""
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(fcntl.F_WRLCK, PERMISSION + WRITE))
    except OSError as error:
        raise explained(error) from None
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def holders(fd: int) -> list[str]:
    """Processes of this node that hold a writer's lock on the file, in words: the best that can be said of who a writer is."""
    inode = os.fstat(fd).st_ino
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # What the kernel says of its handles, and not the handles: one of them may lie on storage that hangs.
            if any(_holds(handle.read_text(), inode) for handle in (process / "fdinfo").iterdir()):
                found.append(f"{(process / 'comm').read_text().strip()} (pid {process.name})")
        except OSError:
            # The process went away while we looked, or is not ours to see.
            continue
    return found


def _holds(fdinfo: str, inode: int) -> bool:
    """Whether a handle holds a writer's lock: ``lock: 1: OFDLCK ADVISORY READ -1 fe:00:4711 101 101``."""
    for line in fdinfo.splitlines():
        words = line.split()
        if words[:1] != ["lock:"] or len(words) < 9 or words[6].rpartition(":")[2] != str(inode) or words[2] == "FLOCK":
            continue
        if int(words[7]) <= PERMISSION + WRITE and (words[8] == "EOF" or int(words[8]) >= PERMISSION + WRITE):
            return True
    return False
