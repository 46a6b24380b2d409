"""What every storage driver must do alike: the pool half's contract, on real files and on a real Ceph."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.model.errors import Conflict, DiskInUse, InvalidInput, InvalidSize, NotFound, NotSupported, PoolUnavailable, ShrinkRefused
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import PoolDriver, VolumeSpec
from atoll.storage.files import images, locks
from ceph_support import Ceph

#: Drivers whose images are files: they keep a contract of their own beside the one of all.
FILES = [d.name for d in registry.drivers() if any(option.name == "path" for option in d.options)]
VOLUME, OTHER = "vol-" + "1" * 17, "vol-" + "2" * 17
MIB = 1 << 20


class Place:
    """A prepared pool and the directory in which its images are."""

    def __init__(self, driver: str, path: Path) -> None:
        options = {"path": str(path), "mount": "none", "preallocation": "off", "locking": "on"}
        self.ref = PoolRef(id="pool-a", name="a", driver=driver, options=options, node="node1", cluster="c")
        self.pool: PoolDriver = registry.pool(self.ref)
        self.pool.prepare(create=True)
        self.directory = path / "node1" if driver == "fakemirror" else path

    def make(self, volume: str = VOLUME, name: str = "web", size: int = MIB) -> str:
        return self.pool.create(VolumeSpec(volume=volume, name=name, size=size))

    def other(self, **changes: str) -> PoolDriver:
        return registry.pool(self.ref.model_copy(update=changes))


class CephPlace(Place):
    """A prepared pool in a Ceph pool of its own."""

    def __init__(self, ceph: Ceph) -> None:
        self.ref = ceph.namespace_ref()
        self.pool = registry.pool(self.ref)
        self.pool.prepare(create=True)


@pytest.fixture(params=FILES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path)


@pytest.fixture(params=[d.name for d in registry.drivers()])
def anyplace(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path) if request.param in FILES else CephPlace(request.getfixturevalue("ceph"))


@pytest.fixture
def writer(place: Place) -> Iterator[str]:
    """An image that a guest writes: its logical id."""
    logical_id = place.make()
    fd = os.open(place.directory / logical_id, os.O_RDWR)
    assert locks.lock_for_writing(fd)
    yield logical_id
    os.close(fd)


def test_every_driver_keeps_the_contract(anyplace: Place) -> None:
    assert isinstance(anyplace.pool, PoolDriver)


def test_prepare_is_idempotent_and_refuses_another_pools_directory(anyplace: Place) -> None:
    assert anyplace.pool.prepare(create=True).ok
    assert anyplace.pool.prepare(create=False).ok
    with pytest.raises(Conflict, match="belongs to pool a"):
        anyplace.other(id="pool-b").prepare(create=True)


def test_without_its_mark_a_directory_is_not_the_pool(place: Place) -> None:
    logical_id = place.make()
    (place.directory / ".atoll-pool").unlink()
    for call in (
        lambda: place.pool.create(VolumeSpec(volume=OTHER, name="x", size=MIB)),
        lambda: place.pool.stat(logical_id),
        lambda: place.pool.volumes(),
        lambda: place.pool.delete(logical_id),
        lambda: place.pool.prepare(create=False),
    ):
        with pytest.raises(PoolUnavailable, match="bare mount point"):
            call()
    assert not place.pool.check().ok
    assert sorted(p.name for p in place.directory.iterdir() if p.is_file()) == [logical_id]


def test_a_missing_directory_is_explained(tmp_path: Path, place: Place) -> None:
    gone = place.other(options=place.ref.options | {"path": "/nonexistent/pool"})  # type: ignore[arg-type]
    with pytest.raises(PoolUnavailable, match="No such file"):
        gone.volumes()


def test_forget_removes_the_mark_only(place: Place) -> None:
    logical_id = place.make()
    place.pool.forget()
    place.pool.forget()
    assert (place.directory / logical_id).exists()
    assert not (place.directory / ".atoll-pool").exists()


def test_create_is_idempotent_and_sparse(anyplace: Place) -> None:
    logical_id = anyplace.make(size=64 * MIB)
    assert anyplace.make(size=64 * MIB) == logical_id
    stat = anyplace.pool.stat(logical_id)
    assert stat is not None
    assert (stat.size, stat.volume) == (64 * MIB, VOLUME)
    assert stat.allocated < MIB
    assert [(v.logical_id, v.size, v.volume) for v in anyplace.pool.volumes()] == [(logical_id, 64 * MIB, VOLUME)]
    with pytest.raises(Conflict):
        anyplace.make(size=32 * MIB)


def test_images_are_for_the_guests_user(place: Place) -> None:
    assert (place.directory / place.make()).stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("size", [0, -1, (1 << 60) + 512])
def test_impossible_sizes_leave_nothing(anyplace: Place, size: int) -> None:
    with pytest.raises(InvalidSize):
        anyplace.make(size=size)
    assert anyplace.pool.volumes() == []


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocation_takes_the_space(place: Place, preallocation: str) -> None:
    logical_id = place.pool.create(VolumeSpec(volume=VOLUME, name="x", size=8 * MIB, options={"preallocation": preallocation}))
    stat = place.pool.stat(logical_id)
    assert stat is not None
    assert stat.allocated >= 8 * MIB


def test_an_interrupted_creation_is_seen_and_cleared(place: Place) -> None:
    half = place.directory / f".atoll-tmp-{VOLUME}"
    half.write_bytes(b"half")
    assert [v.volume for v in place.pool.volumes()] == [VOLUME]
    logical_id = place.make()
    assert not half.exists()
    assert place.pool.stat(logical_id) is not None


def test_an_image_is_durable_before_it_has_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(images.os, name, lambda *a, _n=name, _r=real, **k: (done.append(_n), _r(*a, **k))[1])
    place.make()
    assert done == ["fsync", "rename", "fsync"]


def test_delete_is_idempotent(anyplace: Place) -> None:
    logical_id = anyplace.make()
    anyplace.pool.delete(logical_id)
    anyplace.pool.delete(logical_id)
    assert anyplace.pool.stat(logical_id) is None


def test_what_a_guest_writes_is_seen_and_kept(place: Place, writer: str) -> None:
    assert len(place.pool.writers(writer)) == 1
    with pytest.raises(DiskInUse):
        place.pool.delete(writer)
    with pytest.raises(DiskInUse):
        place.pool.rename(writer, VOLUME, "new")
    with pytest.raises(DiskInUse):
        place.pool.adopt(writer, VOLUME)
    assert place.pool.grow(writer, 2 * MIB) == 2 * MIB


def test_without_a_writer_nobody_is_seen(anyplace: Place) -> None:
    assert anyplace.pool.writers(anyplace.make()) == []


def test_locking_off_sees_nobody(place: Place, writer: str) -> None:
    blind = place.other(options=place.ref.options | {"locking": "off"})  # type: ignore[arg-type]
    assert blind.writers(writer) == []
    assert not blind.probe_writers("look")


def test_the_probe_sees_its_lock_come_and_go(anyplace: Place) -> None:
    assert not anyplace.pool.probe_writers("look")
    assert anyplace.pool.probe_writers("hold")
    assert anyplace.pool.probe_writers("look")
    assert anyplace.pool.probe_writers("drop")
    assert not anyplace.pool.probe_writers("look")


def test_grow_never_shrinks(anyplace: Place) -> None:
    logical_id = anyplace.make()
    assert anyplace.pool.grow(logical_id, 3 * MIB) == 3 * MIB
    assert anyplace.pool.grow(logical_id, 3 * MIB) == 3 * MIB
    with pytest.raises(ShrinkRefused):
        anyplace.pool.grow(logical_id, MIB)
    with pytest.raises(NotFound):
        anyplace.pool.grow("nothing.raw", MIB)


def test_rename_follows_the_volume_and_repeats(anyplace: Place) -> None:
    old = anyplace.make()
    new = anyplace.pool.rename(old, VOLUME, "db")
    assert new.startswith(f"db.{VOLUME}")
    assert anyplace.pool.rename(old, VOLUME, "db") == new
    assert anyplace.pool.rename("", VOLUME, "web") == old
    assert [v.logical_id for v in anyplace.pool.volumes()] == [old]
    with pytest.raises(NotFound):
        anyplace.pool.rename("x", OTHER, "db")


def test_other_peoples_files_are_left_alone(place: Place) -> None:
    (place.directory / "holiday.jpg").write_bytes(b"x" * 512)
    (place.directory / "folder").mkdir()
    place.make()
    assert {(v.logical_id, v.volume) for v in place.pool.volumes()} == {("holiday.jpg", None), (f"web.{VOLUME}.raw", VOLUME)}


def test_adoption_looks_only(place: Place) -> None:
    image = place.directory / "old-disk.img"
    image.write_bytes(bytes(4096))
    found = place.pool.adopt("old-disk.img", VOLUME)
    assert (found.logical_id, found.size) == ("old-disk.img", 4096)
    assert image.read_bytes() == bytes(4096)


def test_what_cannot_be_adopted(place: Place) -> None:
    (place.directory / "a.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    (place.directory / "odd").write_bytes(bytes(100))
    (place.directory / "empty").touch()
    (place.directory / "folder").mkdir()
    os.mkfifo(place.directory / "pipe")
    (place.directory / "link").symlink_to("/etc/passwd")
    for name in ("a.qcow2", "odd", "empty", "folder", "pipe", "link"):
        with pytest.raises((InvalidInput, Conflict)):
            place.pool.adopt(name, VOLUME)
    with pytest.raises(NotFound):
        place.pool.adopt("nothing", VOLUME)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".atoll-pool", "/etc/passwd"])
def test_logical_ids_are_plain_names(anyplace: Place, name: str) -> None:
    for call in (anyplace.pool.stat, anyplace.pool.delete, lambda n: anyplace.pool.grow(n, MIB)):
        with pytest.raises(InvalidInput):
            call(name)


def test_a_symlink_is_no_image(place: Place, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(MIB))
    link = place.directory / f"web.{VOLUME}.raw"
    link.symlink_to(victim)
    with pytest.raises(Conflict, match="is a symbolic link"):
        place.pool.grow(link.name, 2 * MIB)
    assert victim.stat().st_size == MIB


def test_the_connector_gives_what_qemu_needs(place: Place) -> None:
    logical_id = place.make()
    connection = place.pool.connection(logical_id, VOLUME, MIB)
    half = registry.connector(place.ref.driver)
    attached = half.attach(connection, "userspace")
    assert half.attach(connection, "userspace") == attached
    assert attached.path == str(place.directory / logical_id)
    assert attached.blockdev is not None
    assert attached.blockdev["driver"] == "file"
    assert attached.blockdev["locking"] == "on"
    place.pool.grow(logical_id, 2 * MIB)
    assert half.resized(connection) == 2 * MIB
    half.detach(connection)
    half.detach(connection)
    (place.directory / ".atoll-pool").unlink()
    with pytest.raises(PoolUnavailable):
        half.attach(connection, "userspace")


def test_the_mirror_copies_its_primary(tmp_path: Path) -> None:
    first = Place("fakemirror", tmp_path)
    second = first.other(node="node2")
    second.prepare(create=True)
    logical_id = first.make()
    second.create(VolumeSpec(volume=VOLUME, name="web", size=MIB))
    (tmp_path / "node1" / logical_id).write_bytes(b"new" + bytes(MIB - 3))
    first.pool.sync(logical_id, "node1", "node2")
    assert (tmp_path / "node2" / logical_id).read_bytes()[:3] == b"new"
    with pytest.raises(NotFound):
        first.pool.sync("nothing.raw", "node1", "node2")


def test_the_mirrors_copy_keeps_holes_and_follows_every_sync(tmp_path: Path) -> None:
    first = Place("fakemirror", tmp_path)
    second = first.other(node="node2")
    second.prepare(create=True)
    logical_id = first.make(size=64 * MIB)
    second.create(VolumeSpec(volume=VOLUME, name="web", size=32 * MIB))
    source, copy = tmp_path / "node1" / logical_id, tmp_path / "node2" / logical_id
    for at in (0, 40 * MIB, 64 * MIB - 5):
        with source.open("rb+") as file:
            file.seek(at)
            file.write(b"data!")
        first.pool.sync(logical_id, "node1", "node2")
        assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 < 8 * MIB
    assert sorted(p.name for p in copy.parent.iterdir()) == [".atoll-pool", logical_id]


@pytest.mark.parametrize("written", ["node1", "node2"])
def test_the_mirror_copies_nothing_that_is_written(tmp_path: Path, written: str) -> None:
    first = Place("fakemirror", tmp_path)
    second = first.other(node="node2")
    second.prepare(create=True)
    logical_id = first.make()
    second.create(VolumeSpec(volume=VOLUME, name="web", size=MIB))
    (tmp_path / "node1" / logical_id).write_bytes(b"new".ljust(MIB))
    with (tmp_path / written / logical_id).open("rb+") as guest:
        assert locks.lock_for_writing(guest.fileno())
        with pytest.raises(DiskInUse):
            first.pool.sync(logical_id, "node1", "node2")
    assert (tmp_path / "node2" / logical_id).read_bytes() == bytes(MIB)


def test_the_mirror_stays_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "outside").mkdir()
    first = Place("fakemirror", tmp_path / "pool")
    logical_id = first.make()
    for primary, secondary in (("node1", "../outside"), ("../outside", "node1"), ("node1", "")):
        with pytest.raises(InvalidInput):
            first.pool.sync(logical_id, primary, secondary)
    with pytest.raises(InvalidInput):
        first.other(node="../outside").prepare(create=True)
    assert list((tmp_path / "outside").iterdir()) == []


def test_others_keep_no_second_copy(anyplace: Place) -> None:
    if anyplace.ref.driver != "fakemirror":
        with pytest.raises(NotSupported):
            anyplace.pool.sync("x", "node1", "node2")


def test_space_is_the_file_systems(place: Place) -> None:
    found = os.statvfs(place.directory)
    assert place.pool.space().total == found.f_blocks * found.f_frsize
    status = place.pool.check()
    assert status.ok
    assert status.space is not None
    assert status.details["file system"]
