"""Images that are mapped on this node: what the connector does about devices, whatever the way."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat as modes
from pathlib import Path

from atoll.model.errors import Conflict, HostError, NotSupported
from atoll.storage.rbd.mapping import choice, records
from atoll.storage.rbd.mapping.way import Image

#: Where guests find their devices: nodes of their own, which udev knows nothing of and gives to nobody else.
_DEVICES = Path("/dev/atoll")


def attach(image: Image) -> tuple[str, str]:
    """Map it, by the best way that can; its device, and how it was done. Mapped already is success.

    Errors: Conflict (mapped with the other mode), NotFound, PoolUnavailable, HostError (this node has no way), DeadlineExceeded.
    """
    with records.locked(image.volume):
        record = records.find(image.volume)
        if record is not None and record.image.read_only != image.read_only:
            mode = "to be read only" if record.image.read_only else "to be written"
            raise Conflict(f"volume {image.volume} is mapped here already, {mode}", hint="atoll instance deactivate-disks INSTANCE")
        if record is not None and record.image == image:
            with contextlib.suppress(NotSupported):
                return choice.named(record.way).map(image), record.way
        elif record is not None:
            # It has been renamed, or is another user's by now: what is left of the old mapping is of no use.
            _end(record)
        refused: NotSupported | None = None
        for way in choice.usable():
            # Before anything is done: a killed agent's successor must find it.
            records.keep(records.Record(image=image, way=way.name))
            try:
                return way.map(image), way.name
            except NotSupported as error:
                refused = error
        records.drop(image.volume)
        assert refused is not None
        raise refused


def detach(volume: str) -> str:
    """End a volume's mapping; not mapped is success. Why what was written last may be lost, as ``Way.unmap`` tells.

    Errors: DiskInUse, HostError, DeadlineExceeded."""
    if records.find(volume) is None:
        return ""
    with records.locked(volume):
        record = records.find(volume)
        if record is None:
            return ""
        lost = _end(record)
        records.drop(volume)
        return lost


def _end(record: records.Record) -> str:
    (_DEVICES / record.image.volume).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _DEVICES.rmdir()
    return choice.named(record.way).unmap(record.image)


def resize(volume: str, size: int) -> int | None:
    """Let the device of a volume grow; its size in bytes, None where it is not mapped. Errors: HostError, DeadlineExceeded."""
    if records.find(volume) is None:
        return None
    with records.locked(volume):
        record = records.find(volume)
        return None if record is None else choice.named(record.way).resize(record.image, size)


def give(volume: str, device: str) -> str:
    """A path to the device for guests, who run as a user of their own; gone when it is unmapped. Errors: HostError."""
    path = _DEVICES / volume
    try:
        number = os.stat(device).st_rdev
        _DEVICES.mkdir(mode=0o711, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mknod(path, modes.S_IFBLK | 0o600, number)
        owner = os.environ.get("ATOLL_GUEST_USER", "")
        with contextlib.suppress(KeyError):
            if owner and os.geteuid() == 0:
                account = pwd.getpwnam(owner)
                os.chown(path, account.pw_uid, account.pw_gid)
    except OSError as error:
        raise HostError(f"{path}, by which guests reach {device}, cannot be made: {error.strerror}") from None
    return str(path)


def volumes() -> list[str]:
    """The volumes that are mapped here, or were to be. Errors: HostError."""
    return [record.image.volume for record in records.everything()]
