"""Making an OSD on a raw disk, and removing it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from atoll.deploy.ceph import disks
from atoll.deploy.ceph.conf import keyring
from atoll.deploy.ceph.daemons import DATA, RUN, directory, pid_of, settle_in
from atoll.model.errors import HostError
from atoll.runtime import process
from atoll.runtime.files import write_durably

UUID = "atoll-uuid"
#: One at a time for each OSD: an earlier attempt, whose agent has died, may still be under way. ``ready`` is Ceph's own mark.
_MKFS = '[ -e "$1/ready" ] || exec ceph-osd -i "$2" --mkfs --osd-uuid "$3" --setuser ceph --setgroup ceph'


async def make_osd(args: dict[str, Any]) -> None:
    """Its directory and what is on its disk; made already is success. Errors: Conflict (something else is there), HostError."""
    number, uuid = str(args["number"]), args["uuid"]
    settle_in()
    place = directory("osd", number)
    if (place / "ready").exists() and pid_of("osd", number):
        return
    await disks.take(args["disk"], uuid)
    place.mkdir(mode=0o750, exist_ok=True)
    write_durably(place / UUID, f"{uuid}\n{args['disk']}\n", 0o644)
    write_durably(place / "keyring", keyring(f"osd.{number}", args["key"]), 0o600)
    block = place / "block"
    block.unlink(missing_ok=True)
    block.symlink_to(disks.lasting(args["disk"]))
    for path in (place, place / "keyring", block):
        shutil.chown(path, "ceph", "ceph")
    lock = RUN / f"mkfs-osd.{number}.lock"
    done = await process.run(["flock", str(lock), "sh", "-c", _MKFS, "sh", str(place), number, uuid], deadline=240, check=False)
    if done.rc:
        raise HostError(f"OSD {number} cannot be made on {args['disk']}: {done.stderr.strip()[-500:] or f'ceph-osd ended with {done.rc}'}")


def number_of(uuid: str) -> str | None:
    """The number of the OSD with this uuid, if it has a directory here."""
    for path in sorted((DATA / "osd").glob(f"ceph-*/{UUID}")):
        if path.read_text().split("\n")[0] == uuid:
            return path.parent.name.removeprefix("ceph-")
    return None


async def unmake_osd(uuid: str, disk: str, number: str | None, *, erase: bool = True) -> None:
    """Erase its disk (unless it has failed), and remove its directory last. A disk that is not its own is left alone."""
    if number is not None:
        lock = RUN / f"mkfs-osd.{number}.lock"
        if lock.exists():
            # Until no attempt to make it is under way any more.
            await process.run(["flock", str(lock), "true"], deadline=240)
    if erase:
        await asyncio.to_thread(disks.erase, disk, uuid)
    if number is not None:
        _remove(directory("osd", number))


def _remove(place: Path) -> None:
    try:
        for entry in sorted(place.iterdir()):
            if entry.name != UUID:
                entry.unlink()
        (place / UUID).unlink(missing_ok=True)
        place.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostError(f"cannot remove {place}: {error.strerror}") from None
