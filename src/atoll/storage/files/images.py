"""Images as regular files, relative to an open directory: made and removed durably, never through symlinks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import stat as modes
from collections.abc import Iterator

from atoll.model.errors import Conflict, DiskInUse, InvalidInput, NotFound, PoolFull, ShrinkRefused
from atoll.model.messages import VolumeStat, Writer
from atoll.model.units import MIB, check_size, format_size
from atoll.storage.files import locks

#: What stays free on the file system when an image is made, in bytes: a full file system helps nobody.
RESERVE = 64 * MIB
_TEMPORARY = ".atoll-tmp-"
_OURS = re.compile(r"^(?P<name>.+)\.(?P<volume>vol-[0-9a-f]{17})\.raw$")
_QCOW2 = b"QFI\xfb"


def image_name(name: str, volume: str) -> str:
    """The name of a volume's image."""
    return f"{name}.{volume}.raw"


def volume_of(logical_id: str) -> str | None:
    """The volume id in an image's name, None for other people's files."""
    match = _OURS.match(logical_id)
    return match["volume"] if match else None


def check_plain(logical_id: str) -> str:
    """A logical id is the plain name of a file in the pool's directory. Errors: InvalidInput."""
    if not logical_id or "/" in logical_id or "\0" in logical_id or logical_id.startswith("."):
        raise InvalidInput(f"{logical_id!r} is not the name of an image", hint="give the plain name of a file in the pool's directory")
    return logical_id


