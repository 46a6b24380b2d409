"""The guests of the fake hypervisor as processes: locks as QEMU's, life without their starter, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from atoll.hypervisor import fakeguest
from atoll.hypervisor.fake import FakeHypervisor
from atoll.hypervisor.fakedisk import Disk, Refused, newest, record
from atoll.model.errors import DiskInUse, GuestError, MigrationFailed
from atoll.model.messages import Attached, GuestDisk, GuestSpec, GuestStatus, Progress
from atoll.model.objects import Boot

VM = "i-0123456789abcdef0"
MIB = 1 << 20


def quiet(progress: Progress) -> None:
    """A report that nobody reads."""


async def eventually(what: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    return bool(fakeguest.start_time(pid))


class Lab:
    """Nodes on one directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.a, self.b = self.new("a"), self.new("b")

    def new(self, node: str, user: str = "") -> FakeHypervisor:
        return FakeHypervisor(self.path / node, self.path, "", node, user)

    def disk(self, path: Path | None = None, locking: str = "auto", slot: int = 0) -> GuestDisk:
        image = path or self.path / "disk.raw"
        if not image.exists():
            image.touch()
            os.truncate(image, 4 * MIB)
        attached = Attached(volume=f"vol-{slot}", path=str(image), blockdev={"driver": "file", "filename": str(image), "locking": locking})
        return GuestDisk(volume=f"vol-{slot}", slot=slot, size=4 * MIB, attached=attached)

    def spec(self, *disks: GuestDisk, generation: int = 1, append: str = "ctr=vda") -> GuestSpec:
        found = list(disks) or [self.disk()]
        return GuestSpec(instance=VM, name="web1", generation=generation, memory=64 * MIB, boot=Boot(append=append), disks=found)

    def console(self, node: str = "a") -> str:
        path = self.path / node / VM / "console.log"
        return path.read_text() if path.exists() else ""

    async def until(self, wanted: Callable[[GuestStatus], bool]) -> GuestStatus:
        deadline = time.monotonic() + 30
        while not wanted(status := await self.a.status(VM)):
            assert time.monotonic() < deadline, f"still {status}"
            await asyncio.sleep(0.01)
        return status

    async def pid(self, node: FakeHypervisor) -> int:
        return (await node.status(VM)).pid or 0


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    found = Lab(tmp_path)
    yield found
    for node in (found.a, found.b):
        for guest in await node.guests():
            await node.kill(guest.instance)


async def test_nothing_but_the_console_log_is_left(lab: Lab) -> None:
    for end in (lab.a.kill(VM), lab.a.stop(VM, 10, quiet), lab.a.stop(VM, 0, quiet)):
        await lab.a.start(lab.spec(), quiet)
        pid = await lab.pid(lab.a)
        assert alive(pid)
        await end
        assert not alive(pid)
        assert os.listdir(lab.path / "a" / VM) == ["console.log"]


