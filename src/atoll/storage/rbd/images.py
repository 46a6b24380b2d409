"""Images in a Ceph pool: made, looked at, renamed, grown, and deleted through the trash."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rados
import rbd

from atoll.model.errors import Conflict, DiskInUse, InvalidInput, InvalidSize, NotFound, PoolFull, ShrinkRefused
from atoll.model.messages import ImageSeen, VolumeStat
from atoll.model.units import format_size
from atoll.storage.contract import VolumeSpec
from atoll.storage.rbd import clients
from atoll.storage.rbd.connections import GONE, Link, check_name
from atoll.storage.rbd.options import EXCLUSIVE_LOCK, FAST_DIFF, RbdOptions

#: What begins the names of images that are the pool's own, and no volumes.
HIDDEN = "atoll-probe."
#: What begins the names of images whose volumes are deleted and have snapshots left.
KEPT = "atoll-kept."
SNAPSHOT = re.compile(r"^snap-[0-9a-f]{17}$")
#: Metadata of an image that was deleted, so that the trash tells ours from other people's.
DELETED = "atoll.deleted"
_VOLUME = re.compile(r"^vol-[0-9a-f]{17}$")
_OURS = re.compile(r"^(?P<name>.+)\.(?P<volume>vol-[0-9a-f]{17})$")
_MAX = 1 << 60
_LOOKERS = 8
_QCOW2 = b"QFI\xfb"


def image_name(name: str, volume: str) -> str:
    """The name of a volume's image. Errors: InvalidInput."""
    if not _VOLUME.match(volume):
        raise InvalidInput(f"{volume!r} is not the id of a volume")
    return check_name(f"{name}.{volume}")


def volume_of(logical_id: str) -> str | None:
    """The volume id in the name of an image; None for other people's."""
    match = _OURS.match(logical_id)
    return match["volume"] if match else None


def create(link: Link, options: RbdOptions, spec: VolumeSpec) -> str:
    """Make it. Ceph makes an image in several steps: one that was broken off in between is made anew.

    Errors: Conflict, PoolFull, InvalidSize.
    """
    name = image_name(spec.name, spec.volume)
    if unknown := sorted(spec.options):
        raise InvalidInput(f"volumes of this pool have no option {unknown[0]!r}")
    if not 0 < spec.size <= _MAX or spec.size % 512:
        raise InvalidSize(f"an image cannot have {spec.size} bytes")
    for again in (False, True):
        try:
            rbd.RBD().create(link.ioctx, name, spec.size, old_format=False, features=options.features, data_pool=options.data_pool or None)
            return name
        except rbd.ImageExists:
            try:
                with clients.opened(link, name) as image:
                    if image.size() != spec.size:
                        raise Conflict(
                            f"image {name} is there already, with {format_size(image.size())}", hint="atoll cluster verify"
                        ) from None
                    return name
            except NotFound:
                if again:
                    raise
                rbd.RBD().remove(link.ioctx, name)
    raise AssertionError("the second attempt returns or raises")


def _as_stat(image: Any, name: str, *, allocated: bool) -> VolumeStat:
    size, taken = image.size(), 0
    if allocated and size:
        taken = _allocated(image, size)
    return VolumeStat(logical_id=name, size=size, allocated=taken, volume=volume_of(name), modified=image.modify_timestamp().timestamp())


def _allocated(image: Any, size: int) -> int:
    """Bytes of the objects that exist, from the object map; without one it is not worth the time to ask for each object."""
    if not image.features() & FAST_DIFF:
        return size
    taken = 0

    def count(_: int, length: int, exists: bool) -> None:
        nonlocal taken
        taken += length if exists else 0

    image.diff_iterate(0, size, None, count, whole_object=True)
    return taken


def describe(link: Link, logical_id: str) -> VolumeStat | None:
    """What Ceph says of an image, None when it is not there."""
    try:
        with clients.opened(link, logical_id) as image:
            return _as_stat(image, logical_id, allocated=True)
    except NotFound:
        return None


def glance(link: Link, logical_id: str, whom: clients.Whom) -> tuple[VolumeStat | None, bool]:
    """An image without what it takes, None when it is not there; and whether there is nobody to be shut out of it."""
    try:
        with clients.opened(link, logical_id) as image:
            return _as_stat(image, logical_id, allocated=False), clients.quiet(link, image, whom)
    except NotFound:
        return None, True


