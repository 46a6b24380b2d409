"""Images in a real Ceph as block devices of this machine, by the way that needs no kernel module of Ceph's."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.lab.smallceph import missing
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, HostError, NotFound, NotSupported
from atoll.model.messages import Connection, PoolRef
from atoll.storage import registry
from atoll.storage.contract import Connector, FencingPool, VolumeSpec
from atoll.storage.files import loops
from atoll.storage.rbd.mapping import choice, fuse, here, loopback, records, tool
from atoll.storage.rbd.mapping.way import Image
from ceph_support import Ceph

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(os.geteuid() != 0, reason="block devices need root"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
MIB = 1 << 20


class Place:
    """A pool whose volumes have users of their own, one volume in it, and the node half. No other test has its id."""

    def __init__(self, ceph: Ceph, ref: PoolRef) -> None:
        self.ceph, self.ref = ceph, ref
        pool = registry.pool(ref)
        assert isinstance(pool, FencingPool)
        self.pool = pool
        self.volume = f"vol-{os.urandom(9).hex()[:17]}"
        self.image = pool.create(VolumeSpec(volume=self.volume, name="web", size=8 * MIB))
        self.connection: Connection = pool.connection(self.image, self.volume, 8 * MIB, node="node1")
        self.half: Connector = registry.connector(ref.driver)

    def map(self, *, read_only: bool = False) -> str:
        return str(self.half.map(self.connection, read_only=read_only).path)

    def attach(self) -> str:
        return str(self.half.attach(self.connection, "kernelspace").path)

    def unmap(self) -> None:
        self.half.unmap(self.connection)

    def content(self) -> bytes:
        import rbd

        cluster, ioctx = self.ceph.client(self.ref)
        with rbd.Image(ioctx, self.image, read_only=True) as image:
            found = bytes(image.read(0, image.size()))
        ioctx.close()
        cluster.shutdown()
        return found

    def mapped(self) -> Image:
        record = records.find(self.volume)
        assert record is not None
        return record.image

    def traces(self) -> list[str]:
        """What is on this machine of the volume: processes, mounts, devices, files, and a watch in Ceph."""
        found = [f"pid {pid}: {argv}" for pid, argv in argvs() if self.volume in argv]
        found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if self.volume in line]
        found += [f"loop{number}" for volume, number in loops.mapped().items() if volume == self.volume]
        found += [str(path) for top in (records.directory(), Path("/dev/atoll")) for path in top.glob(f"*{self.volume}*")]
        return found + [writer.who for writer in self.pool.writers(self.image)]


def argvs() -> Iterator[tuple[int, str]]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield int(entry), Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


@pytest.fixture(scope="module")
def ref(ceph: Ceph) -> PoolRef:
    made = ceph.namespace_ref(isolation="volume")
    registry.pool(made).prepare(create=True)
    return made


@pytest.fixture
def place(ceph: Ceph, ref: PoolRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path))
    made = Place(ceph, ref)
    yield made
    here.detach(made.volume)
    assert made.traces() == []


def write(path: str, data: bytes, offset: int = 0) -> None:
    with open(path, "r+b", buffering=0) as device:
        device.seek(offset)
        device.write(data)
        os.fsync(device.fileno())


def test_an_image_is_a_block_device_and_goes_without_a_trace(place: Place) -> None:
    path = place.map()
    assert place.map() == path
    assert int(subprocess.run(["blockdev", "--getsize64", path], capture_output=True, check=True, timeout=60).stdout) == 8 * MIB
    # What is not flushed by whoever wrote is when it is unmapped.
    with open(path, "r+b") as device:
        device.seek(3 * MIB)
        device.write(b"written through it")
    keys = [row["key"] for row in place.ceph.ask("auth", "ls")["auth_dump"]]
    assert not [argv for _, argv in argvs() if any(key in argv for key in keys)]
    assert len(place.pool.writers(place.image)) == 1
    place.unmap()
    place.unmap()
    assert place.content()[3 * MIB :].startswith(b"written through it")
    assert place.traces() == []


def test_what_was_discarded_takes_no_room(place: Place) -> None:
    path = place.map()
    write(path, b"x" * MIB)
    subprocess.run(["blkdiscard", "-o", "0", "-l", str(4 * MIB), path], check=True, timeout=60)
    place.unmap()
    assert place.content() == bytes(8 * MIB)


def test_a_read_only_mapping_takes_no_write_and_is_no_other(place: Place) -> None:
    path = place.map(read_only=True)
    argv = ["dd", "if=/dev/urandom", f"of={path}", "count=1", "conv=fsync,notrunc"]
    assert subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode != 0
    with pytest.raises(Conflict, match="to be read only"):
        place.map()
    place.unmap()
    place.map()
    with pytest.raises(Conflict, match="to be written"):
        place.map(read_only=True)
    place.unmap()
    assert place.content() == bytes(8 * MIB)


def test_it_does_not_end_while_somebody_has_it_open(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.detach, "__defaults__", (0.2, None))
    with open(place.map(), "r+b") as device:
        with pytest.raises(DiskInUse, match="still in use"):
            place.unmap()
        device.write(b"late")
    place.unmap()
    assert place.content().startswith(b"late")


def test_what_was_mapped_under_another_name_is_mapped_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left by a start that failed; the volume was renamed then."""
    monkeypatch.setattr(loops.detach, "__defaults__", (0.2, None))
    monkeypatch.setattr(loops.drop, "__defaults__", (0.2,))
    path = place.attach()
    with open(path, "r+b") as device:
        device.write(b"kept")
        renamed = place.connection.model_copy(update={"data": {**place.connection.data, "image": "other"}})
        with pytest.raises(DiskInUse):
            place.half.attach(renamed, "kernelspace")
    with pytest.raises((NotFound, HostError), match="other"):
        place.half.attach(renamed, "kernelspace")
    assert place.attach() == path
    place.half.detach(place.connection)
    assert place.content().startswith(b"kept")


