"""Snapshots on a real Ceph: what they hold, what outlives what, and in which order things may go."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.lab.smallceph import missing
from atoll.model.errors import Conflict, DiskInUse, NotFound, NotSupported, ShrinkRefused
from atoll.model.messages import SnapshotStat
from atoll.runtime import percent
from atoll.storage import registry
from atoll.storage.contract import SnapshotPool, VolumeSpec
from atoll.storage.host import StorageHost
from ceph_support import LONG, Ceph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
VOLUME, CLONE, NEXT = ("vol-" + digit * 17 for digit in "123")
SNAP, LATER = "snap-" + "a" * 17, "snap-" + "b" * 17
MIB = 1 << 20
SIZE = 8 * MIB


class Place:
    """A prepared pool, and somebody who reads and writes images by himself."""

    def __init__(self, ceph: Ceph, **options: str) -> None:
        self.ceph, self.ref = ceph, ceph.namespace_ref(**options)
        made = registry.pool(self.ref)
        assert isinstance(made, SnapshotPool)
        self.pool = made
        self.pool.prepare(create=True)
        self.cluster, self.ioctx = ceph.client(self.ref)

    def make(self, volume: str = VOLUME, name: str = "web", size: int = SIZE) -> str:
        return self.pool.create(VolumeSpec(volume=volume, name=name, size=size))

    def clone(self, stat: SnapshotStat, volume: str = CLONE, size: int = SIZE) -> str:
        return self.pool.clone(VolumeSpec(volume=volume, name="copy", size=size), stat.logical_id)

    def write(self, image: str, text: bytes, offset: int = 0) -> None:
        import rbd

        with rbd.Image(self.ioctx, image) as found:
            found.write(text, offset)

    def read(self, image: str, length: int, offset: int = 0) -> bytes:
        import rbd

        with rbd.Image(self.ioctx, image, read_only=True) as found:
            return bytes(found.read(offset, length))

    def left(self) -> list[str]:
        """Everything that is in the Ceph pool, but for other people's and the mark."""
        import rbd

        return sorted([*rbd.RBD().list(self.ioctx), *(entry["name"] for entry in rbd.RBD().trash_list(self.ioctx))])


@pytest.fixture
def place(ceph: Ceph) -> Iterator[Place]:
    found = Place(ceph)
    yield found
    found.ioctx.close()
    found.cluster.shutdown()


