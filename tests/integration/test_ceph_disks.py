"""Disks for OSDs, on real block devices: what is somebody's is never taken, and never erased."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.deploy.ceph import disks
from atoll.lab import loops
from atoll.model.errors import Conflict

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")]
SIZE = 2 << 30
OURS, THEIRS = "11111111-2222-4333-8444-555555555555", "99999999-2222-4333-8444-555555555555"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    loops.make_image(tmp_path / "disk.img", SIZE)
    device = loops.attach(tmp_path / "disk.img")
    yield device
    loops.detach(tmp_path)


def label(device: str, uuid: str) -> None:
    """The beginning of a disk that BlueStore has."""
    with open(device, "r+b") as file:
        file.write(b"bluestore block device\n" + uuid.encode() + b"\n" + b"x" * 4000)
        file.seek(1 << 20)
        file.write(b"precious")
        os.fsync(file.fileno())


async def test_an_empty_disk_may_be_taken(disk: str) -> None:
    assert await disks.objection(disk) == ("", SIZE)
    found = await disks.take(disk, OURS)
    assert (found.size, found.osd) == (SIZE, "")


@pytest.mark.parametrize(("command", "said"), [("mkfs.xfs -q", "TYPE=xfs"), ("mkswap -q", "TYPE=swap")])
async def test_what_is_on_a_disk_is_told(disk: str, command: str, said: str) -> None:
    subprocess.run([*command.split(), disk], check=True, capture_output=True)
    why, _ = await disks.objection(disk)
    assert said in why
    with pytest.raises(Conflict, match="is not empty"):
        await disks.take(disk, OURS)


async def test_a_mounted_disk_is_in_use(disk: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.xfs", "-q", disk], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", disk, str(place)], check=True)
    try:
        assert (await disks.objection(disk))[0] == "is in use (mounted, or part of something)"
        assert disks.erase(disk, OURS) is False
    finally:
        subprocess.run(["umount", str(place)], check=True)


async def test_another_osds_disk_is_neither_taken_nor_erased(disk: str) -> None:
    label(disk, THEIRS)
    assert THEIRS in (await disks.objection(disk))[0]
    assert THEIRS in (await disks.objection(disk, frozenset({OURS})))[0]
    assert disks.erase(disk, OURS) is False
    with open(disk, "rb") as file:
        assert file.read(4096).startswith(b"bluestore block device\n" + THEIRS.encode())
        file.seek(1 << 20)
        assert file.read(8) == b"precious"


async def test_our_own_disk_is_taken_again_and_erased(disk: str) -> None:
    label(disk, OURS)
    assert (await disks.take(disk, OURS)).osd == OURS
    assert disks.erase(disk, OURS) is True
    assert await disks.objection(disk) == ("", SIZE)
    with open(disk, "rb") as file:
        file.seek(1 << 20)
        assert file.read(8) == bytes(8)
    assert disks.erase(disk, OURS) is False, "a second time there is nothing"


async def test_what_is_no_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    assert (await disks.objection(str(tmp_path / "file")))[0] == "is not a block device"
    assert (await disks.objection("/dev/nothing-there"))[0] == "is not there"
    assert disks.erase("/dev/nothing-there", OURS) is False
