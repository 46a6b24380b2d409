"""The directory of a local store: private, on a local file system, used by one process at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from atoll.model.errors import HostError, InUse, StoreError, StoreLocked
from atoll.runtime.files import fsync_dir, lock_exclusively

#: f_type of statfs(2) -> name: file systems whose locks or fsync cannot be trusted across machines.
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2/3",
    0x65735546: "FUSE (such as glusterfs, ceph-fuse, sshfs, virtiofs)",
    0x00C36400: "Ceph",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x01021997: "9P",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
}


def file_system_type(path: Path) -> int:
    """``f_type`` of statfs(2) for an existing path, as an unsigned 32-bit number. Errors: StoreError."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct statfs begins with f_type on Linux; it is a long on every 64-bit architecture of Debian but s390x. 256 bytes are ample.
    buffer = (ctypes.c_long * 32)()
    if libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        raise StoreError(f"cannot look at the file system of {path}: {os.strerror(ctypes.get_errno())}")
    return int(buffer[0]) & 0xFFFFFFFF


def prepare_directory(directory: Path, statfs: Callable[[Path], int] = file_system_type) -> None:
    """Make the directory (0700) if needed, and refuse network file systems. Errors: StoreError."""
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700)
            fsync_dir(path.parent)
        directory.chmod(0o700)
    except OSError as error:
        raise StoreError(f"cannot make the store's directory {directory}: {error.strerror}") from None
    except HostError as error:
        raise StoreError(error.message) from None
    name = NETWORK_FILE_SYSTEMS.get(statfs(directory))
    if name is not None:
        raise StoreError(
            f"{directory} is on a network file system, {name}: its locks cannot keep two masters apart",
            hint="set state_dir in atoll.toml to a directory on a local disk; for several masters use the etcd store",
        )


def create_private(path: Path) -> None:
    """Make an empty file with mode 0600 unless it exists; durable. Errors: StoreError."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
        fsync_dir(path.parent)
    except OSError as error:
        raise StoreError(f"cannot make {path}: {error.strerror}") from None
    except HostError as error:
        raise StoreError(error.message) from None


def lock_directory(directory: Path) -> int:
    """Lock the directory for this process; the file descriptor holds the lock until it is closed. Errors: StoreLocked, StoreError."""
    try:
        return lock_exclusively(directory / "lock")
    except InUse as error:
        holder = error.details["pid"]
        raise StoreLocked(
            f"process {holder} uses the store in {directory}", hint=f"stop the other master first; see: ps {holder}", pid=holder
        ) from None
    except HostError as error:
        raise StoreError(error.message) from None
