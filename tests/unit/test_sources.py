"""What may be imported, and what an image must not be able to do."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from atoll.model.errors import InvalidInput, NotFound
from atoll.storage import sources

MIB = 1 << 20
needs_qemu = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-utils is not installed")


def look(path: Path, chosen: str | None = None) -> sources.Source:
    with sources.opened(str(path)) as fd:
        return sources.look(fd, str(path), chosen)


def qcow2(path: Path, *options: str, size: str = "8M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True, timeout=60)
    return path


def test_raw(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"\x55" * 700)
    assert look(image) == sources.Source(format="raw", size=1024)
    image.write_bytes(b"")
    with pytest.raises(InvalidInput, match="empty"):
        look(image)
    with pytest.raises(NotFound):
        look(tmp_path / "none")


@needs_qemu
def test_qcow2_by_its_header_and_raw_when_told(tmp_path: Path) -> None:
    image = qcow2(tmp_path / "a", size="8000000")
    assert look(image) == sources.Source(format="qcow2", size=8000000)
    told = look(image, "raw")
    assert (told.format, told.size) == ("raw", -(-image.stat().st_size // 512) * 512)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(MIB))
    with pytest.raises(InvalidInput, match="is not a qcow2 image"):
        look(plain, "qcow2")


@needs_qemu
def test_images_that_name_other_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * MIB)
    backed = qcow2(tmp_path / "backed", "-b", str(secret), "-F", "raw")
    with pytest.raises(InvalidInput, match="backing file"):
        look(backed)
    outside = qcow2(tmp_path / "outside", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    with pytest.raises(InvalidInput, match="another file"):
        look(outside)
    with pytest.raises(InvalidInput, match="backing file"):
        look(backed, "qcow2")
    # Even if the header changes after we looked: QEMU is told that there is no backing file.
    with sources.opened(str(backed)) as fd:
        out = tmp_path / "out"
        argv = ["qemu-img", "convert", "-O", "raw", sources.as_qemu(fd, "qcow2"), str(out)]
        subprocess.run(argv, check=True, pass_fds=(fd,), timeout=60)
    assert b"x" not in out.read_bytes()


def header(version: int = 3, *, crypt: int = 0, features: int = 0, size: int = MIB) -> bytes:
    start = b"QFI\xfb" + struct.pack(">IQIIQI", version, 0, 0, 16, size, crypt)
    return start.ljust(72, b"\0") + struct.pack(">Q", features) + bytes(432)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (header(1), "version 1"),
        (header(crypt=2), "encrypted"),
        (header(features=2), "corrupt"),
        (header(features=4), "another file"),
        (header(features=1 << 9), "does not know"),
        (header(size=1 << 63), "bytes"),
        (b"KDMV" + bytes(508), "VMDK"),
        (b"vhdxfile" + bytes(504), "VHDX"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>" + bytes(512), "VDI"),
    ],
)
def test_what_is_not_imported(tmp_path: Path, head: bytes, why: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(head)
    with pytest.raises(InvalidInput, match=why):
        look(image)


@pytest.mark.timeout(20)
def test_only_files_and_block_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(InvalidInput):
            look(path)
