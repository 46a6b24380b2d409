"""Pools on real mounts: what is not mounted, full, read-only or frozen. Each test runs in a mount namespace of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.model.errors import DeadlineExceeded, PoolFull, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import PoolDriver, VolumeSpec
from atoll.storage.files import making
from atoll.storage.files.directory import Directory
from atoll.storage.host import StorageHost

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")]
VOLUME, OTHER = "vol-" + "1" * 17, "vol-" + "2" * 17
MIB = 1 << 20


def made(path: Path, driver: str = "sharedfile", **options: str) -> PoolDriver:
    return registry.pool(PoolRef(id="pool-a", name="a", driver=driver, options={"path": str(path), **options}, node="node1", cluster="c"))


def spec(size: int = MIB, volume: str = VOLUME, **options: str) -> VolumeSpec:
    return VolumeSpec(volume=volume, name="web", size=size, options=options)


def system(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


@contextmanager
def raises(error: type[Exception], words: str = ".") -> Iterator[None]:
    with pytest.raises(error, match=words):
        yield


def privately(body: Callable[[Path], None], place: Path) -> None:
    """Run a function of this module in a mount namespace: whatever it mounts goes with it."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import {Path(__file__).stem} as m; "
    code += f"m.{body.__name__}(Path({str(place)!r}))"
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        lambda: unmounted_share,
        lambda: unmounted_local_disk,
        lambda: named_mount,
        lambda: other_share,
        lambda: unmount_in_the_middle,
        lambda: full,
        lambda: read_only,
        lambda: writes_that_fail,
    ],
    ids=lambda body: body.__code__.co_names[0],
)
def test_on_a_mount(body: Callable[[], Callable[[Path], None]]) -> None:
    # What is below a mount that is missing is the root file system; /tmp may be another one.
    root = os.stat("/").st_dev
    with tempfile.TemporaryDirectory(dir=next(d for d in ("/tmp", "/var/tmp", "/root") if os.stat(d).st_dev == root)) as place:
        privately(body(), Path(place))


def calls(pool: PoolDriver, image: str) -> list[Callable[[], object]]:
    return [
        lambda: pool.prepare(create=True),
        lambda: pool.prepare(create=False),
        lambda: pool.create(spec(volume=OTHER)),
        lambda: pool.delete(image),
        lambda: pool.grow(image, 2 * MIB),
        lambda: pool.rename(image, VOLUME, "db"),
        lambda: pool.stat(image),
        pool.volumes,
        pool.space,
        lambda: pool.adopt(image, VOLUME),
        lambda: pool.writers(image),
        lambda: pool.probe_writers("look"),
        pool.forget,
        lambda: registry.connector(pool.ref.driver).attach(pool.connection(image, VOLUME, MIB), "userspace"),
        lambda: registry.connector(pool.ref.driver).resized(pool.connection(image, VOLUME, MIB)),
    ]


def unmounted_share(place: Path) -> None:
    pool = made(place)
    system("mount", "-t", "tmpfs", "share", str(place))
    assert pool.prepare(create=True).details["file system"] == "tmpfs"
    image = pool.create(spec())
    system("umount", str(place))
    for call in calls(pool, image):
        with raises(PoolUnavailable, "root file system.*bare mount point"):
            call()
    assert not pool.check().ok
    assert os.listdir(place) == []


def unmounted_local_disk(place: Path) -> None:
    """For node-local pools any file system will do: here the missing mark tells."""
    pool = made(place, "file")
    system("mount", "-t", "tmpfs", "disk", str(place))
    pool.prepare(create=True)
    image = pool.create(spec())
    system("umount", str(place))
    # Marking it anew is an administrator's word for it, and forgetting what is not marked is success.
    for number, call in enumerate(calls(pool, image)):
        if number not in (0, 12):
            with raises(PoolUnavailable, "bare mount point"):
                call()
    assert os.listdir(place) == []


def named_mount(place: Path) -> None:
    point, images = place / "a b", place / "a b" / "images"
    point.mkdir()
    system("mount", "-t", "tmpfs", "share", str(point))
    images.mkdir()
    for driver in ("file", "sharedfile"):
        pool = made(images, driver, mount=str(point))
        assert pool.prepare(create=True).details["mount"] == str(point)
        image = pool.create(spec())
        pool.delete(image)
    with raises(PoolUnavailable, "must be on /mnt"):
        made(images, mount="/mnt").prepare(create=True)
    system("umount", str(point))
    images.mkdir()
    with raises(PoolUnavailable, f"must be on {point}, which is not mounted"):
        pool.prepare(create=True)
    assert os.listdir(images) == []


def other_share(place: Path) -> None:
    system("mount", "-t", "tmpfs", "share", str(place))
    made(place).prepare(create=True)
    system("mount", "-t", "tmpfs", "another", str(place))
    with raises(PoolUnavailable, "not mounted, or it is another one"):
        made(place).prepare(create=False)
    assert os.listdir(place) == []


