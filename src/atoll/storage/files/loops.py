"""Loop devices on images. The kernel keeps a name with each: by it, never by a remembered number, they are found again and told from
other people's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat as modes
import struct
import time
from pathlib import Path

from atoll.model.errors import Conflict, DiskInUse, HostError

_SET_FREE, _CLEAR, _CONFIGURE, _GET_STATUS, _SET_CAPACITY = 0x4C82, 0x4C01, 0x4C0A, 0x4C05, 0x4C07
_READ_ONLY, _PARTITIONS, _DIRECT = 1, 8, 16
_MAJOR = 7
#: struct loop_info64 (include/uapi/linux/loop.h), and struct loop_config around it.
_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
_CONFIG = struct.Struct("=II232s64x")
#: Seconds for whoever still has a device open to let go of it.
PATIENCE = 15.0


def _machine() -> str:
    """Which node this is, in names of loop devices: nodes in containers share one kernel, and its devices."""
    try:
        return Path("/etc/machine-id").read_text().strip()[:32] or os.uname().nodename[:32]
    except OSError:
        return os.uname().nodename[:32]


def _name(volume: str, machine: str) -> bytes:
    """The name of a node's mapping of a volume; the kernel keeps 63 bytes."""
    return f"atoll:{volume}:{machine}".encode()[:63]


def _parts(name: bytes) -> tuple[str, str] | None:
    """Machine and volume of a mapping of ours; None for any other loop device."""
    word, _, rest = name.rstrip(b"\0").decode(errors="replace").partition(":")
    volume, colon, machine = rest.partition(":")
    return (machine, volume) if word == "atoll" and colon else None


def _status(device: int) -> tuple[tuple[int, int], int, bytes] | None:
    """What an open loop device is on: (device, inode) of the file, flags and name; None when it is free, or when the kernel does not tell:
    the file is one that a process showed (FUSE), and that has died."""
    data = bytearray(_INFO.size)
    try:
        fcntl.ioctl(device, _GET_STATUS, data)
    except OSError as error:
        # ENOTCONN: what it is on has gone (a FUSE file system whose process died). It is none of ours, and must not hide the others.
        if error.errno in (errno.ENXIO, errno.ENOTCONN):
            return None
        raise
    fields = _INFO.unpack(data)
    return (fields[0], fields[1]), fields[8], fields[9]


def _open(number: int, flags: int = os.O_RDONLY) -> int:
    """The device. Where no daemon makes nodes (a container), it is made. Errors: OSError."""
    path = f"/dev/loop{number}"
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mknod(path, modes.S_IFBLK | 0o660, os.makedev(_MAJOR, number))
        return os.open(path, flags | os.O_CLOEXEC)


def everybodys() -> dict[tuple[str, str], int]:
    """(machine id, volume) -> the number of its loop device, of all mappings on this kernel. Errors: HostError."""
    found = {}
    for entry in Path("/sys/block").glob("loop*"):
        if not (entry / "loop").is_dir():
            continue
        number = int(entry.name.removeprefix("loop"))
        try:
            device = _open(number)
        except OSError:
            continue  # it has gone meanwhile
        try:
            status = _status(device)
            parts = _parts(status[2]) if status else None
        finally:
            os.close(device)
        if parts:
            found[parts] = number
    return found


def mapped(machine: str | None = None) -> dict[str, int]:
    """Volume -> the number of its loop device, of this node's mappings (or another one's). Errors: HostError."""
    wanted = machine or _machine()
    return {volume: number for (found, volume), number in everybodys().items() if found == wanted}


def _sequence(number: int) -> int:
    """A number that the kernel gives to a disk when it is made, and to no other until it boots again; 0 = there is no such device, or it is
    free."""
    place = Path(f"/sys/block/loop{number}")
    try:
        return int((place / "diskseq").read_text()) if (place / "loop").is_dir() else 0
    except (OSError, ValueError):
        return 0


def note(device: str, path: Path) -> None:
    """Write down which device it is: the kernel does not tell its name any more once the process has died that shows its file (FUSE)."""
    number = int(device.removeprefix("/dev/loop"))
    path.write_text(f"{number} {_sequence(number)}")


