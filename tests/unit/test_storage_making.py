"""Images made and grown: two processes at one volume, crashes in the middle, and file systems that fail."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.model.errors import Conflict, DiskInUse, HostError, InvalidInput, InvalidSize, NotFound, PoolFull, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import PoolDriver, VolumeSpec
from atoll.storage.files import locks, making
from atoll.storage.files.directory import explain

VOLUME, OTHER = "vol-" + "1" * 17, "vol-" + "2" * 17
IMAGE, HALF = f"web.{VOLUME}.raw", f".atoll-tmp-{VOLUME}"
MIB = 1 << 20


def made(path: Path, **options: str) -> PoolDriver:
    return registry.pool(PoolRef(id="pool-a", name="a", driver="file", options={"path": str(path), **options}, node="n", cluster="c"))


@pytest.fixture
def pool(tmp_path: Path) -> PoolDriver:
    found = made(tmp_path)
    found.prepare(create=True)
    return found


def spec(size: int = MIB, volume: str = VOLUME, name: str = "web", **options: str) -> VolumeSpec:
    return VolumeSpec(volume=volume, name=name, size=size, options=options)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name != ".atoll-pool")


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Path]:
    """A temporary file that another process holds."""
    path = tmp_path / HALF
    with path.open("wb") as file:
        file.write(b"in the making")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


# --- two at one volume ---


def test_who_makes_an_image_is_not_disturbed(pool: PoolDriver, half: Path) -> None:
    os.utime(half, (0, 0))
    for call in (lambda: pool.create(spec()), lambda: pool.delete(HALF)):
        with pytest.raises(DiskInUse, match="being made"):
            call()
    pool.prepare(create=False)
    assert half.read_bytes() == b"in the making"


def test_an_image_finished_meanwhile_is_found_and_not_replaced(pool: PoolDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def finished_first(fd: int, operation: int) -> None:
        # The other one had the lock until now, and has put its image in place.
        if (tmp_path / HALF).exists() and not (tmp_path / IMAGE).exists():
            (tmp_path / HALF).rename(tmp_path / IMAGE)
            (tmp_path / IMAGE).write_bytes(b"a guest's data".ljust(MIB, b"\0"))
        real(fd, operation)

    monkeypatch.setattr(making.fcntl, "flock", finished_first)
    assert pool.create(spec()) == IMAGE
    assert (tmp_path / IMAGE).read_bytes()[:14] == b"a guest's data"
    assert names(tmp_path) == [IMAGE]


def test_nothing_is_written_through_a_temporary_name(pool: PoolDriver, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for plant in (lambda p: p.symlink_to(victim), lambda p: p.hardlink_to(victim), os.mkfifo, os.mkdir):
        victim.write_bytes(b"precious")
        plant(tmp_path / HALF)
        with pytest.raises(Conflict, match="not a file of ours"):
            pool.create(spec())
        assert victim.read_bytes() == b"precious"
        assert pool.volumes()[0].logical_id in (HALF, "victim")
        (tmp_path / HALF).rmdir() if (tmp_path / HALF).is_dir() else (tmp_path / HALF).unlink()


# --- crashes ---


def test_what_was_left_over_does_not_show_in_the_new_image(pool: PoolDriver, tmp_path: Path) -> None:
    (tmp_path / HALF).write_bytes(b"secret" * MIB)
    pool.create(spec())
    assert (tmp_path / IMAGE).read_bytes() == bytes(MIB)


@pytest.mark.parametrize("last", ["posix_fallocate", "rename"])
def test_a_killed_creation_leaves_a_temporary_file_that_is_listed(pool: PoolDriver, tmp_path: Path, last: str) -> None:
    code = (
        "import os, sys, signal\n"
        "from atoll.model.messages import PoolRef\n"
        "from atoll.storage import registry\n"
        "from atoll.storage.contract import VolumeSpec\n"
        f"os.{last} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"ref = PoolRef(id='pool-a', name='a', driver='file', options={{'path': {str(tmp_path)!r}}}, node='n', cluster='c')\n"
        f"registry.pool(ref).create(VolumeSpec(volume='{VOLUME}', name='web', size={MIB}, options={{'preallocation': 'full'}}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    assert names(tmp_path) == [HALF]
    assert [(v.logical_id, v.volume) for v in pool.volumes()] == [(HALF, VOLUME)]
    stat = pool.stat(HALF)
    assert stat is not None
    assert stat.volume == VOLUME
    assert pool.create(spec()) == IMAGE
    assert names(tmp_path) == [IMAGE]


def test_a_leftover_can_be_deleted(pool: PoolDriver, tmp_path: Path) -> None:
    (tmp_path / HALF).touch()
    pool.delete(HALF)
    pool.delete(HALF)
    assert names(tmp_path) == []


def test_prepare_removes_old_leftovers_of_ours_alone(pool: PoolDriver, tmp_path: Path) -> None:
    young, foreign = tmp_path / f".atoll-tmp-{OTHER}", tmp_path / ".atoll-tmp-notes"
    for path in (tmp_path / HALF, young, foreign):
        path.touch()
    old = time.time() - making.STALE - 10
    for path in (tmp_path / HALF, foreign):
        os.utime(path, (old, old))
    pool.prepare(create=False)
    assert names(tmp_path) == sorted([young.name, foreign.name])


# --- file systems that fail ---


def fails(code: int) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize(
    ("name", "preallocation"), [("posix_fallocate", "falloc"), ("pwrite", "full"), ("fsync", "off"), ("rename", "off")]
)
def test_a_full_file_system_leaves_nothing(
    pool: PoolDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, preallocation: str
) -> None:
    monkeypatch.setattr(making.os, name, fails(errno.ENOSPC))
    with pytest.raises(PoolFull, match="no space left"):
        pool.create(spec(preallocation=preallocation))
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_too_little_room_is_refused_before_anything_is_written(pool: PoolDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = pool.space().free
    with pytest.raises(PoolFull, match="are free"):
        pool.create(spec(size=(free + MIB) // 512 * 512, preallocation="falloc"))
    pool.create(spec(size=(free + MIB) // 512 * 512))
    monkeypatch.setattr(making, "RESERVE", free * 2)
    with pytest.raises(PoolFull, match="reserve"):
        pool.create(spec(volume=OTHER))
    assert names(tmp_path) == [IMAGE]


@pytest.mark.parametrize("name", ["fsync", "pwrite"])
def test_an_image_that_grew_in_vain_is_as_before(pool: PoolDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pool.create(spec())
    (tmp_path / IMAGE).write_bytes(b"data".ljust(MIB, b"\0"))
    monkeypatch.setattr(making.os, name, fails(errno.ENOSPC))
    with pytest.raises(PoolFull):
        made(tmp_path, preallocation="full").grow(IMAGE, 4 * MIB)
    monkeypatch.undo()
    assert (tmp_path / IMAGE).read_bytes() == b"data".ljust(MIB, b"\0")
    assert made(tmp_path, preallocation="full").grow(IMAGE, 4 * MIB) == 4 * MIB
    assert (tmp_path / IMAGE).stat().st_blocks * 512 >= 3 * MIB


def test_a_size_that_the_file_system_cannot_hold(pool: PoolDriver, tmp_path: Path) -> None:
    pool.create(spec(volume=OTHER, name="small"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, hard))
    try:
        with pytest.raises(InvalidSize, match="cannot hold"):
            pool.create(spec(size=128 * MIB))
        with pytest.raises(InvalidSize, match="cannot hold"):
            pool.grow(f"small.{OTHER}.raw", 128 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [f"small.{OTHER}.raw"]


def test_sizes_are_whole_sectors(pool: PoolDriver) -> None:
    with pytest.raises(InvalidSize, match="512"):
        pool.create(spec(size=1000))
    pool.create(spec())
    with pytest.raises(InvalidSize, match="512"):
        pool.grow(IMAGE, MIB + 1)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(pool: PoolDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", fails(code))
    monkeypatch.setattr(fcntl, "fcntl", fails(code))
    with pytest.raises(PoolUnavailable, match="cannot lock") as caught:
        pool.create(spec())
    assert "locking=off" in caught.value.hint
    blind = made(tmp_path, locking="off")
    assert blind.create(spec()) == IMAGE
    with pytest.raises(PoolUnavailable, match="cannot lock"):
        pool.delete(IMAGE)
    with pytest.raises(PoolUnavailable, match="cannot lock"):
        pool.probe_writers("hold")
    assert blind.adopt(IMAGE, VOLUME).size == MIB
    assert blind.rename(IMAGE, VOLUME, "db") == f"db.{VOLUME}.raw"
    blind.delete(f"db.{VOLUME}.raw")
    assert blind.writers(IMAGE) == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EDQUOT, PoolFull),
        (errno.ESTALE, PoolUnavailable),
        (errno.EIO, PoolUnavailable),
        (errno.EROFS, PoolUnavailable),
        (errno.ENAMETOOLONG, InvalidInput),
        (errno.EMFILE, HostError),
    ],
)
def test_what_errors_of_the_system_mean(code: int, kind: type[Exception]) -> None:
    assert type(explain(OSError(code, os.strerror(code)), "pool a")) is kind


# --- owners ---


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_images_belong_to_the_guests_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_GUEST_USER", "nobody")
    pool = made(tmp_path)
    pool.prepare(create=True)
    pool.create(spec())
    (tmp_path / "old.img").write_bytes(bytes(512))
    pool.adopt("old.img", OTHER)
    assert (tmp_path / "old.img").stat().st_uid == 0
    registry.connector("file").attach(pool.connection("old.img", OTHER, 512), "userspace")
    for name in (IMAGE, "old.img"):
        assert (tmp_path / name).stat().st_uid == pwd.getpwnam("nobody").pw_uid
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o660


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_without_that_user_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_GUEST_USER", "no-such-user")
    pool = made(tmp_path)
    pool.prepare(create=True)
    with pytest.raises(HostError, match="no user 'no-such-user'"):
        pool.create(spec())
    assert names(tmp_path) == []


# --- names ---


def test_a_rename_replaces_nothing(pool: PoolDriver, tmp_path: Path) -> None:
    pool.create(spec())
    (tmp_path / f"db.{VOLUME}.raw").write_bytes(b"another")
    with pytest.raises(Conflict, match="two images"):
        pool.rename(IMAGE, VOLUME, "db")
    pool.create(spec(volume=OTHER))
    with pytest.raises(Conflict, match=f"image of {OTHER}"):
        pool.rename(f"web.{OTHER}.raw", VOLUME, "new")
    assert (tmp_path / f"db.{VOLUME}.raw").read_bytes() == b"another"


@pytest.mark.parametrize(
    ("name", "volume"), [("../x", VOLUME), ("a/b", VOLUME), (".x", VOLUME), ("x", "vol-1"), ("x", "../vol"), ("n" * 300, VOLUME)]
)
def test_names_of_images_are_plain(pool: PoolDriver, tmp_path: Path, name: str, volume: str) -> None:
    with pytest.raises(InvalidInput):
        pool.create(spec(name=name, volume=volume))
    assert names(tmp_path) == []


def test_options_of_volumes_are_checked(pool: PoolDriver, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no option 'color'"):
        pool.create(spec(color="red"))
    with pytest.raises(InvalidInput, match="preallocation is one of"):
        pool.create(spec(preallocation="some"))
    assert names(tmp_path) == []


# --- writers ---


def test_a_writer_is_named(pool: PoolDriver, tmp_path: Path) -> None:
    pool.create(spec())
    reader = os.open(tmp_path / IMAGE, os.O_RDONLY)
    guest = os.open(tmp_path / IMAGE, os.O_RDWR)
    try:
        assert pool.writers(IMAGE) == []
        assert locks.lock_for_writing(guest)
        comm = Path("/proc/self/comm").read_text().strip()
        assert [w.who for w in pool.writers(IMAGE)] == [f"{comm} (pid {os.getpid()})"]
        assert not locks.lock_for_writing(reader), "the second writer is refused"
    finally:
        os.close(reader)
        os.close(guest)
    assert pool.writers(IMAGE) == []
    with pytest.raises(NotFound):
        pool.writers("nothing")
