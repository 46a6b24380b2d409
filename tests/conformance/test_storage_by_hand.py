"""What every storage driver does when somebody works in its directory by hand, on real files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_storage import MIB, OTHER, VOLUME, Place, place

from atoll.model.errors import Conflict, NotFound, PoolUnavailable
from atoll.storage import registry
from atoll.storage.files import making

__all__ = ["place"]
NOT_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as another user")


def link(path: Path) -> None:
    victim = path.parent.parent / "victim"
    victim.write_bytes(b"somebody's" * 1000)
    path.symlink_to(victim)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


REPLACEMENTS: list[Callable[[Path], None]] = [link, dangling, Path.mkdir, os.mkfifo]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=["link", "dangling", "directory", "pipe"])
def test_what_is_put_in_the_place_of_an_image_is_neither_used_nor_removed(place: Place, replace: Callable[[Path], None]) -> None:
    name = place.make()
    path = place.directory / name
    path.unlink()
    replace(path)
    before = os.lstat(path)
    connection = place.pool.connection(name, VOLUME, MIB)
    half = registry.connector(place.ref.driver)
    for call in (
        lambda: place.pool.stat(name),
        lambda: place.pool.grow(name, 2 * MIB),
        lambda: place.pool.delete(name),
        lambda: place.pool.rename(name, VOLUME, "other"),
        lambda: place.pool.writers(name),
        lambda: place.pool.adopt(name, OTHER),
        lambda: half.attach(connection, "userspace"),
    ):
        with pytest.raises(Conflict, match="not an image") as refused:
            call()
        assert refused.value.hint == "atoll cluster verify"
    assert (os.lstat(path).st_ino, os.lstat(path).st_mtime) == (before.st_ino, before.st_mtime)
    victim = place.directory.parent / "victim"
    assert not victim.exists() or victim.read_bytes() == b"somebody's" * 1000
    assert name not in [stat.logical_id for stat in place.pool.volumes()]


def test_an_image_deleted_by_hand_is_not_there(place: Place) -> None:
    name = place.make()
    connection = place.pool.connection(name, VOLUME, MIB)
    (place.directory / name).unlink()
    assert place.pool.stat(name) is None
    assert place.pool.volumes() == []
    for call in (
        lambda: place.pool.grow(name, 2 * MIB),
        lambda: registry.connector(place.ref.driver).attach(connection, "userspace"),
        lambda: place.pool.rename(name, VOLUME, "other"),
    ):
        with pytest.raises(NotFound):
            call()
    assert not (place.directory / name).exists(), "nothing is made up in its place"
    place.pool.delete(name)
    assert place.make() == name


@pytest.mark.parametrize("size", [MIB // 2, 3 * MIB])
def test_a_size_changed_by_hand_is_told_and_can_be_taken_over(place: Place, size: int) -> None:
    name = place.make()
    os.truncate(place.directory / name, size)
    stat = place.pool.stat(name)
    assert stat is not None
    assert stat.size == size
    with pytest.raises(Conflict, match=f"exists with {size} bytes"):
        place.make()
    assert place.pool.grow(name, max(size, MIB)) == max(size, MIB)


def test_a_removed_mark_is_made_again_only_where_the_images_are(place: Place) -> None:
    name = place.make()
    mark = place.directory / ".atoll-pool"
    mark.unlink()
    with pytest.raises(PoolUnavailable, match="not marked as pool a") as refused:
        place.pool.volumes()
    assert "atoll pool mark a -n node1" in refused.value.hint
    with pytest.raises(PoolUnavailable, match="none of the 1 images"):
        place.pool.mark([f"lost.{OTHER}.raw"])
    assert not mark.exists()
    place.pool.mark([name, f"lost.{OTHER}.raw"])
    place.pool.mark([name])
    assert [stat.logical_id for stat in place.pool.volumes()] == [name]
    with pytest.raises(Conflict, match="belongs to pool a"):
        place.other(id="pool-b").mark([])


def test_a_removed_directory_is_not_made_again(place: Place) -> None:
    place.make()
    shutil.rmtree(place.directory)
    for call in (
        lambda: place.make(OTHER),
        lambda: place.pool.delete(f"web.{VOLUME}.raw"),
        lambda: place.pool.mark([]),
        lambda: place.pool.prepare(create=False),
    ):
        with pytest.raises(PoolUnavailable, match="No such file or directory"):
            call()
    assert not place.pool.check().ok
    assert not place.directory.exists()


def test_two_pools_in_one_directory_whatever_its_path(place: Place, tmp_path: Path) -> None:
    other = tmp_path.parent / f"{tmp_path.name}-same"
    other.symlink_to(tmp_path)
    with pytest.raises(Conflict, match="belongs to pool a"):
        place.other(id="pool-b", name="b", options={**place.ref.options, "path": str(other)}).prepare(create=True)  # type: ignore[arg-type]


@NOT_ROOT
def test_a_directory_that_guests_may_not_enter_is_not_usable(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in place.directory.parents:
        if part.stat().st_mode & 0o1 == 0:
            part.chmod(0o755)
    place.directory.chmod(0o700)
    monkeypatch.setenv("ATOLL_GUEST_USER", "nobody")
    found = registry.pool(place.ref).check()
    assert not found.ok
    assert f"user nobody, which may not enter {place.directory}" in found.reason
    assert found.hint == f"chmod a+x {place.directory}"
    assert (os.geteuid(), os.getegid()) == (0, 0)
    # A preparation says so, too: pool add refuses it then.
    assert registry.pool(place.ref).prepare(create=False).reason == found.reason
    above = place.directory.parent
    mode = above.stat().st_mode
    above.chmod(0o700)
    assert registry.pool(place.ref).check().hint == f"chmod a+x {above}"
    above.chmod(mode)
    place.directory.chmod(0o711)
    assert registry.pool(place.ref).check().ok


def test_what_may_not_be_opened_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = place.make()
    real = os.open

    def refuse(path: str, flags: int, *args: object, **more: object) -> int:
        if path == name:
            raise PermissionError(1, "Operation not permitted", name)
        return real(path, flags, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PoolUnavailable, match=f"{name}.*Operation not permitted") as refused:
        place.pool.grow(name, 2 * MIB)
    assert "permissions" in refused.value.hint


def test_leftovers_and_files_of_others_are_listed_and_stay(place: Place) -> None:
    name = place.make()
    (place.directory / "debian.iso").write_bytes(bytes(2048))
    (place.directory / "notes").mkdir()
    (place.directory / f"{making.TEMPORARY}{OTHER}").touch()
    listed = {stat.logical_id: stat.volume for stat in place.pool.volumes()}
    assert listed == {name: VOLUME, "debian.iso": None, f"{making.TEMPORARY}{OTHER}": OTHER}
    place.pool.prepare(create=True)
    place.pool.delete(name)
    place.pool.forget()
    assert {p.name for p in place.directory.iterdir()} >= {"debian.iso", "notes"}