def test_guests_have_a_device_of_their_own_that_grows_in_use(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_GUEST_USER", "nobody")
    path = place.attach()
    assert path == f"/dev/atoll/{place.volume}"
    found = os.stat(path)
    assert (found.st_uid, found.st_mode & 0o777) == (65534, 0o600)
    below = place.half.map(place.connection, read_only=False)
    assert (os.stat(str(below.path)).st_rdev, os.stat(str(below.path)).st_uid, below.way) == (found.st_rdev, 0, "fuse+loop")
    with open(path, "r+b", buffering=0) as device:
        place.pool.grow(place.image, 16 * MIB)
        assert place.half.resized(place.connection.model_copy(update={"size": 16 * MIB})) == 16 * MIB
        device.seek(12 * MIB)
        device.write(b"beyond its first size" + bytes(512 - 21))
    place.half.detach(place.connection)
    assert place.traces() == []
    assert place.content()[12 * MIB :].startswith(b"beyond its first size")


def test_who_is_shut_out_gets_errors_and_can_still_be_unmapped(place: Place) -> None:
    path = place.attach()
    write(path, b"before")
    place.pool.note(place.image)
    assert len(place.pool.fence(place.image, "all", place.volume)) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="error") as refused:
            write(path, b"after!")
        assert refused.value.errno == errno.EIO
    place.half.detach(place.connection)
    assert place.content().startswith(b"before")


def test_a_person_is_told_that_the_last_writes_are_lost(place: Place) -> None:
    path = place.map()
    with open(path, "r+b") as device:
        device.write(b"never")
        device.flush()
        place.pool.fence(place.image, "all")
    with pytest.raises(HostError, match="may be lost"):
        place.unmap()
    place.unmap()
    assert place.traces() == []


