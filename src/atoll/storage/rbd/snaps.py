"""Snapshots of images, and images made from them.

A snapshot is one of Ceph's own, on the image of its volume; clones of format 2 need no protected ones. Its logical id has the image's id,
which stays whatever becomes of the image's name: when the volume is deleted, its image is kept under another name until its last snapshot
is deleted, and what clones still read of it stays in the trash until they are gone (``images.sweep``).
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rbd

from atoll.model.errors import Conflict, DiskInUse, InvalidInput, NotFound, NotSupported, ShrinkRefused
from atoll.model.messages import SnapshotStat, Waiting
from atoll.model.units import format_size
from atoll.runtime import percent
from atoll.storage.contract import VolumeSpec
from atoll.storage.rbd import clients, images
from atoll.storage.rbd.connections import Link
from atoll.storage.rbd.options import LAYERING, RbdOptions

#: Metadata of a finished clone: its volume. Ceph makes a clone in several steps, and copies the metadata of its parent.
CLONED = "atoll.cloned"
_LOGICAL = re.compile(r"(?P<image>[0-9a-zA-Z]+)@(?P<snapshot>snap-[0-9a-f]{17})\Z")
_LOOKERS = 8


def _parts(logical_id: str) -> tuple[str, str]:
    match = _LOGICAL.match(logical_id)
    if match is None:
        raise InvalidInput(f"{logical_id!r} is not a snapshot", hint="atoll snapshot list")
    return match["image"], match["snapshot"]


def _by_id(link: Link, ident: str, *, read_only: bool = True) -> Any:
    """Errors: NotFound."""
    try:
        return rbd.Image(link.ioctx, image_id=ident, read_only=read_only)
    except rbd.ImageNotFound:
        raise NotFound(f"the image {ident} of the snapshot is not there", hint="atoll cluster verify") from None


def _size(image: Any, snapshot: str) -> int | None:
    return next((int(snap["size"]) for snap in images.user_snapshots(image) if snap["name"] == snapshot), None)


def take(link: Link, logical_id: str, snapshot: str) -> SnapshotStat:
    """Make it; a guest that has the image open makes it itself, between two of its writes. There already is success.

    Errors: NotFound, NotSupported (the image's features allow no clones).
    """
    if not images.SNAPSHOT.match(snapshot):
        raise InvalidInput(f"{snapshot!r} is not the id of a snapshot")
    with clients.opened(link, logical_id, read_only=False) as image:
        if not image.features() & LAYERING:
            raise NotSupported(
                f"image {logical_id} has no layering: no volume could be made from its snapshots",
                hint=f"make an image that has it: rbd deep cp --image-feature layering,exclusive-lock POOL/{logical_id} POOL/NEW",
            )
        try:
            image.create_snap(snapshot)
            # Nobody grows it meanwhile: its volume is this job's.
            size = int(image.size())
        except rbd.ImageExists:
            found = _size(image, snapshot)
            if found is None:
                raise NotFound(f"snapshot {snapshot} was removed by somebody else") from None
            size = found
        return SnapshotStat(logical_id=f"{image.id()}@{snapshot}", snapshot=snapshot, size=size, source=logical_id)


def remove(link: Link, snapshot: str, logical_id: str, source: str, pool: str) -> None:
    """Remove it; missing is success. Volumes that were made from it go on: Ceph keeps what they read."""
    if logical_id and _parts(logical_id)[1] != snapshot:
        raise InvalidInput(f"{logical_id} is not {snapshot}")
    try:
        found = _by_id(link, _parts(logical_id)[0], read_only=False) if logical_id else clients.opened(link, source, read_only=False)
    except NotFound:
        return
    with found as image:
        if _size(image, snapshot) is not None:
            try:
                image.remove_snap(snapshot)
            except rbd.ImageNotFound:
                pass
            except rbd.ImageBusy:
                raise DiskInUse(
                    f"snapshot {snapshot} was protected by hand", hint=f"rbd snap unprotect POOL/{image.get_name()}@{snapshot}"
                ) from None
    images.sweep(link, pool)


def clone(link: Link, options: RbdOptions, spec: VolumeSpec, logical_id: str, pool: str) -> str:
    """An image that begins with what the snapshot has; its own from the first write. One that was broken off is made anew.

    Errors: NotFound, ShrinkRefused, Conflict.
    """
    ident, snapshot = _parts(logical_id)
    name = images.image_name(spec.name, spec.volume)
    if unknown := sorted(spec.options):
        raise InvalidInput(f"volumes of this pool have no option {unknown[0]!r}")
    with _by_id(link, ident) as image:
        source, size = image.get_name(), _size(image, snapshot)
    if size is None:
        raise NotFound(f"there is no snapshot {snapshot} of image {source}", hint="atoll cluster verify")
    if spec.size < size:
        raise ShrinkRefused(f"snapshot {snapshot} has {format_size(size)}; a volume from it cannot have {format_size(spec.size)}")
    arguments = {"features": options.features | LAYERING, "data_pool": options.data_pool or None}
    try:
        rbd.RBD().clone(link.ioctx, source, snapshot, link.ioctx, name, **arguments)
    except rbd.ImageExists:
        if _finished(link, name, spec):
            return name
        # Half made, perhaps without its parent yet: nobody has ever used it.
        images.delete(link, name, pool)
        rbd.RBD().clone(link.ioctx, source, snapshot, link.ioctx, name, **arguments)
    with clients.opened(link, name, read_only=size >= spec.size) as image:
        if size < spec.size:
            image.resize(spec.size)
        clone = image.id()
    images.set_metadata(link, clone, CLONED, spec.volume)
    return name


def _finished(link: Link, name: str, spec: VolumeSpec) -> bool:
    try:
        with clients.opened(link, name) as image:
            try:
                done = bool(image.metadata_get(CLONED) == spec.volume)
            except KeyError:
                done = False
            if done and image.size() != spec.size:
                raise Conflict(f"image {name} is there already, with {format_size(image.size())}", hint="atoll cluster verify")
            return done
    except NotFound:
        return False


def _told(done: int, total: int) -> int:
    percent.tell(100.0 * done / max(total, 1))
    return 0


def flatten(link: Link, options: RbdOptions, logical_id: str, pool: str) -> bool:
    """Copy what the image reads of others into it; whether there was anything. Where a guest has it open, its QEMU does that.

    Errors: NotFound, DiskInUse.
    """
    with clients.opened(link, logical_id, read_only=False) as image:
        try:
            image.get_parent_image_spec()
        except rbd.ImageNotFound:
            return False
        if options.isolated and clients.strangers(link, image):
            raise DiskInUse(
                f"image {logical_id} is open, and its guest's Ceph user may not tell the image that it was made from that it is done",
                hint="stop its instance first, with isolation=volume",
            )
        image.flatten(on_progress=_told)
    # What only this one had kept can go.
    images.sweep(link, pool)
    return True


def everything(link: Link) -> list[SnapshotStat]:
    """The snapshots of all images that have names of ours, those of deleted volumes included."""

    def one(name: str) -> list[SnapshotStat]:
        try:
            with clients.opened(link, name) as image:
                ident = image.id()
                return [
                    SnapshotStat(logical_id=f"{ident}@{snap['name']}", snapshot=snap["name"], size=snap["size"], source=name)
                    for snap in images.user_snapshots(image)
                    if images.SNAPSHOT.match(snap["name"])
                ]
        except NotFound:
            return []

    names = sorted(name for name in rbd.RBD().list(link.ioctx) if not name.startswith(images.HIDDEN))
    with ThreadPoolExecutor(_LOOKERS) as pool:
        return [stat for found in pool.map(one, names) for stat in found]


def waiting(link: Link, pool: str) -> list[Waiting]:
    """What was deleted and is still there, and why."""
    found = []
    for entry in rbd.RBD().trash_list(link.ioctx):
        if not images.ours(link, entry["id"], pool):
            continue
        try:
            with _by_id(link, entry["id"]) as image:
                users = sorted({child["image"] for child in image.list_descendants()})
                why = f"read by {', '.join(users[:5])}" if users else "it is removed with the next deletion in this pool"
                if byhand := [snap["name"] for snap in images.user_snapshots(image)]:
                    why = f"it has the snapshots {', '.join(byhand[:5])}"
        except NotFound:
            continue
        except rbd.Error as error:
            why = f"Ceph cannot tell: {error}"
        found.append(Waiting(what=entry["name"], why=why))
    for name in rbd.RBD().list(link.ioctx):
        if name.startswith(images.KEPT):
            with clients.opened(link, name) as image:
                byhand = [snap["name"] for snap in images.user_snapshots(image) if not images.SNAPSHOT.match(snap["name"])]
            if byhand:
                found.append(Waiting(what=name, why=f"it has snapshots that were made by hand: {', '.join(byhand[:5])}"))
    return found
