"""Copying a stopped disk from node to node, with QEMU's own tools and real certificates."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from atoll.model.errors import DeadlineExceeded, HostError, PoolFull
from atoll.model.messages import Progress
from atoll.runtime.certs import create_ca, issue
from atoll.storage import copy, sources
from atoll.storage.files import locks

pytestmark = pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="qemu-utils is not installed")
MIB = 1 << 20


@dataclass
class Nodes:
    """Two nodes with certificates of one cluster, each with an image; and a stranger of another cluster."""

    place: Path
    seen: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        ca, other = create_ca("test"), create_ca("other")
        for name, authority in (("a", ca), ("b", ca), ("c", ca), ("stranger", other)):
            pair = issue(authority, "node", name, name, ["127.0.0.1"])
            tls = self.tls(name)
            tls.mkdir()
            (tls / "ca.pem").write_text(authority.cert_pem)
            (tls / "cert.pem").write_text(pair.cert_pem)
            (tls / "key.pem").write_text(pair.key_pem)
            (tls / "key.pem").chmod(0o600)
        shutil.copy(self.tls("a") / "ca.pem", self.tls("stranger") / "ca.pem")
        with self.source.open("wb") as file:
            file.write(os.urandom(2 * MIB))
            file.seek(40 * MIB)
            file.write(os.urandom(MIB))
            file.truncate(64 * MIB)
        self.blank()

    def tls(self, node: str) -> Path:
        return self.place / f"tls-{node}"

    @property
    def source(self) -> Path:
        return self.place / "source.raw"

    @property
    def target(self) -> Path:
        # A comma, as in the names that people give: QEMU's options need it doubled.
        return self.place / "target,1.raw"

    @property
    def server(self) -> Path:
        return self.place / "run-b"

    def blank(self, size: int = 64 * MIB) -> None:
        with self.target.open("wb") as file:
            file.truncate(size)

    async def serve(self, peer: str = "a") -> tuple[int, int]:
        return await copy.serve(seen(self.target), "127.0.0.1", self.tls("b"), peer, self.server)

    async def push(self, port: int, node: str = "a", server: str = "b", deadline: float = 60.0) -> None:
        run_dir = self.place / f"run-{node}-out"
        await copy.push(seen(self.source), "127.0.0.1", port, server, self.tls(node), self.seen.append, run_dir, deadline)
        assert not run_dir.exists()


@pytest_asyncio.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    await copy.unserve(made.server)


def seen(path: Path) -> copy.Image:
    """As an agent knows it from its pool's worker."""
    status = path.stat() if path.exists() else None
    return copy.Image(str(path), direct=True, sparse=status is not None and status.st_blocks * 512 < status.st_size)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_a_copy_is_equal_and_stays_sparse(nodes: Nodes) -> None:
    port, pid = await nodes.serve()
    await nodes.push(port)
    assert nodes.target.read_bytes() == nodes.source.read_bytes()
    assert nodes.target.stat().st_blocks * 512 < 8 * MIB
    assert nodes.seen[-1].percent == 100.0
    await copy.unserve(nodes.server)
    assert not _running(pid)
    assert not nodes.server.exists()
    await copy.unserve(nodes.server)


async def test_a_copy_can_be_repeated_and_leaves_nothing_of_what_was_there(nodes: Nodes) -> None:
    nodes.target.write_bytes(b"\xff" * 64 * MIB)
    port, _ = await nodes.serve()
    await nodes.push(port)
    await nodes.push(port)
    assert nodes.target.read_bytes() == nodes.source.read_bytes()


async def test_a_preallocated_target_keeps_its_blocks(nodes: Nodes) -> None:
    with nodes.target.open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    port, _ = await nodes.serve()
    await nodes.push(port)
    assert nodes.target.read_bytes() == nodes.source.read_bytes()
    assert nodes.target.stat().st_blocks * 512 >= 64 * MIB


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("how", ["here", "there"])
async def test_an_image_is_imported_here_and_to_a_peer(nodes: Nodes, kind: str, how: str) -> None:
    nodes.blank(80 * MIB)
    image = nodes.source
    if kind == "qcow2":
        image = nodes.place / "image,1.qcow2"
        subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", nodes.source, image], check=True, timeout=60)
    with sources.opened(str(image)) as fd:
        source = sources.as_qemu(fd, kind)
        if how == "here":
            await copy.convert(source, seen(nodes.target), nodes.seen.append, 60.0, inherit=(fd,))
        else:
            port, _ = await nodes.serve()
            place = ("127.0.0.1", port, "b", nodes.tls("a"), nodes.seen.append, nodes.place / "run-a-out", 60.0)
            await copy.push(source, *place, inherit=(fd,))
    assert nodes.target.read_bytes() == nodes.source.read_bytes() + bytes(16 * MIB)
    assert nodes.target.stat().st_blocks * 512 < 8 * MIB
    assert nodes.seen[-1].percent == 100.0


