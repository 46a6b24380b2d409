"""Our locks and QEMU's are the same: each sees the other's writers."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.model.errors import DiskInUse
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import PoolDriver, VolumeSpec
from atoll.storage.files import locks

pytestmark = pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-utils is not installed")
VOLUME = "vol-" + "1" * 17
MIB = 1 << 20


@pytest.fixture(params=["file", "sharedfile", "fakemirror"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> PoolDriver:
    options = {"path": str(tmp_path), "mount": "none"}
    found = registry.pool(PoolRef(id="pool-a", name="a", driver=request.param, options=options, node="n", cluster="c"))
    found.prepare(create=True)
    return found


@pytest.fixture
def image(pool: PoolDriver) -> str:
    return pool.create(VolumeSpec(volume=VOLUME, name="web", size=16 * MIB))


def _path(pool: PoolDriver, image: str) -> str:
    connection = pool.connection(image, VOLUME, 16 * MIB)
    attached = registry.connector(pool.ref.driver).attach(connection, "userspace")
    assert attached.path is not None
    return attached.path


@contextmanager
def _qemu_io(path: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with the image open."""
    with subprocess.Popen(["qemu-io", "-f", "raw", *options, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 30)[0], "its prompt comes when the image is open"
            yield process
        finally:
            process.kill()


def test_a_writer_is_seen_and_named_until_it_dies(pool: PoolDriver, image: str) -> None:
    with _qemu_io(_path(pool, image)) as process:
        assert [w.who for w in pool.writers(image)] == [f"qemu-io (pid {process.pid})"]
        for call in (
            lambda: pool.delete(image),
            lambda: pool.rename(image, VOLUME, "new"),
            lambda: pool.adopt(image, VOLUME),
        ):
            with pytest.raises(DiskInUse, match="qemu-io"):
                call()
        assert pool.grow(image, 32 * MIB) == 32 * MIB
        process.kill()
        process.wait()
        assert pool.writers(image) == []


def test_a_reader_is_no_writer(pool: PoolDriver, image: str) -> None:
    with _qemu_io(_path(pool, image), "-r"):
        assert pool.writers(image) == []


def test_qemu_without_locks_is_not_seen(pool: PoolDriver, image: str) -> None:
    """Why ``writers`` is measured and never assumed."""
    options = f"driver=raw,file.driver=file,file.locking=off,file.filename={_path(pool, image)}"
    command = ["qemu-io", "--image-opts", options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 30)[0]
        assert pool.writers(image) == []
        process.kill()


def test_qemu_refuses_what_we_have_locked(pool: PoolDriver, image: str) -> None:
    path = _path(pool, image)
    with open(path, "rb+") as guest:
        assert locks.lock_for_writing(guest.fileno())
        done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path], check=False, capture_output=True, text=True, timeout=30)
        assert done.returncode != 0
        assert 'Failed to get "write" lock' in done.stderr
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path], check=True, capture_output=True, timeout=30)


@pytest.mark.qemu
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86 is not installed")
def test_a_guest_is_a_writer_and_two_guests_are_refused(pool: PoolDriver, image: str, tmp_path: Path) -> None:
    connection = pool.connection(image, VOLUME, 16 * MIB)
    blockdev = registry.connector(pool.ref.driver).attach(connection, "userspace").blockdev
    assert blockdev is not None
    cache = "on" if blockdev["cache"]["direct"] else "off"
    node = f"driver=file,node-name=disk,filename={blockdev['filename']},locking=on,aio=threads,discard=unmap,cache.direct={cache}"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-S", "-blockdev", node]
    command += ["-device", "virtio-blk-pci,drive=disk"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as guest:
        try:
            end = time.monotonic() + 60
            while not pool.writers(image) and time.monotonic() < end:
                time.sleep(0.05)
            assert [w.who for w in pool.writers(image)] == [f"qemu-system-x86 (pid {guest.pid})"]
            second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            assert 'Failed to get "write" lock' in second.stderr
        finally:
            guest.kill()
    assert pool.writers(image) == []
    assert os.path.getsize(blockdev["filename"]) == 16 * MIB