def test_while_ceph_does_not_answer_it_stays_mapped_and_nothing_is_lost(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    device = os.open(place.map(), os.O_RDWR)
    try:
        place.ceph.signal("osd", signal.SIGSTOP)
        # A whole page, which needs nothing to be read first.
        os.pwrite(device, b"late" * 1024, 0)
        with monkeypatch.context() as hasty:
            hasty.setattr(fuse, "_FLUSH", 1.0)
            with pytest.raises(DeadlineExceeded, match="stays mapped"):
                place.unmap()
        assert records.find(place.volume) is not None
        assert place.volume in loops.mapped()
    finally:
        place.ceph.signal("osd", signal.SIGCONT)
        os.close(device)
    place.unmap()
    assert place.content().startswith(b"late")


def test_two_nodes_have_it_mapped_and_write_one_after_the_other(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a migration: nothing that one has read before is shown after the other has written."""
    source = place.attach()
    write(source, b"a" * 4096)
    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(loops, "_machine", lambda: "f" * 32)
    target = str(place.half.map(place.connection, read_only=False).path)
    assert os.stat(target).st_rdev != os.stat(source).st_rdev

    def direct(path: str) -> bytes:
        return subprocess.run(
            ["dd", f"if={path}", "bs=4096", "count=1", "iflag=direct"], capture_output=True, check=True, timeout=60
        ).stdout

    assert direct(target) == b"a" * 4096
    write(source, b"b" * 4096)
    assert direct(target) == b"b" * 4096
    assert len(place.pool.writers(place.image)) == 2
    write(target, b"c" * 4096)
    assert direct(source) == b"c" * 4096
    place.unmap()
    monkeypatch.undo()
    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path))
    place.half.detach(place.connection)
    assert place.content().startswith(b"c" * 4096)


def test_a_daemon_that_was_killed_is_cleared_away_and_made_anew(place: Place, tmp_path: Path) -> None:
    path = place.map()
    write(path, b"kept")
    (pid,) = [pid for pid, argv in argvs() if "qemu-storage-daemon" in argv and place.volume in argv]
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while place.volume in loops.mapped():
        assert time.monotonic() < end, "the kernel tells the device's name still"
        time.sleep(0.05)
    with pytest.raises(OSError, match="error"):
        write(path, b"gone")
    dead = tmp_path / "dead.loop"
    dead.write_text((records.directory() / f"{place.volume}.loop").read_text())
    assert loops.noted(dead) is not None
    with open(place.map(), "rb") as device:
        assert device.read(4) == b"kept"
    assert loops.noted(dead) is None, "the device of the dead daemon is there still"
    (pid,) = [pid for pid, argv in argvs() if "qemu-storage-daemon" in argv and place.volume in argv]
    os.kill(pid, signal.SIGKILL)
    place.half.detach(place.connection)
    assert [trace for trace in place.traces() if not trace.startswith("the Ceph client")] == []
    place.pool.fence(place.image, "all")
    with open(place.map(), "rb") as device:
        assert device.read(4) == b"kept"


def test_what_a_killed_agent_had_begun_is_found_and_ended(place: Place) -> None:
    """Killed at any moment of mapping: its successor has the record, and no more."""
    image = Image(
        volume=place.volume,
        conf=place.connection.data["conf"],
        pool=place.connection.data["pool"],
        namespace=place.connection.data["namespace"],
        name=place.image,
        user=place.connection.data["user"],
        key_file=str(Path(os.environ["ATOLL_RUN_DIR"]) / "keys" / f"{place.volume}.key"),
    )
    records.keep(records.Record(image=image, way="fuse+loop"))
    assert place.half.unmap_others([place.volume]) == []
    assert place.half.unmap_others([]) == [place.volume]
    assert place.traces() == []
    place.map()
    number = loops.mapped()[place.volume]
    loops.detach(place.volume)
    assert place.half.unmap_others([]) == [place.volume]
    assert place.traces() == []
    assert loops.mapped().get(place.volume) != number


def test_nobody_unmaps_while_a_program_of_a_killed_worker_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_PATIENCE", 0.3)
    with records.locked(place.volume):
        child = int(tool.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]))
    with pytest.raises(DeadlineExceeded, match="still being mapped"), records.locked(place.volume):
        pass
    os.kill(child, signal.SIGKILL)
    monkeypatch.setattr(records, "_PATIENCE", 60.0)
    with records.locked(place.volume):
        records.drop(place.volume)


def test_a_program_that_hangs_is_ended_and_one_that_fails_is_told(place: Place) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"sleep did not end in 0 s|sleep did not end in 1 s"):
        tool.run(["sleep", "600"], 0.6)
    assert time.monotonic() - began < 60
    with pytest.raises(HostError, match="No such file") as failed:
        tool.run(["cat", "/nowhere"])
    assert failed.value.details["exit_status"] == 1
    with pytest.raises(HostError, match="there is no program"):
        tool.run(["atoll-nothing"])


def test_what_is_not_there_cannot_be_mapped(place: Place) -> None:
    gone = place.connection.model_copy(update={"data": {**place.connection.data, "image": "nowhere"}})
    with pytest.raises((NotFound, HostError)):
        place.half.map(gone, read_only=False)
    place.half.unmap(gone)
    assert place.traces() == []


def test_the_first_way_that_can_is_taken_and_one_that_refuses_the_image_is_passed_by(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Never(fuse.Way):
        name = "never"

        def available(self) -> str:
            return "no module"

    class Picky(fuse.Way):
        name = "picky"

        def available(self) -> str:
            return ""

        def map(self, image: Image) -> str:
            record = records.find(image.volume)
            asked.append(record.way if record else "")
            raise NotSupported("not this image")

    monkeypatch.setattr(choice, "ways", lambda: [Never(), Picky(), fuse.Way()])
    assert place.half.map(place.connection, read_only=False).way == "fuse+loop"
    assert asked == ["picky"]
    place.unmap()
    assert place.traces() == []
    # Killed after it had been refused, and before the next way.
    place.map()
    record = records.find(place.volume)
    assert record is not None
    place.unmap()
    records.keep(records.Record(image=record.image, way="picky"))
    assert place.half.map(place.connection, read_only=False).way == "fuse+loop"
    place.unmap()
    monkeypatch.setattr(choice, "ways", lambda: [Never()])
    with pytest.raises(HostError, match="never: no module"):
        place.map()
    monkeypatch.setattr(choice, "ways", lambda: [Picky()])
    with pytest.raises(NotSupported):
        place.map()
    assert place.traces() == []


def test_ways_are_asked_in_their_order() -> None:
    assert [way.name for way in choice.ways()] == ["krbd", "rbd-nbd", "fuse+loop"]
    assert fuse.Way().available() == ""


def test_a_node_that_runs_an_osd_of_the_same_cluster_is_warned_of(place: Place, tmp_path: Path) -> None:
    attached = place.half.attach(place.connection, "kernelspace")
    assert "osd.0" in attached.warning
    assert "same Ceph cluster" in attached.warning
    assert place.half.attach(place.connection, "userspace").warning == ""
    place.half.detach(place.connection)
    # As /proc shows an OSD whose cluster is told, and one of another node on this kernel.
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\n\tfsid = aaaa\n")
    proc = tmp_path / "proc"
    for entry, ident, fsid in (("self", "", ""), ("7", "3", "bbbb"), ("8", "4", "aaaa")):
        (proc / entry / "ns").mkdir(parents=True)
        os.symlink("/proc/self/ns/pid", proc / entry / "ns" / "pid")
        (proc / entry / "comm").write_text("ceph-osd\n")
        (proc / entry / "cmdline").write_bytes(f"ceph-osd\0-i\0{ident}\0".encode())
        data = proc / entry / "root/var/lib/ceph/osd" / f"ceph-{ident}"
        data.mkdir(parents=True)
        (data / "ceph_fsid").write_text(f"{fsid}\n")
    assert "runs osd.4 of" in loopback.hazard(str(conf), proc)
    conf.write_text("[global]\n\tfsid = cccc\n")
    assert loopback.hazard(str(conf), proc) == ""


def test_in_user_space_there_is_nothing_but_a_key(place: Place) -> None:
    attached = place.half.attach(place.connection, "userspace")
    assert (attached.path, attached.way) == (None, "")
    assert records.everything() == []
    assert not (records.directory()).exists()
    assert place.traces() == []
    place.half.detach(place.connection)


def test_a_lock_is_of_the_file_that_has_the_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file just before it was removed would have a lock of nothing."""
    path, real, calls = records.directory() / f"{place.volume}.lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with records.locked(place.volume):
        fresh = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            real(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fresh)
        records.drop(place.volume)
    assert len(calls) == 2
