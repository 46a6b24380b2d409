"""Images as regular files, relative to an open directory: found, looked at, renamed and removed durably, never through symlinks."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat as modes
from collections.abc import Iterator

from atoll.model.errors import Conflict, DiskInUse, InvalidInput, NotFound
from atoll.model.messages import VolumeStat, Writer
from atoll.storage.files import locks

#: What begins the names of files that are not finished.
TEMPORARY = ".atoll-tmp-"
_VOLUME = re.compile(r"^vol-[0-9a-f]{17}$")
_OURS = re.compile(r"^(?P<name>.+)\.(?P<volume>vol-[0-9a-f]{17})\.raw$")
_QCOW2 = b"QFI\xfb"


def image_name(name: str, volume: str) -> str:
    """The name of a volume's image. Errors: InvalidInput."""
    if not _VOLUME.match(volume):
        raise InvalidInput(f"{volume!r} is not the id of a volume")
    return check_plain(f"{name}.{volume}.raw")


def volume_of(logical_id: str) -> str | None:
    """The volume id in the name of an image, or of one that is being made; None for other people's files."""
    rest = logical_id.removeprefix(TEMPORARY)
    if rest != logical_id and _VOLUME.match(rest):
        return rest
    match = _OURS.match(rest)
    return match["volume"] if match else None


def check_plain(logical_id: str) -> str:
    """A logical id is the plain name of a file in the pool's directory. Errors: InvalidInput."""
    if not logical_id or "/" in logical_id or "\0" in logical_id or logical_id.startswith("."):
        raise InvalidInput(f"{logical_id!r} is not the name of an image", hint="give the plain name of a file in the pool's directory")
    return logical_id


@contextlib.contextmanager
def opened(directory: int, logical_id: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An open image. Errors: NotFound, Conflict (a symlink, or no regular file)."""
    try:
        # Not blocking: somebody may have put a pipe there.
        fd = os.open(check_plain(logical_id), flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise NotFound(f"there is no image {logical_id}", hint="atoll cluster verify") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_file(logical_id, _status(directory, logical_id)) from None
        raise
    try:
        if not modes.S_ISREG(os.fstat(fd).st_mode):
            raise _no_file(logical_id, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _status(directory: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _kind(status: os.stat_result | None) -> str:
    """What is there in place of a file; empty for a file."""
    tests = ((modes.S_ISREG, ""), (modes.S_ISLNK, "a symbolic link"), (modes.S_ISDIR, "a directory"))
    return next((what for test, what in tests if status is not None and test(status.st_mode)), "a special file")


def _no_file(name: str, status: os.stat_result | None) -> Conflict:
    """Somebody has put something else where an image should be. A link may lead anywhere: none is followed."""
    return Conflict(f"{name} is {_kind(status)}, not an image; nothing is read or written through it", hint="atoll cluster verify")


def _as_stat(name: str, status: os.stat_result) -> VolumeStat:
    return VolumeStat(
        logical_id=name, size=status.st_size, allocated=status.st_blocks * 512, volume=volume_of(name), modified=status.st_mtime
    )


def describe(directory: int, logical_id: str) -> VolumeStat | None:
    """What the file system says of an image, a half-made one too; None when it is not there."""
    name = logical_id if logical_id.startswith(TEMPORARY) and "/" not in logical_id else check_plain(logical_id)
    status = _status(directory, name)
    if status is not None and not modes.S_ISREG(status.st_mode):
        raise _no_file(logical_id, status)
    return None if status is None else _as_stat(name, status)


def everything(directory: int) -> list[VolumeStat]:
    """All regular files but our own marks; half-made images too, under their temporary names."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name.startswith(".") and not name.startswith(TEMPORARY):
            continue
        status = _status(directory, name)
        if status is not None and modes.S_ISREG(status.st_mode):
            found.append(_as_stat(name, status))
    return found


def find(directory: int, volume: str) -> str | None:
    """The finished image of a volume, whatever its name part."""
    end = f".{volume}.raw"
    ours = [name for name in os.listdir(directory) if name.endswith(end)]
    return min((name for name in ours if not name.startswith(".") and volume_of(name) == volume), default=None)


def delete(directory: int, logical_id: str, *, locking: bool) -> None:
    """Remove a finished image durably; missing is success. Errors: DiskInUse."""
    try:
        with opened(directory, logical_id) as fd:
            refuse_writer(fd, logical_id, locking=locking)
    except NotFound:
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(logical_id, dir_fd=directory)
    os.fsync(directory)


def refuse_writer(fd: int, logical_id: str, *, locking: bool) -> None:
    """Errors: DiskInUse when somebody writes the image."""
    if locking and locks.writer_seen(fd):
        who = ", ".join(locks.holders(fd)) or "a process on another node"
        raise DiskInUse(f"{logical_id} is open for writing: {who}")


def rename(directory: int, logical_id: str, volume: str, name: str, *, locking: bool) -> str:
    """Let the image's name follow its volume's; repeating it is success. An empty logical id means: find it by its volume.

    Errors: NotFound, DiskInUse, Conflict (another volume's image, or there are two of this one).
    """
    wanted = image_name(name, volume)
    present = logical_id if logical_id and _status(directory, check_plain(logical_id)) else find(directory, volume)
    if present is None:
        raise NotFound(f"there is no image of {volume}", hint="atoll cluster verify")
    if present == wanted:
        return wanted
    if volume_of(present) not in (None, volume):
        raise Conflict(f"{present} is the image of {volume_of(present)}, not of {volume}", hint="atoll cluster verify")
    if _status(directory, wanted) is not None:
        raise Conflict(f"{volume} has two images, {present} and {wanted}", hint="atoll cluster verify")
    with opened(directory, present) as fd:
        refuse_writer(fd, present, locking=locking)
    os.rename(present, wanted, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
    return wanted


def adopt(directory: int, source: str, *, locking: bool) -> VolumeStat:
    """Look at an image that shall become a volume. Errors: NotFound, InvalidInput, Conflict (it is no file), DiskInUse."""
    with opened(directory, source) as fd:
        status = os.fstat(fd)
        if os.pread(fd, 4, 0) == _QCOW2:
            raise InvalidInput(f"{source} is a qcow2 image; only raw images can be adopted", hint=f"qemu-img convert -O raw {source} NEW")
        if status.st_size == 0 or status.st_size % 512:
            raise InvalidInput(f"{source} has {status.st_size} bytes; a disk has a multiple of 512", hint=f"truncate -s %512 {source}")
        refuse_writer(fd, source, locking=locking)
    return _as_stat(source, status)


def writers(directory: int, logical_id: str) -> list[Writer]:
    """Who writes it, as its locks tell."""
    with opened(directory, logical_id) as fd:
        if not locks.writer_seen(fd):
            return []
        return [Writer(who=who) for who in locks.holders(fd) or ["a process on another node"]]