def everything(link: Link) -> list[VolumeStat]:
    """All images but the pool's own, in the order of their names; those that are half made or half deleted, too, with size 0."""

    def one(name: str) -> VolumeStat:
        try:
            with clients.opened(link, name) as image:
                return _as_stat(image, name, allocated=False)
        except NotFound:
            return VolumeStat(logical_id=name, size=0, volume=volume_of(name))

    names = sorted(name for name in rbd.RBD().list(link.ioctx) if not name.startswith((HIDDEN, KEPT)))
    with ThreadPoolExecutor(_LOOKERS) as pool:
        return list(pool.map(one, names))


def seen(link: Link) -> list[ImageSeen]:
    """All images with who has them open, in the order of their names; the pool's own probe is none. It only reads."""

    def one(name: str) -> ImageSeen:
        try:
            with clients.opened(link, name) as image:
                who = [f"the Ceph client at {address}" for address in clients.strangers(link, image)]
                made = [snap["name"] for snap in user_snapshots(image)]
                try:
                    spec = image.get_parent_image_spec()
                    parent = f"{spec['image_name']}@{spec['snap_name']}"
                except rbd.ImageNotFound:
                    parent = ""
                modified = image.modify_timestamp().timestamp()
                facts = {"modified": modified, "writers": who, "snapshots": made, "parent": parent}
                return ImageSeen(name=name, size=image.size(), volume=volume_of(name), **facts)
        except NotFound:
            return ImageSeen(name=name, size=0, volume=volume_of(name))

    names = sorted(name for name in rbd.RBD().list(link.ioctx) if not name.startswith(HIDDEN))
    with ThreadPoolExecutor(_LOOKERS) as pool:
        return list(pool.map(one, names))


def grow(link: Link, logical_id: str, size: int) -> int:
    """Make it at least that large; a guest that has it open is told by Ceph. Errors: NotFound, ShrinkRefused, InvalidSize."""
    with clients.opened(link, logical_id, read_only=False) as image:
        present: int = image.size()
        if size < present:
            raise ShrinkRefused(f"image {logical_id} has {format_size(present)}; it is never made smaller")
        if size > _MAX or size % 512:
            raise InvalidSize(f"an image cannot have {size} bytes")
        if size > present:
            image.resize(size)
        return int(image.size())


def find(link: Link, volume: str) -> str | None:
    """The image of a volume, whatever its name part."""
    return min((name for name in rbd.RBD().list(link.ioctx) if volume_of(name) == volume), default=None)


def _exists(link: Link, name: str) -> bool:
    try:
        clients.opened(link, name).close()
    except NotFound:
        return False
    return True


def refuse_writer(link: Link, logical_id: str) -> None:
    """Errors: DiskInUse, NotFound."""
    with clients.opened(link, logical_id) as image:
        _refuse_strangers(link, image, logical_id)


def _refuse_strangers(link: Link, image: Any, logical_id: str) -> None:
    if who := clients.strangers(link, image):
        raise DiskInUse(f"{logical_id} is open for writing: the client at {', '.join(who)}")


def rename(link: Link, logical_id: str, volume: str, name: str) -> str:
    """Let the image's name follow its volume's; repeating it is success. An empty logical id means: find it by its volume.

    Errors: NotFound, DiskInUse, Conflict (another volume's image, or there are two of this one).
    """
    wanted = image_name(name, volume)
    present = logical_id if logical_id and _exists(link, check_name(logical_id)) else find(link, volume)
    if present is None:
        raise NotFound(f"there is no image of {volume}", hint="atoll cluster verify")
    if present == wanted:
        return wanted
    if volume_of(present) not in (None, volume):
        raise Conflict(f"{present} is the image of {volume_of(present)}, not of {volume}", hint="atoll cluster verify")
    refuse_writer(link, present)
    try:
        rbd.RBD().rename(link.ioctx, present, wanted)
    except rbd.ImageExists:
        raise Conflict(f"{volume} has two images, {present} and {wanted}", hint="atoll cluster verify") from None
    return wanted


def adopt(link: Link, source: str) -> VolumeStat:
    """Look at an image that shall become a volume. Errors: NotFound, InvalidInput, DiskInUse."""
    with clients.opened(link, source) as image:
        size = image.size()
        if not image.features() & EXCLUSIVE_LOCK:
            raise InvalidInput(
                f"image {source} is used without locks, so that nobody could tell who writes it",
                hint=f"rbd feature enable POOL/{source} exclusive-lock object-map fast-diff",
            )
        if size and image.read(0, 4) == _QCOW2:
            raise InvalidInput(f"{source} holds a qcow2 image; only raw ones can be adopted", hint="qemu-img convert -O raw")
        if size == 0 or size % 512:
            raise InvalidInput(f"{source} has {size} bytes; a disk has a multiple of 512", hint=f"rbd resize POOL/{source}")
        found = _as_stat(image, source, allocated=True)
    refuse_writer(link, source)
    return found


