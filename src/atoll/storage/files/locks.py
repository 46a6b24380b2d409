"""QEMU's locks on image files: open-file-description locks on single bytes (block/file-posix.c).

A guest that writes an image holds byte 100 + 1 (permission WRITE) and the bytes of what it does not share from 200 on. Whoever tests the
byte from another open file sees it, on any node whose file system carries locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
#: struct flock on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hh4xqqi4x"
PERMISSION, UNSHARED, WRITE = 100, 200, 1


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


def lock_for_writing(fd: int) -> bool:
    """Take the locks of a writer on an open file, which keeps them until it is closed. False: somebody else writes."""
    try:
        for byte in (PERMISSION + WRITE, UNSHARED + WRITE):
            fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
    except BlockingIOError:
        return False
    return not writer_seen(fd)


def writer_seen(fd: int) -> bool:
    """Whether somebody else has the file open as a writer."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(fcntl.F_WRLCK, PERMISSION + WRITE))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def holders(fd: int) -> list[str]:
    """Processes of this node that have the file open, in words: the best that can be said of who a writer is."""
    wanted = os.fstat(fd)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            for handle in (process / "fd").iterdir():
                status = handle.stat()
                if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(f"{(process / 'comm').read_text().strip()} (pid {process.name})")
                    break
        except OSError:
            # The process or the handle went away while we looked, or it is not ours to see.
            continue
    return found