@contextlib.contextmanager
def opened(directory: int, logical_id: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An open image. Errors: NotFound, InvalidInput (a symlink, or no regular file)."""
    try:
        fd = os.open(check_plain(logical_id), flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise NotFound(f"there is no image {logical_id}", hint="atoll cluster verify") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InvalidInput(f"{logical_id} is not a regular file") from None
        raise
    try:
        if not modes.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{logical_id} is not a regular file")
        yield fd
    finally:
        os.close(fd)


def describe(directory: int, logical_id: str) -> VolumeStat | None:
    """What the file system says of an image; None when it is not there."""
    try:
        status = os.stat(check_plain(logical_id), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not modes.S_ISREG(status.st_mode):
        raise InvalidInput(f"{logical_id} is not a regular file")
    return VolumeStat(
        logical_id=logical_id,
        size=status.st_size,
        allocated=status.st_blocks * 512,
        volume=volume_of(logical_id),
        modified=status.st_mtime,
    )


def everything(directory: int) -> list[VolumeStat]:
    """All regular files but our own marks; half-made images too, under their temporary names."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name.startswith(".") and not name.startswith(_TEMPORARY):
            continue
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if modes.S_ISREG(status.st_mode):
            volume = name.removeprefix(_TEMPORARY) if name.startswith(_TEMPORARY) else volume_of(name)
            allocated = status.st_blocks * 512
            found.append(VolumeStat(logical_id=name, size=status.st_size, allocated=allocated, volume=volume, modified=status.st_mtime))
    return found


def find(directory: int, volume: str) -> str | None:
    """The finished image of a volume, whatever its name part."""
    return next((name for name in os.listdir(directory) if volume_of(name) == volume), None)


def create(directory: int, name: str, volume: str, size: int, preallocation: str, owner: str) -> str:
    """Make an image of ``size`` bytes: temporary file, size, fsync, rename, fsync of the directory. Gives its logical id.

    Errors: Conflict (exists with another size), PoolFull (nothing is left then), InvalidSize, DiskInUse (another call is making it).
    """
    check_size(size)
    present = find(directory, volume)
    if present is not None:
        found = describe(directory, present)
        if found is not None and found.size == size:
            return present
        raise Conflict(f"{present} exists with {found.size if found else 0} bytes, not {size}", hint="atoll cluster verify")
    _check_room(directory, size if preallocation != "off" else 0)
    final, partial = check_plain(image_name(name, volume)), _TEMPORARY + volume
    _clear(directory, partial)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _give(fd, owner)
        _allocate(fd, 0, size, preallocation)
        os.fsync(fd)
        os.rename(partial, final, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=directory)
        raise
    finally:
        os.close(fd)
    return final


def _check_room(directory: int, size: int) -> None:
    space = os.fstatvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < size + RESERVE:
        wanted = f"{format_size(size)} and " if size else ""
        raise PoolFull(f"only {format_size(free)} are free; {wanted}a reserve of {format_size(RESERVE)} are needed")


def _clear(directory: int, partial: str) -> None:
    """Remove what an interrupted creation left; one that is under way holds its lock."""
    try:
        fd = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(partial, dir_fd=directory)
    except BlockingIOError:
        raise DiskInUse(f"{partial} is being made by another process", hint="try again in a moment") from None
    finally:
        os.close(fd)


def _give(fd: int, owner: str) -> None:
    os.fchmod(fd, 0o660)
    if owner and os.geteuid() == 0:
        try:
            user = pwd.getpwnam(owner)
        except KeyError:
            raise InvalidInput(
                f"this node has no user {owner!r}, as which guests shall run", hint=f"useradd --system {owner}, or set guest_user"
            ) from None
        os.fchown(fd, user.pw_uid, user.pw_gid)


def _allocate(fd: int, start: int, size: int, preallocation: str) -> None:
    if preallocation != "off" and size > start:
        os.posix_fallocate(fd, start, size - start)
    if preallocation == "full":
        zeros = bytes(4 * MIB)
        for at in range(start, size, len(zeros)):
            os.pwrite(fd, zeros[: min(len(zeros), size - at)], at)
    os.ftruncate(fd, size)


def delete(directory: int, logical_id: str) -> None:
    """Remove an image durably; missing is success. Errors: DiskInUse."""
    name = logical_id if logical_id.startswith(_TEMPORARY) else check_plain(logical_id)
    if name.startswith(_TEMPORARY):
        _clear(directory, name)
        return
    try:
        with opened(directory, name) as fd:
            refuse_writer(fd, name)
    except NotFound:
        return
    os.unlink(name, dir_fd=directory)
    os.fsync(directory)


def refuse_writer(fd: int, logical_id: str) -> None:
    """Errors: DiskInUse when somebody writes the image."""
    if locks.writer_seen(fd):
        who = ", ".join(locks.holders(fd)) or "a process on another node"
        raise DiskInUse(f"{logical_id} is open for writing: {who}")


def grow(directory: int, logical_id: str, size: int, preallocation: str) -> int:
    """Make it at least ``size`` bytes. Errors: NotFound, ShrinkRefused, PoolFull."""
    check_size(size)
    with opened(directory, logical_id, os.O_RDWR) as fd:
        present = os.fstat(fd).st_size
        if size < present:
            raise ShrinkRefused(f"{logical_id} has {format_size(present)}; it cannot shrink to {format_size(size)}")
        if size > present:
            _check_room(directory, size - present if preallocation != "off" else 0)
            _allocate(fd, present, size, preallocation)
            os.fsync(fd)
        return size


def rename(directory: int, volume: str, name: str) -> str:
    """Let the image's name follow its volume's; repeating it is success. Errors: NotFound, DiskInUse."""
    present = find(directory, volume)
    if present is None:
        raise NotFound(f"there is no image of {volume}", hint="atoll cluster verify")
    wanted = check_plain(image_name(name, volume))
    if present != wanted:
        with opened(directory, present) as fd:
            refuse_writer(fd, present)
        os.rename(present, wanted, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    return wanted


def adopt(directory: int, source: str) -> VolumeStat:
    """Look at an image that shall become a volume. Errors: NotFound, InvalidInput, DiskInUse."""
    with opened(directory, source) as fd:
        status = os.fstat(fd)
        if os.pread(fd, 4, 0) == _QCOW2:
            raise InvalidInput(f"{source} is a qcow2 image; only raw images can be adopted", hint=f"qemu-img convert -O raw {source} NEW")
        if status.st_size == 0 or status.st_size % 512:
            raise InvalidInput(f"{source} has {status.st_size} bytes; a disk has a multiple of 512", hint=f"truncate -s %512 {source}")
        refuse_writer(fd, source)
    found = describe(directory, source)
    if found is None:
        raise NotFound(f"there is no image {source}")
    return found


def writers(directory: int, logical_id: str) -> list[Writer]:
    """Who writes it, as its locks tell."""
    with opened(directory, logical_id) as fd:
        if not locks.writer_seen(fd):
            return []
        return [Writer(who=who) for who in locks.holders(fd) or ["a process on another node"]]