def delete(link: Link, logical_id: str, pool: str) -> None:
    """Move it into the trash, where nobody opens it any more, and remove it from there; missing is success. One that was in the trash
    already, because an earlier deletion was broken off, is removed too. With snapshots of ours it is kept under another name, until the
    last of them is deleted. Errors: DiskInUse, Conflict (it has snapshots made by hand)."""
    check_name(logical_id)
    try:
        with clients.opened(link, logical_id) as image:
            _refuse_strangers(link, image, logical_id)
            ident = image.id()
            _refuse_snapshots(image, logical_id)
            kept = bool(user_snapshots(image))
        if not kept:
            set_metadata(link, ident, DELETED, pool)
        if kept:
            rbd.RBD().rename(link.ioctx, logical_id, KEPT + ident)
        else:
            rbd.RBD().trash_move(link.ioctx, logical_id, 0)
        clients.forget(link, ident)
    except (NotFound, rbd.ImageNotFound):
        if logical_id in rbd.RBD().list(link.ioctx):
            # Half made, or half deleted by somebody else.
            rbd.RBD().remove(link.ioctx, logical_id)
    sweep(link, pool)


def user_snapshots(image: Any) -> list[dict[str, Any]]:
    """Its snapshots, without those that were removed and that only clones need."""
    return [snap for snap in image.list_snaps() if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER]


def _refuse_snapshots(image: Any, name: str) -> None:
    """Snapshots would hold it in the trash, where nobody looks. Those that only clones need go with the clones."""
    made = [snap["name"] for snap in user_snapshots(image) if not SNAPSHOT.match(snap["name"])]
    if made:
        raise Conflict(
            f"image {name} has snapshots that were made by hand: {', '.join(made[:5])}",
            hint=f"if nobody needs them: rbd snap rm POOL/{name}@{made[0]}",
        )


def sweep(link: Link, pool: str) -> None:
    """Remove what was deleted and can go now; an image on which clones depend stays in the trash until they are gone. One that cannot be
    removed, whatever is wrong with it, does not keep the others: ``snaps.waiting`` says why it is still there."""
    for name in rbd.RBD().list(link.ioctx):
        if name.startswith(KEPT):
            with _whatever_is_wrong():
                _let_go(link, name, pool)
    progress = True
    while progress:
        # What reads another one may come after it.
        progress = False
        for entry in list(rbd.RBD().trash_list(link.ioctx)):
            with _whatever_is_wrong():
                if ours(link, entry["id"], pool):
                    rbd.RBD().trash_remove(link.ioctx, entry["id"])
                    progress = True


@contextlib.contextmanager
def _whatever_is_wrong() -> Iterator[None]:
    """An image of which Ceph refuses something is left for the next time; a connection that is cut off is an error."""
    try:
        yield
    except NotFound:
        pass
    except rbd.Error as error:
        if getattr(error, "errno", None) in GONE:
            raise


def _let_go(link: Link, name: str, pool: str) -> None:
    """Move an image that was kept for its snapshots into the trash, if it has none any more."""
    with clients.opened(link, name) as image:
        if user_snapshots(image):
            return
        ident = image.id()
    set_metadata(link, ident, DELETED, pool)
    rbd.RBD().trash_move(link.ioctx, name, 0)


def set_metadata(link: Link, ident: str, key: str, value: str) -> None:
    """As librbd does it, in one go: to do it by an open image takes a watch, the image's lock and its object map, all for one write, which
    is most of the time of a deletion. Nobody has the image open. Errors: NotFound."""
    pair = b"".join(struct.pack("<I", len(text)) + text for text in (key.encode(), value.encode()))
    try:
        link.ioctx.execute(f"rbd_header.{ident}", "rbd", "metadata_set", struct.pack("<I", 1) + pair)
    except rados.ObjectNotFound:
        raise NotFound(f"there is no image with the id {ident}") from None


def ours(link: Link, ident: str, pool: str) -> bool:
    """Whether we put it into the trash. What is half removed has lost its metadata, but not its place in the trash."""
    try:
        with rbd.Image(link.ioctx, image_id=ident, read_only=True) as image:
            return bool(image.metadata_get(DELETED) == pool)
    except (rbd.ImageNotFound, KeyError):
        return False


def refuse_full(free: int, options: RbdOptions) -> None:
    """Errors: PoolFull: a write to a full Ceph would wait for ever."""
    if free <= 0:
        raise PoolFull(f"Ceph pool {options.where} is full", hint="ceph df; ceph health detail")
