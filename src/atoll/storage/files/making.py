"""Images made and grown: sized under a temporary name, durable before they get their own.

Whoever works on a temporary file holds its lock, and only who holds it may rename or remove it. So of two that make one volume (a
process of an earlier agent may still be at it) one makes it and the other is refused, or finds it finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import stat as modes
import time
from collections.abc import Iterator

from atoll.model.errors import AtollError, Conflict, DiskInUse, HostError, InvalidSize, PoolFull, ShrinkRefused
from atoll.model.units import MIB, check_size, format_size
from atoll.storage.files import locks
from atoll.storage.files.images import TEMPORARY, describe, image_name, opened, volume_of

#: What stays free on the file system when an image is made, in bytes: a full file system helps nobody.
RESERVE = 64 * MIB
#: Seconds after which a temporary file that nobody holds is a leftover.
STALE = 3600.0
_SECTOR, _CHUNK = 512, 4 * MIB


def create(directory: int, name: str, volume: str, size: int, *, preallocation: str, owner: str, locking: bool) -> str:
    """Make an image of ``size`` bytes: temporary file, size, fsync, rename, fsync of the directory. Gives its logical id.

    Errors: Conflict (exists with another size), PoolFull (nothing is left then), InvalidSize, DiskInUse (another call is making it).
    """
    _check_size(size)
    final = image_name(name, volume)
    present = _finished(directory, final, size)
    if present is not None:
        return present
    with temporary(directory, TEMPORARY + volume, locking=locking) as fd:
        present = _finished(directory, final, size)
        if present is not None:
            # Another call finished it between our first look and our lock.
            os.unlink(TEMPORARY + volume, dir_fd=directory)
            return present
        _check_room(directory, size if preallocation != "off" else 0)
        give(fd, owner)
        _allocate(fd, 0, size, preallocation)
        place(directory, fd, TEMPORARY + volume, final)
    return final


def _check_size(size: int) -> None:
    check_size(size)
    if size % _SECTOR:
        raise InvalidSize(f"the size {size} is not a multiple of {_SECTOR} bytes")


def _finished(directory: int, final: str, size: int) -> str | None:
    # By its name alone: a look through the whole directory for another name of the volume's would make each of ten thousand creations
    # slower than the one before. A volume is renamed only after its creation has ended; late copies of that are refused by the agent.
    found = describe(directory, final)
    if found is not None and found.size != size:
        raise Conflict(f"{final} exists with {found.size} bytes, not {size}", hint="atoll cluster verify")
    return final if found is not None else None


@contextlib.contextmanager
def temporary(directory: int, name: str, *, locking: bool) -> Iterator[int]:
    """A new, empty file that is ours alone, under a temporary name: ``place`` it, or it is removed when the block fails.

    What an interrupted call left under that name is used again. Errors: DiskInUse (somebody is at it), Conflict (no file of ours).
    """
    fd = _take(directory, name, locking=locking)
    try:
        os.ftruncate(fd, 0)
        yield fd
    except (OSError, AtollError):
        # Nothing is under this name if it was placed; while we hold the lock, nothing of anybody else's is.
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def place(directory: int, fd: int, name: str, final: str) -> None:
    """Make a temporary file durable and give it its name, in place of what has that name now."""
    os.fsync(fd)
    os.rename(name, final, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def _take(directory: int, name: str, *, locking: bool) -> int:
    """Open and lock a temporary file, made if needed."""
    foreign = Conflict(f"{name} is not a file of ours", hint=f"look at {name} in the pool's directory and remove it")
    for _ in range(10):
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise foreign from None
            raise
        try:
            _lock(fd, name, locking=locking)
            status = os.fstat(fd)
            if not modes.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise foreign
            if _is_named(directory, name, status):
                return fd
        except BaseException:
            os.close(fd)
            raise
        # It was placed or removed after we had opened it: look again.
        os.close(fd)
    raise DiskInUse(f"{name} is being made by another process", hint="try again in a moment")


def _lock(fd: int, name: str, *, locking: bool) -> None:
    if not locking:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DiskInUse(f"{name} is being made by another process", hint="try again in a moment") from None
    except OSError as error:
        raise locks.explained(error) from None


def _is_named(directory: int, name: str, status: os.stat_result) -> bool:
    try:
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino)


def discard(directory: int, name: str, *, locking: bool) -> None:
    """Remove a temporary file; missing is success. Errors: DiskInUse (somebody is at it)."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        _lock(fd, name, locking=locking)
        if _is_named(directory, name, os.fstat(fd)):
            os.unlink(name, dir_fd=directory)
            os.fsync(directory)
    finally:
        os.close(fd)


def clean(directory: int) -> list[str]:
    """Remove our own leftovers: temporary files that nobody has touched for an hour and nobody holds. Gives their names."""
    removed = []
    for name in os.listdir(directory):
        if not name.startswith(TEMPORARY) or volume_of(name) is None:
            continue
        with contextlib.suppress(OSError, AtollError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if modes.S_ISREG(status.st_mode) and time.time() - status.st_mtime > STALE:
                discard(directory, name, locking=True)
                removed.append(name)
    return removed


def _check_room(directory: int, size: int) -> None:
    space = os.fstatvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < size + RESERVE:
        wanted = f"{format_size(size)} and " if size else ""
        raise PoolFull(f"only {format_size(free)} are free; {wanted}a reserve of {format_size(RESERVE)} are needed")


def give(fd: int, owner: str) -> None:
    """Make an image usable by the guests' user and group alone. Errors: HostError (there is no such user)."""
    os.fchmod(fd, 0o660)
    if owner and os.geteuid() == 0:
        try:
            user = pwd.getpwnam(owner)
        except KeyError:
            raise HostError(
                f"this node has no user {owner!r}, as which guests shall run", hint=f"useradd --system {owner}, or set guest_user"
            ) from None
        os.fchown(fd, user.pw_uid, user.pw_gid)


def may_enter(path: str, owner: str) -> bool:
    """Whether the guests' user gets to files in a directory. True where that cannot be tried (we are not root, or have no such user)."""
    try:
        user = pwd.getpwnam(owner)
    except KeyError:
        return True
    if os.geteuid() != 0:
        return True
    groups, group = os.getgroups(), os.getegid()
    # As that user for one call: only the kernel knows of access lists and of what a share makes of root.
    try:
        os.setgroups(os.getgrouplist(owner, user.pw_gid))
        os.setegid(user.pw_gid)
        os.seteuid(user.pw_uid)
        return os.access(path, os.X_OK, effective_ids=True)
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _allocate(fd: int, start: int, size: int, preallocation: str) -> None:
    if preallocation != "off":
        os.posix_fallocate(fd, start, size - start)
    if preallocation == "full":
        zeros, at = bytes(_CHUNK), start
        while at < size:
            at += os.pwrite(fd, zeros[: min(_CHUNK, size - at)], at)
    os.ftruncate(fd, size)


def grow(directory: int, logical_id: str, size: int, *, preallocation: str) -> int:
    """Make it at least ``size`` bytes. Errors: NotFound, ShrinkRefused, PoolFull (it is as large as before then)."""
    _check_size(size)
    with opened(directory, logical_id, os.O_RDWR) as fd:
        present = os.fstat(fd).st_size
        if size < present:
            raise ShrinkRefused(f"{logical_id} has {format_size(present)}; it cannot shrink to {format_size(size)}")
        if size > present:
            _check_room(directory, size - present if preallocation != "off" else 0)
            try:
                _allocate(fd, present, size, preallocation)
                os.fsync(fd)
            except OSError:
                # What was added in vain; nobody has been told of it yet.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, present)
                raise
        return size