def noted(path: Path) -> int | None:
    """The number of the device that was noted, if it is that one still."""
    try:
        number, known = (int(word) for word in path.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return number if known and _sequence(number) == known else None


def drop(path: Path, patience: float = PATIENCE) -> None:
    """End the mapping that was noted; gone is success. Errors: DiskInUse, HostError."""
    end = time.monotonic() + patience
    while (number := noted(path)) is not None:
        _clear(number)
        if noted(path) is not None and time.monotonic() > end:
            raise DiskInUse(f"/dev/loop{number} is still in use", hint=f"fuser -vm /dev/loop{number}; then try again")
        time.sleep(0.02)


def _clear(number: int) -> None:
    try:
        device = _open(number)
        try:
            fcntl.ioctl(device, _CLEAR)
        finally:
            os.close(device)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EBUSY, errno.ENOENT):
            raise HostError(f"/dev/loop{number} cannot be detached: {error.strerror}") from None


def attach(image: int, volume: str, *, read_only: bool, direct: bool = False) -> str:
    """The block device of an open image; the one that it has, if it is mapped already. ``direct``: the file is written past the page cache,
    which it must be able to. Errors: Conflict (mapped otherwise), HostError."""
    try:
        number = mapped().get(volume)
        if number is None:
            number = _new(image, volume, read_only, direct)
        else:
            _check_same(number, image, volume, read_only)
        return f"/dev/loop{number}"
    except OSError as error:
        raise HostError(f"no loop device for {volume}: {error.strerror}", hint="modprobe loop; losetup --list") from None


def resize(volume: str) -> int:
    """Let a mapping be as large as its file is now, while it is in use; bytes. Errors: HostError (not mapped, too)."""
    number = mapped().get(volume)
    try:
        if number is None:
            raise FileNotFoundError(errno.ENOENT, "it is not mapped")
        device = _open(number)
        try:
            fcntl.ioctl(device, _SET_CAPACITY)
            return os.lseek(device, 0, os.SEEK_END)
        finally:
            os.close(device)
    except OSError as error:
        raise HostError(f"the loop device of {volume} does not grow: {error.strerror}", hint="losetup --list") from None


def _check_same(number: int, image: int, volume: str, read_only: bool) -> None:
    device = _open(number)
    try:
        status, file = _status(device), os.fstat(image)
    finally:
        os.close(device)
    if status is None or status[0][1] != file.st_ino or bool(status[1] & _READ_ONLY) != read_only:
        raise Conflict(f"volume {volume} is mapped as /dev/loop{number} in another way", hint=f"losetup --list /dev/loop{number}")


def _new(image: int, volume: str, read_only: bool, direct: bool) -> int:
    flags = _PARTITIONS | (_READ_ONLY if read_only else 0) | (_DIRECT if direct else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, _name(volume, _machine()), b"", b"", 0, 0)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Somebody else may take the free one between the two calls.
        for _ in range(20):
            number = fcntl.ioctl(control, _SET_FREE)
            device = _open(number, os.O_RDONLY if read_only else os.O_RDWR)
            try:
                fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(image, 0, info))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                continue
            finally:
                os.close(device)
            return number
    finally:
        os.close(control)
    raise HostError("no loop device stays free long enough to be used", hint="losetup --list")


def detach(volume: str, patience: float = PATIENCE, machine: str | None = None, *, flush: bool = True) -> None:
    """End a volume's mapping, with all that was written through it on the disk (but for ``flush`` False); not mapped is success.

    Errors: DiskInUse (somebody has the device open or mounted; it goes when they let go, and what is written until then is the
    volume's), HostError.
    """
    end = time.monotonic() + patience
    asked = False
    while (number := mapped(machine).get(volume)) is not None:
        try:
            device = _open(number)
            try:
                if flush and not asked:
                    # An error of an earlier write is told here, or never.
                    os.fsync(device)
                    asked = True
                fcntl.ioctl(device, _CLEAR)
            finally:
                os.close(device)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EBUSY, errno.ENOENT):
                raise HostError(f"/dev/loop{number} of {volume} cannot be detached: {error.strerror}") from None
        if mapped(machine).get(volume) is None:
            return
        if time.monotonic() > end:
            raise DiskInUse(
                f"/dev/loop{number} of volume {volume} is still in use", hint=f"umount it; fuser -vm /dev/loop{number}; then try again"
            )
        # Nothing tells when the last user of a device has gone.
        time.sleep(0.05)