def test_a_volume_from_a_snapshot_has_what_was_written_before_it(place: Place) -> None:
    image = place.make()
    place.write(image, b"before", 4 * MIB)
    stat = place.pool.snapshot(image, SNAP)
    assert place.pool.snapshot(image, SNAP) == stat
    assert (stat.snapshot, stat.size, stat.source) == (SNAP, SIZE, image)
    place.write(image, b"after!", 4 * MIB)
    place.pool.grow(image, 2 * SIZE)
    clone = place.clone(stat, size=2 * SIZE)
    assert place.clone(stat, size=2 * SIZE) == clone
    found = place.pool.stat(clone)
    assert found is not None
    assert (found.size, found.volume) == (2 * SIZE, CLONE)
    assert place.read(clone, 6, 4 * MIB) == b"before"
    place.write(clone, b"cloned", 4 * MIB)
    assert place.read(image, 6, 4 * MIB) == b"after!"
    assert place.pool.snapshots() == [stat]
    with pytest.raises(Conflict, match="there already"):
        place.clone(stat, size=3 * SIZE)
    with pytest.raises(ShrinkRefused, match="cannot have 4M"):
        place.clone(stat, NEXT, size=SIZE // 2)


def test_a_snapshot_outlives_its_volume_and_a_clone_its_snapshot(place: Place) -> None:
    """Nobody has to delete in any order; when the last of them is gone, nothing is left."""
    image = place.make()
    place.write(image, b"bytes")
    stat, later = place.pool.snapshot(image, SNAP), place.pool.snapshot(image, LATER)
    place.pool.delete(image)
    place.pool.delete(image)
    assert place.pool.stat(image) is None
    assert place.pool.volumes() == []
    assert [(s.snapshot, s.logical_id) for s in place.pool.snapshots()] == [(SNAP, stat.logical_id), (LATER, later.logical_id)]
    clone = place.clone(stat)
    assert place.read(clone, 5) == b"bytes"
    assert [v.volume for v in place.pool.volumes()] == [CLONE]
    place.pool.delete_snapshot(SNAP, stat.logical_id)
    place.pool.delete_snapshot(SNAP, stat.logical_id)
    with pytest.raises(NotFound):
        place.clone(stat, NEXT)
    assert place.pool.waiting() == [], "a snapshot holds it, which everybody sees"
    place.pool.delete_snapshot(LATER, later.logical_id)
    assert place.pool.snapshots() == []
    assert [w.why for w in place.pool.waiting()] == [f"read by {clone}"]
    assert place.read(clone, 5) == b"bytes"
    place.pool.delete(clone)
    assert place.left() == []
    place.pool.delete_snapshot(SNAP, stat.logical_id)


def test_a_chain_of_clones_goes_with_the_last_of_them(place: Place) -> None:
    """In whatever order the trash lists them: by ids, which are random."""
    last = place.make()
    place.write(last, b"first")
    for number in range(5):
        image = last
        stat = place.pool.snapshot(image, f"snap-{number:017x}")
        last = place.clone(stat, f"vol-{number:017x}")
        place.pool.delete(image)
        place.pool.delete_snapshot(stat.snapshot, stat.logical_id)
    assert place.read(last, 5) == b"first"
    assert len(place.pool.waiting()) == 5
    place.pool.delete(last)
    assert place.left() == []


def test_one_image_that_cannot_go_keeps_nothing_else(place: Place) -> None:
    import rbd

    images = [place.make(volume) for volume in (VOLUME, CLONE, NEXT)]
    place.pool.delete(images[0])
    # Somebody makes a snapshot by hand of what is in the trash, so that Ceph does not remove it.
    with rbd.Image(place.ioctx, images[1]) as image:
        image.metadata_set("atoll.deleted", place.ref.id)
        image.create_snap("byhand")
    rbd.RBD().trash_move(place.ioctx, images[1], 0)
    place.pool.delete(images[2])
    assert place.left() == [images[1]]
    assert [(w.what, w.why) for w in place.pool.waiting()] == [(images[1], "it has the snapshots byhand")]


def test_what_was_made_by_hand_is_left_alone(place: Place) -> None:
    image = place.make()
    place.ceph.run("rbd", "snap", "create", "--no-progress", f"{place.ref.options['pool']}/{place.ref.options['namespace']}/{image}@byhand")
    place.pool.snapshot(image, SNAP)
    with pytest.raises(Conflict, match="made by hand: byhand"):
        place.pool.delete(image)
    assert [s.snapshot for s in place.pool.snapshots()] == [SNAP]


def test_the_undo_of_a_snapshot_finds_it_by_its_image(place: Place) -> None:
    image = place.make()
    place.pool.snapshot(image, SNAP)
    place.pool.delete_snapshot(SNAP, source=image)
    place.pool.delete_snapshot(SNAP, source=image)
    place.pool.delete_snapshot(SNAP, source="nothing")
    assert place.pool.snapshots() == []


def test_a_clone_that_was_broken_off_is_made_anew(place: Place) -> None:
    """Ceph makes the image before it gives it its parent: until then it is as large, and empty."""
    image = place.make()
    place.write(image, b"bytes")
    stat = place.pool.snapshot(image, SNAP)
    half = place.make(CLONE, "copy")
    assert place.read(half, 5) == bytes(5)
    assert place.clone(stat) == half
    assert place.read(half, 5) == b"bytes"


def test_an_image_without_layering_has_no_snapshots(place: Place) -> None:
    spec = f"{place.ref.options['pool']}/{place.ref.options['namespace']}/flat"
    place.ceph.run("rbd", "create", spec, "--size", "4M", "--image-feature", "exclusive-lock")
    with pytest.raises(NotSupported, match="no layering"):
        place.pool.snapshot("flat", SNAP)


def test_a_guests_image_with_a_user_of_its_own(ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's own client makes the snapshot; and the clone's user may read what the clone was made from, and nothing more of it."""
    import rbd

    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path))
    place = Place(ceph, isolation="volume")
    image = place.make()
    user, keyring = _user_of(place, image, VOLUME)
    _, theirs = ceph.client(place.ref, user, keyring)
    with rbd.Image(theirs, image) as guest:
        guest.write(b"\x07" * 4096, 0)
        assert guest.is_exclusive_lock_owner()
        stat = place.pool.snapshot(image, SNAP)
        assert guest.is_exclusive_lock_owner()
        guest.write(b"\x08" * 4096, 0)
    clone = place.clone(stat)
    mine, key = _user_of(place, clone, CLONE)
    _, ioctx = ceph.client(place.ref, mine, key)
    with rbd.Image(ioctx, clone) as found:
        assert found.read(0, 4) == b"\x07" * 4
        found.write(b"mine", 0)
        found.flush()
    with rbd.Image(ioctx, clone, read_only=True) as found:
        assert found.read(0, 8) == b"mine" + b"\x07" * 4
    with pytest.raises(rbd.PermissionError):
        rbd.Image(ioctx, image)
    spec = f"{place.ref.options['pool']}/{place.ref.options['namespace']}/{clone}"
    subprocess.run(["qemu-img", "info", f"rbd:{spec}:id={mine}:conf={ceph.conf}:keyring={key}"], check=True, timeout=60)
    assert place.read(image, 4) == b"\x08" * 4
    # The parent goes to another name, and then into the trash; its clone's user reads on.
    place.pool.delete(image)
    place.pool.delete_snapshot(SNAP, stat.logical_id)
    with rbd.Image(ioctx, clone) as found:
        assert found.read(2048, 4) == b"\x07" * 4
    again, key = _user_of(place, clone, CLONE)
    _, ioctx = ceph.client(place.ref, again, key)
    with rbd.Image(ioctx, clone) as found:
        assert found.read(2048, 4) == b"\x07" * 4


def _user_of(place: Place, image: str, volume: str) -> tuple[str, str]:
    """The volume's user on node2, and a keyring with its key."""
    connection = place.pool.connection(image, volume, SIZE, "node2")
    attached = registry.connector("rbd").attach(connection, "userspace")
    (path,) = attached.secrets.values()
    keyring = place.ceph.place / f"{volume}.keyring"
    keyring.write_text(f"[client.{connection.data['user']}]\nkey = {Path(path).read_text()}\n")
    return connection.data["user"], str(keyring)


_WORK = """
import sys
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import VolumeSpec
pool = registry.pool(PoolRef.model_validate_json(sys.argv[1]))
image, snapshot, volume = sys.argv[2:5]
pool.volumes()
print("ready", flush=True)
stat = pool.snapshot(image, snapshot)
clone = pool.clone(VolumeSpec(volume=volume, name="copy", size=8 << 20), stat.logical_id)
pool.delete_snapshot(snapshot, stat.logical_id)
pool.delete(clone)
print("done", flush=True)
"""


@LONG
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", [n / 100 for n in range(0, 20, 2)])
def test_a_worker_that_is_killed_anywhere_leaves_what_the_next_one_finishes(place: Place, after: float) -> None:
    image = place.make()
    place.write(image, b"bytes")
    argv = [sys.executable, "-c", _WORK, place.ref.model_dump_json(), image, SNAP, CLONE]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(after)
        worker.kill()
    began = time.monotonic()
    stat = place.pool.snapshot(image, SNAP)
    clone = place.clone(stat)
    assert place.read(clone, 5) == b"bytes"
    place.pool.delete(image)
    place.pool.delete_snapshot(SNAP, stat.logical_id)
    assert place.read(clone, 5) == b"bytes"
    place.pool.delete(clone)
    # Ceph believes in the dead one for half a minute.
    while place.left() and time.monotonic() < began + 120:
        time.sleep(0.5)
        place.pool.delete(clone)
    assert place.left() == []


# --- flatten ---

BIG = 64 * MIB


def big_clone(place: Place) -> str:
    """A clone of an image that is full of what can be recognised."""
    image = place.make(size=BIG)
    for number in range(BIG // (4 * MIB)):
        place.write(image, bytes([number + 1]) * (4 * MIB), number * 4 * MIB)
    stat = place.pool.snapshot(image, SNAP)
    copy = place.clone(stat, size=BIG)
    place.pool.delete(image)
    place.pool.delete_snapshot(SNAP, stat.logical_id)
    assert len(place.left()) == 2, "the clone reads it still"
    return copy


def whole(place: Place, copy: str) -> bool:
    return all(place.read(copy, 4 * MIB, n * 4 * MIB) == bytes([n + 1]) * (4 * MIB) for n in range(BIG // (4 * MIB)))


def spec(place: Place, image: str) -> str:
    return f"{place.ref.options['pool']}/{place.ref.options['namespace']}/{image}"


def parents(place: Place, copy: str) -> str:
    return place.ceph.run("rbd", "info", spec(place, copy))


def test_a_flattened_volume_stands_by_itself_and_what_it_read_is_gone(place: Place) -> None:
    copy = big_clone(place)
    said: list[float] = []
    percent.listen(said.append)
    try:
        assert place.pool.flatten(copy) is True
    finally:
        percent.listen(None)
    assert place.left() == [copy]
    assert "parent" not in parents(place, copy)
    assert whole(place, copy)
    assert said
    assert all(0 <= done <= 100 for done in said)
    assert place.pool.flatten(copy) is False, "there is nothing to do"


def test_a_guest_that_has_the_volume_open_writes_on_while_it_is_flattened(place: Place) -> None:
    import rbd

    copy = big_clone(place)
    with rbd.Image(place.ioctx, copy) as guest:
        guest.write(b"mine", 4 * MIB)
        assert place.pool.flatten(copy) is True
        guest.write(b"more", 8 * MIB)
    assert place.read(copy, 4, 4 * MIB) == b"mine"
    assert place.read(copy, 4, 8 * MIB) == b"more"
    assert place.read(copy, 4 * MIB, 12 * MIB) == b"\x04" * (4 * MIB)
    assert place.left() == [copy]


def test_where_the_guests_user_may_not_do_it_flattening_says_so(ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rbd

    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path))
    place = Place(ceph, isolation="volume")
    copy = big_clone(place)
    with rbd.Image(place.ioctx, copy) as guest:
        guest.write(b"mine", 0)
        with pytest.raises(DiskInUse, match="may not tell"):
            place.pool.flatten(copy)
    assert "parent" in parents(place, copy)
    assert place.pool.flatten(copy) is True


async def test_flattening_that_is_broken_off_goes_on_when_it_is_repeated(place: Place) -> None:
    """Broken off as a job that is cancelled breaks it off: its worker is killed in the middle."""
    copy = big_clone(place)
    host = StorageHost()
    started = asyncio.Event()
    try:
        call = asyncio.create_task(host.pool(place.ref, "flatten", 600.0, lambda _: started.set(), logical_id=copy))
        await asyncio.wait([call, asyncio.create_task(started.wait())], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set()
        call.cancel()
        await asyncio.wait([call], timeout=30)
        assert call.cancelled() or call.done()
        assert whole(place, copy), "half flattened, it holds the same"
        assert "parent" in parents(place, copy), "it was broken off in the middle"
        # The killed worker's lock stays for half a minute. We do not wait for that.
        for locker in json.loads(place.ceph.run("rbd", "lock", "ls", spec(place, copy), "--format", "json")):
            place.ceph.run("ceph", "osd", "blocklist", "add", locker["address"], "600")
        await host.pool(place.ref, "flatten", 600.0, logical_id=copy)
    finally:
        await host.close()
    assert "parent" not in parents(place, copy)
    assert place.left() == [copy]
    assert whole(place, copy)