@pytest.mark.parametrize(("node", "server"), [("c", "b"), ("stranger", "b"), ("a", "c")])
async def test_only_the_peer_may_write_and_only_to_the_server_it_means(nodes: Nodes, node: str, server: str) -> None:
    port, _ = await nodes.serve(peer="a")
    with pytest.raises(HostError, match="the copy failed"):
        await nodes.push(port, node, server)
    assert nodes.target.stat().st_blocks == 0
    await nodes.push(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
async def test_a_target_that_fills_up_is_said_to_be_full(nodes: Nodes) -> None:
    place = nodes.place / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True, timeout=60)
    try:
        target = copy.Image(str(place / "target.raw"), direct=False, sparse=True)
        with open(target.path, "wb") as file:
            file.truncate(64 * MIB)
        with pytest.raises(PoolFull, match="No space left on device"):
            await copy.convert(seen(nodes.source), target, nodes.seen.append, 60.0)
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


async def test_a_server_that_is_no_longer_there_is_told(nodes: Nodes) -> None:
    port, _ = await nodes.serve()
    await copy.unserve(nodes.server)
    with pytest.raises(HostError, match="refused"):
        await nodes.push(port)


async def test_a_target_that_is_too_small_is_refused(nodes: Nodes) -> None:
    nodes.blank(MIB)
    port, _ = await nodes.serve()
    with pytest.raises(HostError, match="smaller"):
        await nodes.push(port)


async def test_without_an_image_or_a_certificate_nothing_is_served(nodes: Nodes) -> None:
    nodes.target.unlink()
    with pytest.raises(HostError, match=r"target,1.raw.*No such file"):
        await nodes.serve()
    nodes.blank()
    (nodes.tls("b") / "key.pem").unlink()
    with pytest.raises(HostError, match=r"no certificate.*key.pem"):
        await nodes.serve()


async def test_an_image_that_a_guest_writes_is_not_served(nodes: Nodes) -> None:
    with nodes.target.open("rb+") as guest:
        assert locks.lock_for_writing(guest.fileno())
        with pytest.raises(HostError, match="lock"):
            await nodes.serve()


async def test_the_server_is_seen_as_a_writer(nodes: Nodes) -> None:
    _, pid = await nodes.serve()
    with nodes.target.open("rb") as file:
        assert locks.writer_seen(file.fileno())
        assert locks.holders(file.fileno()) == [f"qemu-nbd (pid {pid})"]
        await copy.unserve(nodes.server)
        assert not locks.writer_seen(file.fileno())


async def test_no_secret_is_copied_or_shown(nodes: Nodes) -> None:
    _, pid = await nodes.serve()
    assert nodes.server.joinpath("tls").stat().st_mode & 0o777 == 0o700
    assert nodes.server.joinpath("tls", "server-key.pem").is_symlink()
    assert "PRIVATE" not in Path(f"/proc/{pid}/cmdline").read_text()


def _pushing(nodes: Nodes) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"convert" in words and str(nodes.source).encode() in words and _running(int(process.name)):
            found.append(int(process.name))
    return found


async def _begun(nodes: Nodes) -> None:
    async with asyncio.timeout(20):
        while True:
            if _pushing(nodes):
                return
            await asyncio.sleep(0.02)


async def test_a_copy_ends_at_its_deadline(nodes: Nodes) -> None:
    port, pid = await nodes.serve()
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(DeadlineExceeded, match=r"longer than 0.5 s"):
                await nodes.push(port, deadline=0.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert _pushing(nodes) == []


async def test_a_cancelled_copy_ends(nodes: Nodes) -> None:
    port, pid = await nodes.serve()
    os.kill(pid, signal.SIGSTOP)
    try:
        task = asyncio.create_task(nodes.push(port))
        await _begun(nodes)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        os.kill(pid, signal.SIGCONT)
    assert _pushing(nodes) == []


async def test_a_server_that_hangs_is_killed(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_GRACE", 0.5)
    _, pid = await nodes.serve()
    os.kill(pid, signal.SIGSTOP)
    await copy.unserve(nodes.server)
    assert not _running(pid)


async def test_another_process_with_the_servers_number_is_left_alone(nodes: Nodes) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            nodes.server.mkdir()
            (nodes.server / "nbd.pid").write_text(f"{other.pid}\n")
            await copy.unserve(nodes.server)
            assert other.poll() is None
        finally:
            other.kill()