async def test_it_outlives_its_starter(lab: Lab) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from atoll.hypervisor.fake import FakeHypervisor;"
        "from atoll.model.messages import GuestSpec;"
        "asyncio.run(FakeHypervisor(Path(sys.argv[1]), Path('/'), '', 'a').start(GuestSpec.model_validate_json(sys.argv[2]), print))"
    )
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(lab.path / "a"), lab.spec().model_dump_json(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert await starter.wait() == 0
    status = await lab.a.status(VM)
    assert status.state == "running"
    assert os.getsid(status.pid or 0) == status.pid
    before = lab.console().count("ACK")
    await eventually(lambda: lab.console().count("ACK") > before + 5)


async def test_a_guest_whose_starter_dies_early_does_not_run(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    where = lab.path / "a" / VM
    text = (where / "spec.json").read_text()
    await lab.a.kill(VM)
    (where / "console.log").unlink()
    (where / "spec.json").write_text(text)
    child = subprocess.Popen([sys.executable, "-I", "-S", fakeguest.__file__, str(where)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    assert child.stdout.readline() == b"ready\n"
    pid = int((where / "pid").read_text().split()[0])
    assert alive(pid)
    with pytest.raises(DiskInUse):
        await lab.b.start(lab.spec(), quiet)
    child.stdin.close()
    await eventually(lambda: not alive(pid))
    assert lab.console() == ""
    child.wait()
    child.stdout.close()
    await lab.b.start(lab.spec(), quiet)


async def test_a_directory_has_one_guest(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    run = [sys.executable, "-I", "-S", fakeguest.__file__, str(lab.path / "a" / VM)]
    second = subprocess.run(run, input=b"go\n", capture_output=True, timeout=30, check=False)
    assert json.loads(second.stdout)["error"] == "conflict"
    assert (await lab.a.status(VM)).state == "running"


async def test_a_pid_that_came_round_again_is_not_believed(lab: Lab) -> None:
    where = lab.path / "a" / VM
    where.mkdir(parents=True)
    (where / "pid").write_text(f"{os.getpid()} 12345\n")
    assert (await lab.a.status(VM)).state == "gone"
    assert await lab.a.guests() == []
    await lab.a.kill(VM)
    await lab.a.start(lab.spec(), quiet)
    assert (await lab.a.status(VM)).state == "running"


async def test_a_restarted_guest_goes_on_where_the_ring_ends(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    await eventually(lambda: "ACK 10\n" in lab.console())
    os.kill(await lab.pid(lab.a), signal.SIGKILL)
    await lab.a.kill(VM)
    top = newest((lab.path / "disk.raw").read_bytes()[:MIB])
    await lab.b.start(lab.spec(), quiet)
    assert lab.console("b").splitlines()[0] == f"CTR RESUME {top}"
    await eventually(lambda: f"ACK {top + 1}\n" in lab.console("b"))


async def test_without_locks_both_run(lab: Lab) -> None:
    spec = lab.spec(lab.disk(locking="off"))
    await lab.a.start(spec, quiet)
    await lab.b.start(spec, quiet)
    assert {(await node.status(VM)).state for node in (lab.a, lab.b)} == {"running"}


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-utils is not installed")
async def test_its_locks_are_qemus(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    image = str(lab.path / "disk.raw")
    write = ["qemu-io", "-f", "raw", "-c", "write 2M 4k", image]
    refused = await asyncio.to_thread(subprocess.run, write, capture_output=True, text=True, timeout=60, check=False)
    assert "lock" in refused.stderr
    await lab.a.kill(VM)
    held = subprocess.Popen(["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdin
    assert held.stdout
    held.stdin.write(b"read 0 512\n")
    held.stdin.flush()
    assert b"512" in await asyncio.to_thread(held.stdout.readline)
    with pytest.raises(DiskInUse, match=r'Failed to get .*"write" lock'):
        await lab.a.start(lab.spec(), quiet)
    held.stdin.close()
    held.wait(60)
    held.stdout.close()
    await lab.a.start(lab.spec(), quiet)


async def test_an_io_error_pauses_it(lab: Lab) -> None:
    await lab.a.start(lab.spec(lab.disk(Path("/dev/full"))), quiet)
    await eventually(lambda: "CTR RESUME" in lab.console())
    status = await lab.until(lambda status: status.state == "paused")
    assert "No space left" in status.reason
    assert "ACK" not in lab.console()
    await lab.a.start(lab.spec(lab.disk(Path("/dev/full"))), quiet)
    await lab.a.kill(VM)


async def test_a_disk_that_is_not_there(lab: Lab) -> None:
    disk = lab.disk()
    (lab.path / "disk.raw").unlink()
    with pytest.raises(GuestError, match="No such file"):
        await lab.a.start(lab.spec(disk), quiet)
    with pytest.raises(GuestError, match="No such file"):
        await lab.a.incoming(lab.spec(disk), [], "b", quiet)
    with pytest.raises(GuestError, match="not attached"):
        await lab.a.start(lab.spec(GuestDisk(volume="vol-0", slot=0, size=MIB)), quiet)
    assert await lab.a.guests() == []


async def test_nonsense_does_not_harm_it(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    orders = (b'{"do": "dance"}\n', b'{"do": "plug"}\n', b'{"do": "migrate", "host": 7}\n')
    for nonsense in (b"\n", b"hello\n", b"[]\n", b"7\n", b"\xff\n", *orders):
        async with lab.a._line(VM) as (reader, writer):
            writer.write(nonsense)
            answer = await asyncio.wait_for(reader.readline(), 10)
            assert answer == b"" or "error" in json.loads(answer)
    assert (await lab.a.status(VM)).state == "running"


async def test_strangers_at_the_migration_port_do_not_harm_it(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    target = await lab.b.incoming(lab.spec(generation=2), [], "a", quiet)
    for nonsense in (b"GET / HTTP/1.0\r\n\r\n", b"7\n", b"{}\n", b'{"from": "a", "copy": 3}\n', b""):
        with socket.create_connection((target.host, target.port), timeout=10) as stranger:
            stranger.sendall(nonsense)
    await lab.a.migrate_out(VM, target, [], quiet)
    await lab.a.migrate_continue(VM, quiet)
    assert (await lab.b.await_incoming(VM, 10)).state == "paused"


async def test_a_target_of_another_shape_refuses(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    target = await lab.b.incoming(lab.spec(generation=2).model_copy(update={"memory": MIB}), [], "a", quiet)
    with pytest.raises(MigrationFailed, match="differs in memory"):
        await lab.a.migrate_out(VM, target, [], quiet)
    assert (await lab.a.status(VM)).state == "running"


async def test_a_guest_that_ends_while_its_memory_moves_stays(lab: Lab) -> None:
    await lab.a.start(lab.spec(append="ctr=vda fake.ram=5"), quiet)
    target = await lab.b.incoming(lab.spec(append="ctr=vda fake.ram=5", generation=2), [], "a", quiet)
    out = asyncio.create_task(lab.a.migrate_out(VM, target, [], quiet))
    await lab.until(lambda status: status.migration == "active")
    await lab.a._ask(VM, "powerdown", wait=5)
    with pytest.raises(MigrationFailed, match="ended meanwhile"):
        await out
    assert (await lab.a.status(VM)).state == "shutdown"
    assert (await lab.b.await_incoming(VM, 10)).state == "gone"


async def test_the_console_can_be_watched(lab: Lab) -> None:
    await lab.a.start(lab.spec(), quiet)
    where = os.open(Path(lab.a.console(VM)).parent, os.O_PATH)
    reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{where}/console.sock")
    os.close(where)
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"ACK ")
    writer.close()
    before = lab.console().count("ACK")
    await eventually(lambda: lab.console().count("ACK") > before + 5)


async def test_long_paths_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    lab = Lab(deep)
    await lab.a.start(lab.spec(), quiet)
    assert (await lab.a.status(VM)).state == "running"
    assert await lab.a.stop(VM, 10, quiet)


async def test_a_copied_disk_stays_sparse_and_is_equal(lab: Lab) -> None:
    here, there = lab.path / "here.raw", lab.path / "there.raw"
    for path in (here, there):
        path.touch()
        os.truncate(path, 256 * MIB)
    with here.open("r+b") as file:
        os.pwrite(file.fileno(), os.urandom(3 * MIB), 100 * MIB + 12345)
    with there.open("r+b") as file:
        os.pwrite(file.fileno(), b"old" * MIB, 50 * MIB)
    await lab.a.start(lab.spec(lab.disk(here)), quiet)
    target = await lab.b.incoming(lab.spec(lab.disk(there), generation=2), ["vol-0"], "a", quiet)
    seen: list[Progress] = []
    await lab.a.migrate_out(VM, target, ["vol-0"], seen.append)
    assert any("vol-0" in progress.text for progress in seen)
    await lab.a.migrate_continue(VM, quiet)
    assert (await lab.b.await_incoming(VM, 10)).state == "paused"
    assert subprocess.run(["cmp", here, there], check=False, timeout=60).returncode == 0
    assert there.stat().st_blocks * 512 < 20 * MIB


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_it_becomes_its_user(lab: Lab) -> None:
    node = lab.new("a", "nobody")
    await node.start(lab.spec(), quiet)
    pid = await lab.pid(node)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    uids = next(line for line in lines if line.startswith("Uid:")).split()[1:]
    assert set(uids) == {str(pwd.getpwnam("nobody").pw_uid)}
    before = lab.console().count("ACK")
    await eventually(lambda: lab.console().count("ACK") > before + 5)
    assert await node.stop(VM, 10, quiet)


def test_a_refused_lock_leaves_nothing_locked(lab_disk: Callable[[], Disk]) -> None:
    first, second, third = lab_disk(), lab_disk(), lab_disk()
    first.open()
    with pytest.raises(Refused):
        second.open()
    assert second.fd == -1
    first.close()
    third.open()
    third.close()


@pytest.fixture
def lab_disk(tmp_path: Path) -> Callable[[], Disk]:
    image = tmp_path / "disk.raw"
    image.touch()
    os.truncate(image, MIB)
    return lambda: Disk({"volume": "vol-0", "slot": 0, "size": MIB, "attached": {"path": str(image)}})


def test_records() -> None:
    assert len(record(7)) == 512
    assert record(7)[:8] == b"CTRREC01"
    assert newest(record(7) + record(9) + bytes(512) + record(8)) == 9
    torn = bytearray(record(10))
    torn[16] ^= 1
    assert newest(record(3) + bytes(torn)) == 3
    assert newest(record(3) + record(10).replace(b"CTRREC01", b"CTRREC02")) == 3