def unmount_in_the_middle(place: Path) -> None:
    pool = made(place)
    system("mount", "-t", "tmpfs", "share", str(place))
    pool.prepare(create=True)
    with Directory(pool.ref, shared=True).open() as fd:
        system("umount", "--lazy", str(place))
        making.create(fd, "web", VOLUME, MIB, preallocation="full", owner="", locking=True)
        assert f"web.{VOLUME}.raw" in os.listdir(fd)
    assert os.listdir(place) == []


def full(place: Path) -> None:
    system("mount", "-t", "tmpfs", "-o", "size=100m", "share", str(place))
    pool = made(place)
    pool.prepare(create=True)
    before = pool.space()
    assert before.total == 100 * MIB
    with raises(PoolFull, "are free"):
        pool.create(spec(200 * MIB, preallocation="falloc"))
    making.RESERVE = -(1 << 40)
    for how in ("falloc", "full"):
        with raises(PoolFull, "no space left"):
            pool.create(spec(200 * MIB, preallocation=how))
    image = pool.create(spec())
    for how in ("falloc", "full"):
        with raises(PoolFull, "no space left"):
            made(place, preallocation=how).grow(image, 200 * MIB)
        stat = pool.stat(image)
        assert stat is not None
        assert stat.size == MIB
    making.RESERVE = 64 * MIB
    (place / "filler").write_bytes(bytes(50 * MIB))
    with raises(PoolFull, "reserve of 64M"):
        pool.create(spec(volume=OTHER))
    with raises(PoolFull, "reserve of 64M"):
        pool.grow(image, 2 * MIB)
    assert sorted(v.logical_id for v in pool.volumes()) == ["filler", image]
    assert pool.space().free >= before.free - 51 * MIB


def read_only(place: Path) -> None:
    system("mount", "-t", "tmpfs", "share", str(place))
    pool = made(place)
    pool.prepare(create=True)
    image = pool.create(spec())
    system("mount", "-o", "remount,ro", str(place))
    for call in (lambda: pool.create(spec(volume=OTHER)), lambda: pool.delete(image), lambda: pool.grow(image, 2 * MIB)):
        with raises(PoolUnavailable, "Read-only file system"):
            call()
    status = pool.check()
    assert not status.ok
    assert "read-only" in status.reason


def _disk(place: Path) -> Path:
    """A file system of its own on a loop device, which goes when it is unmounted."""
    point = place / "point"
    point.mkdir()
    system("truncate", "-s", "64M", str(place / "disk"))
    system("mkfs.ext4", "-q", str(place / "disk"))
    system("mount", "-o", "loop", str(place / "disk"), str(point))
    return point


def writes_that_fail(place: Path) -> None:
    """A file system whose disk has gone (here: shut down, as in a power cut)."""
    point = _disk(place)
    try:
        making.RESERVE = 0
        pool = made(point)
        pool.prepare(create=True)
        image = pool.create(spec())
        system("xfs_io", "-x", "-c", "shutdown", str(point))
        for call in (lambda: pool.create(spec(volume=OTHER)), lambda: pool.grow(image, 2 * MIB), lambda: pool.delete(image)):
            with raises(PoolUnavailable):
                call()
    finally:
        system("umount", str(point))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_storage_that_hangs_in_the_kernel(tmp_path: Path) -> None:
    privately(frozen, tmp_path)


def frozen(place: Path) -> None:
    """Writes to a frozen file system wait in the kernel, where no signal reaches them."""
    point = _disk(place)
    making.RESERVE = 0
    # If anything goes wrong: thaw it, or this test's processes could never end.
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    signal.alarm(90)
    try:
        asyncio.run(_frozen(point))
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(point)], check=False, capture_output=True, timeout=30)
        signal.alarm(0)
        _unmount(point)


def _unmount(point: Path) -> None:
    end = time.monotonic() + 20
    while subprocess.run(["umount", str(point)], check=False, capture_output=True, timeout=30).returncode:
        assert time.monotonic() < end
        time.sleep(0.1)


async def _frozen(point: Path) -> None:
    host = StorageHost()
    ref = made(point).ref
    sticky = {"action": "hold"}
    await host.pool(ref, "prepare", 30, create=True)
    await host.pool(ref, "probe_writers", 30, **sticky)
    # All of its workers have begun: one that is still starting would not hang with the storage.
    await asyncio.gather(*(host.pool(ref, "volumes", 60) for _ in range(6)))
    # Made here: for the workers, with their usual reserve, the disk is too small.
    image = made(point).create(spec())
    system("fsfreeze", "--freeze", str(point))
    hanging = [asyncio.create_task(host.pool(ref, "delete", 3.0, logical_id=image)) for _ in range(5)]
    start = time.monotonic()
    for task in hanging:
        with raises(DeadlineExceeded):
            await task
    assert "3 processes hang in the kernel" in host.stalled()[ref.id]
    with raises(PoolUnavailable, "is stalled: 3 processes hang"):
        await host.pool(ref, "stat", 30, logical_id=image)
    assert time.monotonic() - start < 15, "the agent answers all the while"
    system("fsfreeze", "--unfreeze", str(point))
    async with asyncio.timeout(20):
        while True:
            if not host.stalled():
                break
            await asyncio.sleep(0.05)
    await host.pool(ref, "delete", 30, logical_id=image)
    assert await host.pool(ref, "volumes", 30) == []
    await host.close()
