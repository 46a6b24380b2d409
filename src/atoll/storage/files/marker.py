"""The mark of a pool: a small file that says whose directory this is. Where it is missing, the share is not mounted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat as modes

from atoll.model.errors import Conflict
from atoll.model.messages import PoolRef
from atoll.storage.files.mountinfo import mount_of

MARKER = ".atoll-pool"
#: Bytes of a mark at most; more is not ours.
_LIMIT = 4096


def read(directory: int) -> dict[str, str] | None:
    """The mark in an open directory, None when there is none. Errors: Conflict when the file is not a mark."""
    unreadable = Conflict(f"the file {MARKER} is not the mark of a pool", hint=f"look at {MARKER}; remove it if the directory is free")
    try:
        fd = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise unreadable from None
        raise
    try:
        if not modes.S_ISREG(os.fstat(fd).st_mode):
            raise unreadable
        mark = json.loads(os.pread(fd, _LIMIT, 0))
    except ValueError:
        raise unreadable from None
    finally:
        os.close(fd)
    if not isinstance(mark, dict):
        raise unreadable
    return mark


def check_owner(mark: dict[str, str], ref: PoolRef, path: str) -> None:
    """Errors: Conflict, saying whose it is, when the mark is another pool's."""
    if mark.get("pool") != ref.id:
        cluster = "" if mark.get("cluster") == ref.cluster else " of another cluster"
        raise Conflict(
            f"{path} belongs to pool {mark.get('name', '?')} ({mark.get('pool', '?')}){cluster}",
            hint=f"choose another directory; if that pool is gone, remove {path}/{MARKER}",
        )


def write(directory: int, ref: PoolRef, path: str) -> None:
    """Mark the directory, durably; marked already is success. Errors: Conflict (another pool's)."""
    present = read(directory)
    if present is not None:
        check_owner(present, ref, path)
        return
    mount = mount_of(directory)
    mark = {"pool": ref.id, "cluster": ref.cluster, "name": ref.name, "mount": mount.point, "fstype": mount.fstype}
    partial = f"{MARKER}.{secrets.token_hex(6)}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        os.write(fd, json.dumps(mark).encode())
        os.fsync(fd)
        _place(directory, partial)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=directory)
    os.fsync(directory)
    placed = read(directory)
    if placed is not None:
        check_owner(placed, ref, path)


def _place(directory: int, partial: str) -> None:
    """Give the mark its name, unless somebody was faster: of two pools that mark one directory, one must lose."""
    try:
        os.link(partial, MARKER, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        # File systems without hard links.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        os.rename(partial, MARKER, src_dir_fd=directory, dst_dir_fd=directory)


def remove(directory: int, ref: PoolRef) -> bool:
    """Remove this pool's mark; another's stays, and none is success. Whether it was there."""
    mark = read(directory)
    if mark is None or mark.get("pool") != ref.id:
        return False
    os.unlink(MARKER, dir_fd=directory)
    os.fsync(directory)
    return True
