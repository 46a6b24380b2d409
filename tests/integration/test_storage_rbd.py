"""The driver for Ceph, on a real one: who is shut out, what a node may do, and what happens when Ceph gives no answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from atoll.lab.smallceph import missing
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, InvalidInput, NotFound, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import FencingPool, VolumeSpec
from atoll.storage.host import StorageHost
from ceph_support import Ceph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
VOLUME, OTHER = "vol-" + "1" * 17, "vol-" + "2" * 17
MIB = 1 << 20


class Place:
    """A prepared pool, and a client that is none of Atoll's."""

    def __init__(self, ceph: Ceph, ref: PoolRef) -> None:
        self.ceph, self.ref = ceph, ref
        made = registry.pool(ref)
        assert isinstance(made, FencingPool)
        self.pool = made
        self.pool.prepare(create=True)

    @property
    def spec(self) -> str:
        options = self.ref.options
        return f"{options['pool']}/{options['namespace']}" if options.get("namespace") else options["pool"]

    def make(self, volume: str = VOLUME, name: str = "web", size: int = 8 * MIB) -> str:
        return self.pool.create(VolumeSpec(volume=volume, name=name, size=size))

    def writer(self, image: str, user: str = "admin", keyring: str = "") -> Any:
        """An image that somebody has open and has written; its connection lives as long as it does."""
        import rbd

        cluster, ioctx = self.ceph.client(self.ref, user, keyring)
        found = rbd.Image(ioctx, image)
        found.write(b"x" * 512, 0)
        return found, cluster

    def killed_writer(self, image: str) -> None:
        """Somebody wrote and died: his watch and his lock stay for a while."""
        argv = ["qemu-io", "-f", "raw", f"rbd:{self.spec}/{image}:id=admin:conf={self.ceph.conf}"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("write 0 4096\n")
            process.stdin.flush()
            while "wrote 4096" not in process.stdout.readline():
                assert process.poll() is None
            self.pool.note(image)
            process.kill()

    def rbd(self, *words: str) -> str:
        return self.ceph.run("rbd", *words)


@pytest.fixture
def place(ceph: Ceph) -> Place:
    return Place(ceph, ceph.namespace_ref())


@pytest.fixture
def isolated(ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A pool whose volumes have users of their own."""
    monkeypatch.setenv("ATOLL_RUN_DIR", str(tmp_path))
    return Place(ceph, ceph.namespace_ref(isolation="volume"))


# --- one writer ---


def test_who_is_shut_out_writes_no_more(place: Place) -> None:
    import rbd

    image = place.make()
    found, _cluster = place.writer(image)
    assert [writer.who for writer in place.pool.writers(image)]
    with pytest.raises(DiskInUse, match=r"the client at 127\.0\.0\.1"):
        place.pool.delete(image)
    assert len(place.pool.fence(image, "all")) == 1
    assert place.pool.writers(image) == []
    with pytest.raises(rbd.ConnectionShutdown):
        found.write(b"y" * 512, 0)
    other, _second = place.writer(image)
    other.close()


def test_only_guests_that_were_noted_are_shut_out_without_a_proof_of_death(place: Place) -> None:
    image = place.make()
    found, _cluster = place.writer(image)
    assert place.pool.fence(image, "known") == []
    assert len(place.pool.writers(image)) == 1
    found.write(b"y" * 512, 0)
    assert place.pool.note(image)
    assert len(place.pool.fence(image, "known")) == 1
    assert place.pool.writers(image) == []
    # Noted again only when it is seen again: the next writer is not taken for the last one.
    other, _second = place.writer(image)
    assert place.pool.fence(image, "known") == []
    other.close()


def test_a_dead_guest_and_its_lock_are_cleared_away_at_once(place: Place) -> None:
    image = place.make()
    place.killed_writer(image)
    assert place.pool.writers(image)
    assert "exclusive" in place.rbd("lock", "ls", f"{place.spec}/{image}")
    assert len(place.pool.fence(image, "known")) == 1
    assert place.pool.writers(image) == []
    assert place.rbd("lock", "ls", f"{place.spec}/{image}") == ""


def test_who_has_lost_his_watch_is_shut_out_before_his_lock_is_broken(place: Place) -> None:
    """No watcher is not no writer: he may only be cut off for a while."""
    image = place.make()
    place.killed_writer(image)
    (address,) = [writer.who.rpartition(" ")[2] for writer in place.pool.writers(image)]
    place.ceph.run("ceph", "osd", "blocklist", "add", address, "600")
    place.ceph.run("ceph", "osd", "blocklist", "rm", address)
    # Nothing but the lock tells of him now; he could come back.
    while place.pool.writers(image):
        pass
    assert address not in place.ceph.run("ceph", "osd", "blocklist", "ls")
    assert place.pool.fence(image, "none") == [address]
    assert address in place.ceph.run("ceph", "osd", "blocklist", "ls")
    assert place.rbd("lock", "ls", f"{place.spec}/{image}") == ""


def test_who_was_shut_out_as_a_guest_of_a_node_is_let_in_with_it_and_nobody_else(place: Place) -> None:
    import rbd

    images = {node: place.make(f"vol-{number}" + "0" * 16, node) for number, node in enumerate(("node1", "node2", "stranger"))}
    guests = {}
    for node, image in images.items():
        guests[node] = place.writer(image)
        if node != "stranger":
            place.pool.note(image, node)
    out = {node: place.pool.fence(image, "all")[0] for node, image in images.items()}

    def listed() -> set[str]:
        entries = place.ceph.run("ceph", "osd", "blocklist", "ls")
        return {node for node, address in out.items() if address in entries}

    assert listed() == {"node1", "node2", "stranger"}
    assert place.pool.readmit("node3") == []
    assert place.pool.readmit("node") == [], "not another node whose name begins so"
    assert place.pool.readmit("node2") == [out["node2"]]
    assert listed() == {"node1", "stranger"}
    assert place.pool.readmit("node2") == [], "there is nothing more to do"
    # A client that has learned that it was shut out stays so for ever, whatever becomes of the entry.
    with pytest.raises(rbd.ConnectionShutdown):
        guests["node2"][0].write(b"y" * 512, 0)


def test_of_a_guest_that_moved_each_client_is_its_own_nodes(place: Place) -> None:
    """Both have it open for a moment: the source's was noted when it started, the target's is new."""
    image = place.make()
    _source = place.writer(image)
    (first,) = place.pool.note(image, "node1")
    _target = place.writer(image)
    both = place.pool.note(image, "node2")
    assert sorted(place.pool.fence(image, "all")) == sorted(both)
    assert place.pool.readmit("node1") == [first]
    assert place.pool.readmit("node2") == [address for address in both if address != first]


async def test_a_killed_worker_is_not_taken_for_a_guest(host: StorageHost, place: Place) -> None:
    """Its watch on the probe stays for half a minute, as one on a volume would that it was growing."""
    image = place.make()
    assert await host.pool(place.ref, "probe_writers", 30.0, action="hold")
    before = place.pool.writers(f"atoll-probe.{place.ref.id}")
    await host.close()
    assert before == []
    assert place.pool.writers(f"atoll-probe.{place.ref.id}") == []
    assert place.pool.probe_writers("look"), "Ceph itself still sees it"
    assert place.pool.writers(image) == []


# --- images ---


def test_an_image_that_is_half_made_is_made_anew(place: Place) -> None:
    image = place.make()
    import rbd

    _cluster, ioctx = place.ceph.client(place.ref)
    (entry,) = rbd.RBD().list2(ioctx)
    ioctx.remove_object(f"rbd_header.{entry['id']}")
    assert [(v.volume, v.size) for v in place.pool.volumes()] == [(VOLUME, 0)]
    assert place.make() == image
    stat = place.pool.stat(image)
    assert stat is not None
    assert stat.size == 8 * MIB


def test_a_deletion_that_was_broken_off_is_finished_and_other_peoples_trash_stays(place: Place) -> None:
    import rbd

    image = place.make()
    _cluster, ioctx = place.ceph.client(place.ref)
    with rbd.Image(ioctx, image) as found:
        found.metadata_set("atoll.deleted", place.ref.id)
    rbd.RBD().trash_move(ioctx, image, 0)
    place.rbd("create", f"{place.spec}/{image}.old", "--size", "1M")
    place.rbd("trash", "mv", f"{place.spec}/{image}.old")
    place.pool.delete(image)
    assert [entry["name"] for entry in rbd.RBD().trash_list(ioctx)] == [f"{image}.old"]


def test_what_has_snapshots_or_clones_is_not_lost(place: Place) -> None:
    image, other = place.make(), place.make(OTHER, "other")
    spec = f"{place.spec}/{image}"
    place.rbd("snap", "create", "--no-progress", f"{spec}@byhand")
    with pytest.raises(Conflict, match="made by hand: byhand"):
        place.pool.delete(image)
    place.rbd("clone", "--rbd-default-clone-format", "2", f"{spec}@byhand", f"{place.spec}/clone")
    place.rbd("snap", "rm", "--no-progress", f"{spec}@byhand")
    # What the clone reads stays in the trash until the clone is gone.
    place.pool.delete(image)
    assert image in place.rbd("trash", "ls", place.spec)
    place.rbd("export", "--no-progress", f"{place.spec}/clone", str(place.ceph.place / "clone.raw"))
    place.pool.delete("clone")
    place.pool.delete(other)
    assert place.rbd("trash", "ls", place.spec) == ""


def test_a_guest_is_told_of_its_larger_disk(place: Place) -> None:
    image = place.make()
    found, _cluster = place.writer(image)
    assert place.pool.grow(image, 16 * MIB) == 16 * MIB
    assert found.size() == 16 * MIB
    found.write(b"end", 16 * MIB - 512)
    found.close()


def test_what_can_be_adopted(place: Place) -> None:
    place.rbd("create", f"{place.spec}/old", "--size", "4M")
    found = place.pool.adopt("old", VOLUME)
    assert (found.logical_id, found.size, found.volume) == ("old", 4 * MIB, None)
    place.rbd("create", f"{place.spec}/blind", "--size", "4M", "--image-feature", "layering")
    with pytest.raises(InvalidInput, match="without locks"):
        place.pool.adopt("blind", VOLUME)
    with pytest.raises(NotFound):
        place.pool.adopt("nothing", VOLUME)
    writer, _cluster = place.writer("old")
    with pytest.raises(DiskInUse):
        place.pool.adopt("old", VOLUME)
    writer.close()


@pytest.fixture
def with_manager(ceph: Ceph) -> Iterator[None]:
    """Ceph's figures come from its manager."""
    ceph.start_manager()
    yield
    ceph.end("mgr")


def test_space_is_what_guests_can_write(place: Place, with_manager: None) -> None:
    """Copies are taken off, and a quota counts."""
    pool = place.ref.options["pool"]

    def settled(condition: Callable[[], bool]) -> None:
        for _ in range(600):
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError(f"not within a minute: {place.pool.check()}")

    settled(lambda: place.pool.check().space is not None and place.pool.space().free > 0)
    free = place.pool.space().free
    assert 512 * MIB < free <= 1024 * MIB
    place.ceph.run("ceph", "osd", "pool", "set-quota", pool, "max_bytes", str(256 * MIB))
    settled(lambda: place.pool.space().free <= 256 * MIB)
    place.ceph.run("ceph", "osd", "pool", "set-quota", pool, "max_bytes", "0")
    place.ceph.run("ceph", "osd", "pool", "set", pool, "size", "2")
    settled(lambda: place.pool.space().free <= free * 0.55)
    place.ceph.run("ceph", "osd", "pool", "set", pool, "size", "1", "--yes-i-really-mean-it")
    assert place.pool.check().details["copies"] == "1, at least 1 to write"


# --- least privilege ---


def test_a_volumes_user_can_use_its_image_and_nothing_else(isolated: Place) -> None:
    import rbd

    image, other = isolated.make(), isolated.make(OTHER, "other")
    connection = isolated.pool.connection(image, VOLUME, 8 * MIB, "node2")
    attached = registry.connector("rbd").attach(connection, "userspace")
    (path,) = attached.secrets.values()
    key = Path(path).read_text()
    assert key not in str(connection.model_dump()) + str(attached.model_dump())
    user = connection.data["user"]
    keyring = isolated.ceph.place / "volume.keyring"
    keyring.write_text(f"[client.{user}]\nkey = {key}\n")
    found, cluster = isolated.writer(image, user, str(keyring))
    found.resize(16 * MIB)
    found.discard(0, 4 * MIB)
    found.close()
    _, ioctx = isolated.ceph.client(isolated.ref, user, str(keyring))
    refused = (rbd.PermissionError, rbd.OperationNotSupported)
    for attempt in (
        lambda: rbd.Image(ioctx, other),
        lambda: rbd.RBD().list(ioctx),
        lambda: rbd.RBD().create(ioctx, "evil", MIB, old_format=False),
        lambda: rbd.RBD().rename(ioctx, image, "evil"),
        lambda: rbd.RBD().trash_move(ioctx, image, 0),
    ):
        with pytest.raises(refused):
            attempt()
    # Neither is its node's own user of any use for more.
    for who, path in ((user, keyring), ("atoll-node2", isolated.ceph.place / "client.atoll-node2.keyring")):
        for command in (
            "osd blocklist add 10.0.0.1:0/1",
            "auth ls",
            f"auth get client.{user}",
            "auth get-key client.admin",
            f"auth get-key client.atoll-node3.{OTHER}",
            f"auth caps client.{user} mon allow*",
            "auth get-or-create client.atoll-evil mon allow*",
            f"auth del client.{user}",
            "config set osd debug_osd 1",
            "osd pool create evil",
        ):
            argv = ["ceph", "--name", f"client.{who}", "--keyring", str(path), *command.split()]
            environment = {**os.environ, "CEPH_CONF": str(isolated.ceph.conf)}
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
            assert (done.returncode, "EACCES" in done.stderr) == (13, True), f"{who}: {command}: {done.stderr}"
    cluster.shutdown()


def test_a_volumes_user_can_read_no_object_of_others(isolated: Place) -> None:
    """Not by librbd, which asks for more than it needs: object by object, in its own pool and namespace, and in others."""
    import rados
    import rbd

    image, other = isolated.make(), isolated.make(OTHER, "other")
    connection = isolated.pool.connection(image, VOLUME, 8 * MIB, "node2")
    (path,) = registry.connector("rbd").attach(connection, "userspace").secrets.values()
    user = connection.data["user"]
    keyring = isolated.ceph.place / "volume.keyring"
    keyring.write_text(f"[client.{user}]\nkey = {Path(path).read_text()}\n")
    places = [(isolated, other)]
    for ref in (isolated.ceph.namespace_ref(), isolated.ceph.pool_ref("other")):
        place = Place(isolated.ceph, ref)
        places.append((place, place.make()))
    for place, name in places:
        writer, owner = place.writer(name)
        ident = writer.id()
        writer.close()
        owner.shutdown()
        cluster, ioctx = isolated.ceph.client(place.ref, user, str(keyring))
        objects = [f"rbd_header.{ident}", f"rbd_data.{ident}.{0:016x}", f"rbd_object_map.{ident}", f"rbd_id.{name}", "atoll_pool"]
        for found in objects:
            with pytest.raises(rados.PermissionError):
                ioctx.read(found)
            with pytest.raises(rados.PermissionError):
                ioctx.write_full(found, b"evil")
            with pytest.raises(rados.PermissionError):
                ioctx.remove_object(found)
        with pytest.raises((rbd.PermissionError, rbd.OperationNotSupported)):
            rbd.Image(ioctx, name)
        if place is not isolated:
            with pytest.raises((rbd.PermissionError, rbd.OperationNotSupported)):
                rbd.RBD().list(ioctx)
        cluster.shutdown()


def test_a_node_fetches_the_keys_of_its_own_volumes_only_and_only_while_they_are_its(isolated: Place) -> None:
    image = isolated.make()
    half = registry.connector("rbd")
    mine = isolated.pool.connection(image, VOLUME, 8 * MIB, "node2")
    assert half.attach(mine, "userspace") == half.attach(mine, "userspace")
    assert half.attached() == [VOLUME]
    half.detach(mine)
    half.detach(mine)
    assert half.attached() == []
    theirs = isolated.pool.connection(image, VOLUME, 8 * MIB, "node3")
    stolen = theirs.model_copy(update={"data": {**theirs.data, "node_user": "atoll-node2"}, "secrets": mine.secrets})
    with pytest.raises(PoolUnavailable, match="cannot fetch the key"):
        half.attach(stolen, "userspace")
    isolated.pool.revoke(VOLUME, "node2")
    isolated.pool.revoke(VOLUME, "node2")
    with pytest.raises(PoolUnavailable, match="cannot fetch the key"):
        half.attach(mine, "userspace")
    half.attach(theirs, "userspace")
    isolated.pool.fence(image, "known", VOLUME)
    with pytest.raises(PoolUnavailable):
        half.attach(theirs, "userspace")


def test_a_renamed_image_keeps_its_user(isolated: Place) -> None:
    image = isolated.make()
    isolated.pool.connection(image, VOLUME, 8 * MIB, "node2")
    renamed = isolated.pool.rename(image, VOLUME, "db")
    connection = isolated.pool.connection(renamed, VOLUME, 8 * MIB, "node2")
    registry.connector("rbd").attach(connection, "userspace")
    caps = isolated.ceph.run("ceph", "auth", "get", f"client.{connection.data['user']}")
    assert f"rbd_id.{renamed}" in caps
    assert f"rbd_id.{image}" not in caps


def test_an_image_whose_id_begins_anothers_gets_no_user(isolated: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from atoll.storage.rbd import minting

    image = isolated.make()
    listed = [{"name": image, "id": "ab"}, {"name": "x", "id": "abc"}]
    monkeypatch.setattr(minting.rbd, "RBD", lambda: type("R", (), {"list2": lambda *_: listed})())
    with pytest.raises(Conflict, match="would include image x"):
        isolated.pool.connection(image, VOLUME, 8 * MIB, "node2")


# --- trouble ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool": "nothing"}, "there is no Ceph pool nothing"),
        ({"namespace": "nothing"}, "has no namespace nothing"),
        ({"conf": "/nonexistent/ceph.conf"}, "cannot be read: No such file"),
        ({"user": "nobody", "keyring": ""}, "ceph.client.nobody.keyring, cannot be read"),
    ],
)
def test_what_is_wrong_is_said(place: Place, change: dict[str, str], words: str) -> None:
    status = registry.pool(place.ref.model_copy(update={"options": {**place.ref.options, **change}})).check()
    assert not status.ok
    assert words in status.reason


def test_a_wrong_key_and_a_user_without_rights(place: Place) -> None:
    wrong = place.ceph.place / "wrong.keyring"
    wrong.write_text("[client.admin]\nkey = AQAXSAtr76gpGhAAWrGAoAeTMFQJvFwjHe0+Rg==\n")
    options = {**place.ref.options, "user": "admin", "keyring": str(wrong)}
    status = registry.pool(place.ref.model_copy(update={"options": options})).check()
    assert "does not let user client.admin do that" in status.reason
    weak = place.ceph.user("client.weak", mon="allow r")
    options = {**place.ref.options, "user": "weak", "keyring": str(weak)}
    status = registry.pool(place.ref.model_copy(update={"options": options})).check()
    assert "does not let user client.weak do that" in status.reason


@pytest_asyncio.fixture
async def host(place: Place) -> AsyncIterator[StorageHost]:
    """Workers, as an agent has them."""
    made = StorageHost()
    await made.pool(place.ref, "check", 60.0)
    yield made
    await made.close()


async def test_a_call_that_hangs_ends_at_its_deadline_and_the_pool_comes_back(host: StorageHost, place: Place) -> None:
    place.ceph.signal("osd", signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineExceeded):
            await host.pool(place.ref, "volumes", 7.0)
        assert place.ref.id in host.stalled()
        began = asyncio.get_running_loop().time()
        with pytest.raises(PoolUnavailable, match="is stalled: no answer to volumes"):
            await host.pool(place.ref, "volumes", 30.0)
        assert asyncio.get_running_loop().time() - began < 2
    finally:
        place.ceph.signal("osd", signal.SIGCONT)
    for _ in range(600):
        if host.stalled():
            await asyncio.sleep(0.1)
    assert await host.pool(place.ref, "volumes", 30.0) == []


async def test_monitors_that_give_no_answer_are_named(place: Place) -> None:
    place.ceph.signal("mon", signal.SIGSTOP)
    host = StorageHost()
    try:
        status = await host.pool(place.ref, "check", 40.0)
    finally:
        place.ceph.signal("mon", signal.SIGCONT)
        await host.close()
    assert not status["ok"]
    assert "Ceph gives no answer" in status["reason"]


async def test_an_agent_that_was_cut_off_makes_a_new_connection(host: StorageHost, place: Place) -> None:
    image = place.make()
    await host.pool(place.ref, "probe_writers", 30.0, action="hold")
    for line in place.ceph.run("rbd", "status", f"{place.spec}/atoll-probe.{place.ref.id}").splitlines():
        if "watcher=" in line:
            address = line.split("watcher=")[1].split()[0]
            place.ceph.run("ceph", "osd", "blocklist", "add", address, "600")
    with pytest.raises(PoolUnavailable, match="cut off this agent's connection"):
        await host.pool(place.ref, "probe_writers", 30.0, action="hold")
    assert await host.pool(place.ref, "probe_writers", 30.0, action="hold")
    assert (await host.pool(place.ref, "stat", 30.0, logical_id=image))["size"] == 8 * MIB
