"""The lab's guest: its ring check, and the archive that it boots from."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from atoll.lab.guest import acks, append, cpio
from atoll.lab.guest.ring import SLOTS, check_ring


def ring(path: Path, *numbers: int, shift: int = 0) -> Path:
    data = bytearray(SLOTS * 512)
    for number in numbers:
        at = (number + shift) % SLOTS * 512
        data[at : at + 24] = struct.pack("<8sQQ", b"CTRREC01", number, number ^ 0xFFFFFFFFFFFFFFFF)
    path.write_bytes(data)
    return path


def test_a_whole_ring(tmp_path: Path) -> None:
    assert check_ring(ring(tmp_path / "d", *range(1, 11)), 10) == check_ring(tmp_path / "d", 3)
    report = check_ring(tmp_path / "d", 10)
    assert (report.top, report.missing, report.ok) == (10, (), True)
    wrapped = check_ring(ring(tmp_path / "d", *range(953, 3001)), 3000)
    assert (wrapped.top, wrapped.missing, wrapped.ok) == (3000, (), True)
    assert check_ring(ring(tmp_path / "d"), 0).ok


def test_what_is_lost_is_seen(tmp_path: Path) -> None:
    assert not check_ring(ring(tmp_path / "d", *range(1, 11)), 11).ok
    report = check_ring(ring(tmp_path / "d", 1, 2, 4, 5), 5)
    assert (report.missing, report.ok) == ((3,), False)
    assert not check_ring(ring(tmp_path / "d", *range(1, 6), shift=1), 5).ok
    damaged = bytearray(ring(tmp_path / "d", *range(1, 6)).read_bytes())
    damaged[3 * 512 + 16] ^= 1
    (tmp_path / "d").write_bytes(damaged)
    assert check_ring(tmp_path / "d", 5).missing == (3,)
    (tmp_path / "d").write_bytes(b"")
    assert not check_ring(tmp_path / "d", 1).ok


def test_a_line_that_was_cut_is_no_acknowledgement() -> None:
    assert acks("CTR RESUME 0\r\n# ACK 1\r\nACK 2\nSIZE vda 5\nACK 34") == [1, 2]


def test_append() -> None:
    assert append(ctr="vda", ctrdelay=5, more="deaf").endswith(" ctr=vda ctrdelay=5 deaf")
    assert "ctr" not in append()


@pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio")
def test_the_archive_is_one(tmp_path: Path) -> None:
    members = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.file("init", b"#!x\n", 0o755),
        cpio.file("a", b"12345"),
    ]
    data = cpio.archive(members)
    assert data == cpio.archive(members)
    shown = subprocess.run(["cpio", "-itv", "--quiet"], input=data, capture_output=True, check=True).stdout.decode()
    lines = [line.split() for line in shown.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("-rwxr-xr-x", "init"),
        ("-rw-r--r--", "a"),
    ]
    content = subprocess.run(["cpio", "-i", "--quiet", "--to-stdout", "a"], input=data, capture_output=True, check=True).stdout
    assert content == b"12345"
