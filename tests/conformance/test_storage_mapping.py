"""What every node half must do alike for administrators and OS scripts: block devices, real ones."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.model.errors import Conflict, DiskInUse, NotFound
from atoll.model.messages import Connection, PoolRef
from atoll.monitor import residue
from atoll.storage import registry
from atoll.storage.contract import Connector, VolumeSpec
from atoll.storage.files import loops

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")]
MIB = 1 << 20
#: Drivers of image files; images in Ceph are mapped in integration/test_storage_rbd_mapping.py.
FILES = [d.name for d in registry.drivers() if any(option.name == "path" for option in d.options)]


class Place:
    """A pool, its node half, and one volume, whose id no other test on this machine has."""

    def __init__(self, driver: str, path: Path) -> None:
        options = {"path": str(path), "mount": "none", "preallocation": "off", "locking": "on"}
        ref = PoolRef(id="pool-a", name="a", driver=driver, options=options, node="node1", cluster="c")
        pool = registry.pool(ref)
        pool.prepare(create=True)
        self.volume = f"vol-{os.urandom(9).hex()[:17]}"
        logical_id = pool.create(VolumeSpec(volume=self.volume, name="web", size=8 * MIB))
        self.connection: Connection = pool.connection(logical_id, self.volume, 8 * MIB)
        self.half: Connector = registry.connector(driver)
        self.image = (path / "node1" if driver == "fakemirror" else path) / logical_id

    def map(self, *, read_only: bool = False) -> str:
        return str(self.half.map(self.connection, read_only=read_only).path)


@pytest.fixture(params=FILES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(request.param, tmp_path)
    yield made
    made.half.unmap(made.connection)


def test_a_mapping_is_a_block_device_and_what_is_written_is_in_the_volume(place: Place) -> None:
    path = place.map()
    assert place.map() == path
    assert int(subprocess.run(["blockdev", "--getsize64", path], capture_output=True, check=True, timeout=60).stdout) == 8 * MIB
    with open(path, "r+b") as device:
        device.seek(3 * MIB)
        device.write(b"written through it")
    place.half.unmap(place.connection)
    place.half.unmap(place.connection)
    assert place.image.read_bytes()[3 * MIB :].startswith(b"written through it")
    assert place.volume not in loops.mapped()


def test_a_read_only_mapping_takes_no_write_and_is_no_other(place: Place) -> None:
    path = place.map(read_only=True)
    # Newer kernels let it be opened for writing, and refuse the write.
    argv = ["dd", "if=/dev/urandom", f"of={path}", "count=1", "conv=fsync,notrunc"]
    assert subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode != 0
    assert place.image.read_bytes().strip(b"\0") == b""
    with pytest.raises(Conflict, match="in another way"):
        place.map()


def test_it_does_not_end_while_somebody_has_it_open(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.detach, "__defaults__", (0.2, None))
    with open(place.map(), "r+b") as device:
        with pytest.raises(DiskInUse, match="still in use"):
            place.half.unmap(place.connection)
        device.write(b"late")
    place.half.unmap(place.connection)
    assert place.image.read_bytes().startswith(b"late")


def test_forgotten_mappings_are_ended_and_others_are_left_alone(place: Place, tmp_path: Path) -> None:
    place.map()
    foreign = tmp_path / "foreign"
    foreign.write_bytes(bytes(MIB))
    device = subprocess.run(["losetup", "-f", "--show", foreign], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    try:
        others = [volume for volume in loops.mapped() if volume != place.volume]
        assert place.half.unmap_others([*others, place.volume]) == []
        assert place.volume in loops.mapped()
        assert place.half.unmap_others(others) == [place.volume]
        assert subprocess.run(["losetup", device], capture_output=True, check=False, timeout=60).returncode == 0
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=60)


def test_what_is_not_there_cannot_be_mapped(place: Place) -> None:
    place.image.unlink()
    with pytest.raises(NotFound):
        place.map()
    place.image.touch()


def test_only_forgotten_mappings_of_this_node_are_residue(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "attached").mkdir(parents=True)
    device = Path(place.map()).name
    assert residue.found(run_dir)["loops"].get(device) == str(place.image)
    (run_dir / "attached" / "hand:i-1.json").write_text(json.dumps({place.volume: {}}))
    assert device not in residue.found(run_dir)["loops"]
    (run_dir / "attached" / "hand:i-1.json").unlink()
    # Nodes in containers share the kernel's devices.
    monkeypatch.setattr(loops, "_machine", lambda: "another")
    assert device not in residue.found(run_dir)["loops"]
    monkeypatch.undo()
