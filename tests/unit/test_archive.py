"""Exports as files: what is written comes back, sparse, and nothing damaged, torn or replaced is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from atoll.model.errors import AlreadyExists, InUse, InvalidInput, NotFound
from atoll.storage import archive
from atoll.storage.archive import ArchivedDisk, Manifest

MIB = 1 << 20
PIECE = MIB
IDENT = "export-1"


class Made:
    """A directory with two images and their export."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "web.atoll")
        self.images = [directory / "a.raw", directory / "b.raw"]
        # Data at both ends, a hole between them, written zeros, and a last piece that is not a whole one.
        with self.images[0].open("wb") as file:
            file.write(os.urandom(MIB // 2))
            file.seek(5 * MIB)
            file.write(bytes(MIB) + os.urandom(MIB))
            file.truncate(9 * MIB + 512)
        with self.images[1].open("wb") as file:
            file.truncate(3 * MIB)
        disks = [ArchivedDisk(name=image.stem, size=image.stat().st_size) for image in self.images]
        self.manifest = Manifest(id=IDENT, piece=PIECE, created=1e9, instance={"name": "web"}, disks=disks)
        self.told: list[float] = []

    def write(self) -> None:
        partial, images = archive.partial_of(self.path, IDENT), [str(image) for image in self.images]
        archive.write(partial, self.manifest, images, lambda percent, text: self.told.append(percent))

    def whole(self, *, overwrite: bool = False) -> None:
        self.write()
        archive.place(self.path, IDENT, overwrite=overwrite)

    def read(self, target: Path, index: int = 0) -> None:
        target.touch()
        os.truncate(target, self.manifest.disks[index].size)
        archive.read(self.path, IDENT, index, str(target), lambda percent, text: None)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_what_was_exported_comes_back_as_sparse_as_it_was(made: Made, tmp_path: Path) -> None:
    made.whole()
    assert archive.look(made.path) == made.manifest
    assert made.told == sorted(made.told)
    for index, image in enumerate(made.images):
        made.read(tmp_path / "back", index)
        assert (tmp_path / "back").read_bytes() == image.read_bytes()
        assert (tmp_path / "back").stat().st_blocks * 512 <= 2 * MIB
        (tmp_path / "back").unlink()
    with tarfile.open(made.path) as tar:
        assert tar.getnames() == [archive.MANIFEST, "disk0/00000000.zst", "disk0/00000006.zst", archive.SUMS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw", "b.raw", "web.atoll"]
    assert os.stat(made.path).st_mode & 0o777 == 0o600


def test_it_can_be_unpacked_without_atoll(made: Made, tmp_path: Path) -> None:
    made.whole()
    subprocess.run(["tar", "-xf", made.path, "-C", tmp_path], check=True, timeout=60)
    unpack = "import sys, zstandard; sys.stdout.buffer.write(zstandard.decompress(sys.stdin.buffer.read()))"
    with (tmp_path / "disk0/00000006.zst").open("rb") as piece:
        raw = subprocess.run([sys.executable, "-c", unpack], stdin=piece, capture_output=True, check=True, timeout=60).stdout
    assert raw == made.images[0].read_bytes()[6 * MIB : 7 * MIB]


@pytest.mark.parametrize("where", [0.01, 0.3, 0.6])
def test_a_changed_byte_is_found_before_it_is_written(made: Made, tmp_path: Path, where: float) -> None:
    made.whole()
    data = bytearray(Path(made.path).read_bytes())
    with tarfile.open(made.path) as tar:
        entry = tar.getmember("disk0/00000006.zst")
    at = entry.offset_data + int(entry.size * where)
    data[at] ^= 1
    Path(made.path).write_bytes(data)
    with pytest.raises(InvalidInput, match="checksum of disk0/00000006"):
        made.read(tmp_path / "back")
    assert (tmp_path / "back").read_bytes()[6 * MIB :].strip(b"\0") == b""


def test_a_torn_file_is_refused_wherever_it_ends(made: Made, tmp_path: Path) -> None:
    made.whole()
    data = Path(made.path).read_bytes()
    with tarfile.open(made.path) as tar:
        last = tar.getmember(archive.SUMS)
    for length in (0, 100, 700, 3000, len(data) // 2, last.offset, last.offset_data, last.offset_data + last.size - 1):
        Path(made.path).write_bytes(data[:length])
        with pytest.raises(InvalidInput, match="whole export"):
            made.read(tmp_path / "back")


def test_parts_that_were_left_out_or_added_are_noticed(made: Made, tmp_path: Path) -> None:
    made.whole()
    subprocess.run(["tar", "--delete", "-f", made.path, "disk0/00000000.zst"], check=True, timeout=60)
    with pytest.raises(InvalidInput, match="list of checksums"):
        made.read(tmp_path / "back")


def test_a_manifest_that_was_changed_is_noticed(made: Made, tmp_path: Path) -> None:
    made.whole()
    data = Path(made.path).read_bytes()
    Path(made.path).write_bytes(data.replace(b'"web"', b'"bad"', 1))
    with pytest.raises(InvalidInput, match="list of checksums"):
        made.read(tmp_path / "back")


def test_another_export_under_the_same_name_is_refused(made: Made, tmp_path: Path) -> None:
    made.whole()
    with pytest.raises(InvalidInput, match="replaced by another one"):
        archive.read(made.path, "export-2", 0, str(tmp_path / "back"), lambda percent, text: None)


def test_nothing_is_overwritten_unless_it_is_asked_for(made: Made) -> None:
    Path(made.path).write_text("mine")
    with pytest.raises(AlreadyExists):
        archive.check_target(made.path, overwrite=False)
    made.write()
    with pytest.raises(AlreadyExists):
        archive.place(made.path, IDENT, overwrite=False)
    assert Path(made.path).read_text() == "mine"
    archive.place(made.path, IDENT, overwrite=True)
    archive.place(made.path, IDENT, overwrite=True)
    archive.place(made.path, IDENT, overwrite=False)
    assert archive.look(made.path).id == IDENT


def test_a_link_or_directory_is_no_place(made: Made, tmp_path: Path) -> None:
    os.symlink("/etc/passwd", made.path)
    with pytest.raises(InvalidInput, match="not a file"):
        archive.check_target(made.path, overwrite=True)
    with pytest.raises(NotFound, match="no directory"):
        archive.check_target(str(tmp_path / "no" / "web.atoll"), overwrite=False)
    os.symlink(tmp_path / "victim", archive.partial_of(str(tmp_path / "x"), IDENT))
    made.path = str(tmp_path / "x")
    with pytest.raises(OSError):
        made.write()
    assert not (tmp_path / "victim").exists()


def test_what_was_begun_is_written_anew_and_can_be_discarded_but_not_while_somebody_writes(made: Made, tmp_path: Path) -> None:
    partial = Path(archive.partial_of(made.path, IDENT))
    partial.write_bytes(os.urandom(30 * MIB))
    made.whole()
    made.read(tmp_path / "back")
    made.write()
    import fcntl

    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InUse):
            archive.discard(made.path, IDENT)
        with pytest.raises(InUse):
            made.write()
    archive.discard(made.path, IDENT)
    archive.discard(made.path, IDENT)
    assert not partial.exists()
    assert archive.look(made.path).id == IDENT


def test_as_a_program_it_tells_progress_and_errors(made: Made) -> None:
    def run(order: dict[str, object]) -> list[dict[str, object]]:
        argv = [sys.executable, "-P", "-m", "atoll.storage.archive", str(os.getpid())]
        done = subprocess.run(argv, input=json.dumps(order), capture_output=True, text=True, check=True, timeout=60)
        return [json.loads(line) for line in done.stdout.splitlines()]

    partial = archive.partial_of(made.path, IDENT)
    images = [str(image) for image in made.images]
    said = run({"what": "write", "partial": partial, "manifest": made.manifest.model_dump(mode="json"), "images": images})
    assert "percent" in said[0]
    assert said[-1]["result"]["size"] == os.stat(partial).st_size  # type: ignore[index]
    assert run({"what": "look", "path": "/nonexistent"})[-1]["error"]["code"] == "not_found"  # type: ignore[index]
