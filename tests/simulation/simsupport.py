"""What the fault tests of simulated clusters share: stories, a striker that kills at fault points, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import copy
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from atoll.lab.box import Box
from atoll.lab.boxceph import BoxNode
from atoll.lab.boxstorage import by_device
from atoll.model.objects import (
    Claim,
    DeathProof,
    Group,
    Hold,
    IdempotencyKey,
    Instance,
    Job,
    JobState,
    Node,
    Pool,
    Snapshot,
    SnapshotState,
    StorageCluster,
    Stored,
    Volume,
    VolumeState,
)
from atoll.model.units import GIB
from atoll.rpc import inprocess
from atoll.runtime import faults

#: Virtual seconds that the master's loops get to put everything right.
SETTLE = 30.0
#: Virtual seconds between records that guests write.
TICK = 0.25

T = TypeVar("T")
Action = Callable[[Box, str], Awaitable[None]]
#: Whether every case is run, as ``make faults`` does; else a sample, which ``ATOLL_FAULT_SEED`` chooses.
EVERYTHING = "ATOLL_FAULT_STEPS" in os.environ
SEED = os.environ.get("ATOLL_FAULT_SEED", "0")


def sample(cases: Iterable[T], name: str) -> list[T]:
    """A third of the cases, and six at least, in their order; all of them in ``make faults``."""
    found = list(cases)
    if EVERYTHING:
        return found
    chosen = random.Random(f"{SEED} {name}").sample(range(len(found)), min(len(found), max(6, len(found) // 3)))
    return [found[number] for number in sorted(chosen)]


@dataclass
class Story:
    """One operation: how to bring a cluster to its beginning, and the request. ``name`` tells it from others in messages."""

    name: str
    operation: str
    target: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[Box], Awaitable[None]] | None = None
    #: Not asked for by people: submitted by the master itself.
    internal: bool = False
    #: The ends that crashes alone may lead to. Migrations may be broken off by their own watchdog.
    ends: tuple[str, ...] = ("done",)
    #: Whether the end of the operation may change where the guests are without having been done (a dead node's claim is freed).
    frees: bool = False
    #: Whether it begins with something broken, which stays so if it is undone.
    broken: bool = False
    #: Whether an undone operation may leave a part of it done: instances that have moved stay where they are.
    partial: bool = False
    #: Whether it changes records only, and orders no node to do anything.
    records: bool = False
    #: What besides may have changed then: the beginnings of names in ``dump``.
    stays: tuple[str, ...] = ()
    nodes: int = 3

    def undone(self, found: dict[str, Any]) -> dict[str, Any]:
        """Of what ``dump`` gives, what must be as it was when the operation was undone."""
        return {key: value for key, value in found.items() if not key.startswith(self.stays)} if self.stays else found

    async def make(self, *, locking: bool = True) -> Box:
        """A cluster where the operation can begin."""
        box = await Box.make(self.nodes, locking=locking)
        await box.add_pool()
        if self.begin is not None:
            await self.begin(box)
        return box

    async def submit(self, box: Box, key: str = "") -> int:
        """The job's number."""
        if self.internal:
            return await box.master.submit_internal(self.operation, self.target)
        number = (await box.submit(self.operation, self.target, key=key, **self.request)).job
        assert number is not None
        return number


# --- faults ---


class Striker:
    """Listens at every fault point; at the ``count``-th visit of ``name`` it acts. Use as a context manager around a simulation."""

    def __init__(self, box: Box, name: str = "", action: Action | None = None, times: int = 1) -> None:
        self.box, self.name, self.action, self.times = box, name, action, times
        self.seen: list[str] = []
        self.struck = 0
        self.errors: list[BaseException] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Striker:
        faults.handler = self.point
        return self

    def __exit__(self, *error: object) -> None:
        faults.handler = None
        assert not self.errors, self.errors

    async def point(self, name: str) -> None:
        self.seen.append(name)
        if self.action is not None and self.struck < self.times and name == self.name:
            self.struck += 1
            await self.action(self.box, name)

    async def settle(self) -> None:
        while self.tasks:
            await asyncio.wait(set(self.tasks))


async def never() -> None:
    """The process at this point is dead: its code never goes on. Whoever killed it cancels it."""
    await asyncio.Event().wait()


_background: set[asyncio.Task[None]] = set()


def background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def bounce_master(box: Box, pause: float = 1.0) -> None:
    if box.leader is None:
        return
    await box.crash_master()
    await asyncio.sleep(pause)
    await box.boot_master()


async def bounce_agents(box: Box, names: list[str], pause: float = 1.0) -> None:
    names = [name for name in names if name in box.agents]
    for name in names:
        await box.crash_agent(name)
    await asyncio.sleep(pause)
    for name in names:
        await box.boot_agent(name)


async def kill_master(box: Box, point: str) -> None:
    background(bounce_master(box))
    if point.startswith("master:"):
        await never()
    await asyncio.sleep(0)


async def kill_agent(box: Box, point: str) -> None:
    """At an agent's point that agent; at a master's point all of them at once."""
    if point.startswith("agent:"):
        background(bounce_agents(box, [inprocess.here.get()]))
        await never()
    background(bounce_agents(box, list(box.agents)))
    await asyncio.sleep(0)


async def kill_both(box: Box, point: str) -> None:
    background(bounce_master(box))
    background(bounce_agents(box, list(box.agents)))
    await never()


KILLS: dict[str, Action] = {"master": kill_master, "agent": kill_agent, "both": kill_both}


# --- running ---


class Ticking:
    """Guests write all the time."""

    def __init__(self, box: Box) -> None:
        self.box = box

    async def _tick(self) -> None:
        while True:
            self.box.world.tick()
            self.box.disks.look()
            await asyncio.sleep(TICK)

    async def __aenter__(self) -> Ticking:
        self.task = asyncio.get_running_loop().create_task(self._tick())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()


def names(box: Box) -> dict[str, str]:
    """Node id -> name."""
    return {ident: name for name, ident in box.nodes.items()}


#: Of a node: a new certificate takes effect once the node has it, whatever becomes of the job; see test_certificates.py.
CERTIFICATE = ("certificate_serial", "certificate_issued", "certificate_expires", "previous_serial")


def dump(box: Box) -> dict[str, Any]:
    """What the cluster is, without what jobs leave behind and what counts up by itself."""
    store = box.master.state.store
    found: dict[str, Any] = {}
    kinds: tuple[type[Stored], ...] = (Instance, Volume, Snapshot, Pool, Group, Node, StorageCluster)
    for kind in kinds:
        for item in store.all(kind):
            found[item.resource] = item.model_dump(exclude={"generation", *CERTIFICATE})
    for name, node in box.ceph.nodes.items():
        # What was never touched is as good as what is empty again.
        if node != BoxNode():
            found[f"ceph:{name}"] = copy.deepcopy(vars(node))
    for claim in store.all(Claim):
        found[claim.resource] = {"holder": claim.holder, "migration": claim.migration}
    return found


def everything(box: Box) -> dict[str, str]:
    """The whole durable store as text, but for the term: a refused request leaves it untouched."""
    return {key: entry.value.decode() for key, entry in box.durable.entries.items() if not key.startswith("meta/")}


async def settle(box: Box, seconds: float = SETTLE) -> None:
    """Let the loops work, then wait until no job is under way."""
    await asyncio.sleep(seconds)
    for _ in range(600):
        if not any(job.state.active for job in box.master.state.store.all(Job)):
            return
        await asyncio.sleep(1.0)
    active = [(job.number, job.operation, job.state, box.master.engine.progress(job.number).text) for job in jobs(box) if job.state.active]
    raise AssertionError(f"jobs do not end: {active}")


def jobs(box: Box) -> list[Job]:
    return box.master.state.store.all(Job)


async def finish(box: Box, number: int) -> Job:
    """The job's end. If it needs attention, now that nothing disturbs it any more, a person undoes it, or resumes it past its commit."""
    job = await box.end_of(number)
    for _ in range(3):
        if job.state is not JobState.NEEDS_ATTENTION:
            return job
        await asyncio.sleep(10)
        if job.committed:
            await box.master.resume_job(number)
        else:
            await box.master.undo_job(number)
        job = await box.end_of(number)
    raise AssertionError(f"job {number} ({job.operation}) never ends: {job.reason}")


def check(box: Box, *, attention: bool = False, free: bool = False, marks: bool = False) -> None:
    """Everything that must hold once all is quiet. ``attention``: jobs that need attention are allowed, and what they hold is skipped;
    ``free``: an instance that should run may run nowhere if its claim is free; ``marks``: those of removed pools may stay."""
    store = box.master.state.store
    assert not box.world.violations, box.world.violations
    stuck = [(job.number, job.operation, job.reason) for job in jobs(box) if job.state is JobState.NEEDS_ATTENTION]
    assert attention or not stuck, stuck
    held = {hold.id for hold in store.all(Hold)}
    assert {hold.job for hold in store.all(Hold)} <= {number for number, _, _ in stuck}, "a hold has outlived its job"
    assert not box.master.engine._locks._wants, "a lock has outlived its job"
    assert not box.master.engine._tasks
    if not stuck:
        _check_storage(box, marks)
    for instance in store.all(Instance):
        if instance.resource not in held:
            _check_instance(box, instance, free)
    _check_guests(box, stuck=bool(stuck))
    _check_keys(box)
    if not stuck:
        _check_ceph(box)


def _check_keys(box: Box) -> None:
    """No key of a storage cluster is anywhere in the store but sealed."""
    text = "".join(everything(box).values())
    assert not [key for key in box.ceph.keys if key and key in text], "a key is in the store as it is"


def _check_ceph(box: Box) -> None:
    """Each node has of Ceph what the records say, and nothing else."""
    store = box.master.state.store
    made = [item for item in store.all(StorageCluster) if item.layout]
    wanted: dict[str, set[str]] = {name: set() for name in box.nodes}
    for item in made:
        layout = item.layout
        records = {node.name: node for node in store.all(Node)}
        for osd in layout["osds"]:
            assert box.ceph.node(osd["node"]).osds.get(osd["disk"]) == osd["uuid"], f"{osd} is not there"
            wanted[osd["node"]].add(f"osd.{osd['number']}")
        for kind in ("mon", "mgr"):
            for name in layout[f"{kind}s"]:
                wanted[name].add(f"{kind}.{name}")
        for name in layout["hosts"]:
            assert set(records[name].storage_roles) == {daemon.split(".")[0] for daemon in wanted[name]}, records[name]
            if records[name].storage == "stopped":
                wanted[name] = set()
            assert box.ceph.node(name).fsid == layout["fsid"]
        assert sorted(box.ceph.numbers) == sorted(osd["uuid"] for osd in layout["osds"]), "the monitors know other OSDs"
        assert not box.ceph.out, "OSDs on which nothing is kept"
        assert box.ceph.monmap == set(layout["mons"]), "other monitors count for the majority"
        assert {user for user in box.ceph.users if user.startswith("mgr.")} == {f"mgr.{name}" for name in layout["mgrs"]}
    for name in box.nodes:
        here = box.ceph.node(name)
        if name not in box.agents:
            # It has no power.
            continue
        assert here.running == wanted[name], f"{name} runs {here.running}, not {wanted[name]}"
        if not made:
            assert here == BoxNode(), f"{name} still has {here}"


def _check_storage(box: Box, marks: bool) -> None:
    store = box.master.state.store
    name = names(box)
    wanted: Counter[tuple[str, str]] = Counter()
    for volume in store.all(Volume):
        assert volume.state in (VolumeState.AVAILABLE, VolumeState.IN_USE), f"{volume.name} is {volume.state}"
        assert (volume.state is VolumeState.IN_USE) == (volume.instance is not None), volume
        places = [f"{volume.pool}@{name[n]}" for n in (volume.node, volume.secondary) if n] or [volume.pool]
        for place in places:
            wanted[place, volume.logical_id] += 1
            image = box.disks.images.get(place, {}).get(volume.logical_id)
            assert image is not None, f"{volume.name}: {volume.logical_id} is not in {place}"
            assert image["size"] == volume.size, f"{volume.name} has {volume.size}, its image {image['size']}"
            assert volume.adopted or image["volume"] == volume.id
        if volume.instance:
            owner = store.get(Instance, volume.instance)
            assert owner is not None, f"{volume.name} belongs to an instance that is not there"
            assert volume.id in [disk.volume for disk in owner.disks], f"{volume.name} says {owner.name}, which does not know it"
        records = box.world.images.get(box.disks.image(name.get(volume.node or "", ""), volume.id), 0)
        lost = box.world.acknowledged.get(volume.id, 0) - records
        assert lost <= 0, f"{volume.name} has lost {lost} acknowledged records"
    assert all(count == 1 for count in wanted.values()), wanted
    there = {(place, logical_id) for place, images in box.disks.images.items() for logical_id in images}
    assert there == set(wanted), f"orphan images: {there - set(wanted)}"
    for instance in store.all(Instance):
        for disk in instance.disks:
            found = store.get(Volume, disk.volume)
            assert found is not None, f"{instance.name} has disk {disk.volume}, which is not there"
            assert found.instance == instance.id, f"{instance.name} has {found.name}, which belongs to {found.instance}"
        slots = [disk.slot for disk in instance.disks]
        assert len(set(slots)) == len(slots), instance
    snapshots = {(item.pool, item.id) for item in store.all(Snapshot)}
    assert all(item.state is SnapshotState.COMPLETED and item.logical_id for item in store.all(Snapshot)), store.all(Snapshot)
    made = {(pool, ident) for pool, found in box.disks.snapshots.items() for ident in found}
    assert made == snapshots, f"orphan snapshots: {made - snapshots}, missing: {snapshots - made}"
    for kind in (Instance, Volume, Snapshot, Pool):
        counts = Counter(item.name for item in store.all(kind))
        assert all(count == 1 for count in counts.values()), counts
    assert {key.job for key in store.all(IdempotencyKey)} <= {job.number for job in jobs(box)}
    assert {claim.id for claim in store.all(Claim)} <= {instance.id for instance in store.all(Instance)}, "a claim of nothing"
    pools = {pool.id for pool in store.all(Pool)}
    marked = {mark.split("@")[0] for mark in box.disks.marks if not mark.startswith("probe ")}
    assert marked >= pools, f"pools without their marks: {pools - marked}"
    assert marked == pools or marks, f"marks of pools that are not there: {marked - pools}"
    assert not [mark for mark in box.disks.marks if mark.startswith("probe ")], "a probe lock stays"
    assert not box.disks.scripts, f"scripts still run: {box.disks.scripts}"
    by_hand = {(node, v) for node, owners in box._attached.items() for o, kept in owners.items() if o.endswith(".by-hand") for v in kept}
    for node, owners in box._attached.items():
        for owner in (o.removesuffix(".by-hand") for o, kept in owners.items() if o.endswith(".by-hand") and kept):
            holder = box.master.state.claim(owner).holder
            assert holder == box.nodes[node], f"disks of {owner} are mapped on {node}, but its claim is held by {holder}"
    assert set(box.disks.mapped) == by_hand, f"mapped: {box.disks.mapped}, known: {by_hand}"
    had = {(node, v) for (node, _), guest in box.world.guests.items() for v, disk in guest.disks.items() if by_device(disk)}
    assert box.disks.devices == had, f"devices: {box.disks.devices}, of guests: {had}"
    assert not [path for _, path in box.disks.exports if path.count(".") > 1], f"unfinished exports: {box.disks.exports}"
    assert not box.disks.served, f"still served for a copy: {box.disks.served}"


def _check_instance(box: Box, instance: Instance, free: bool) -> None:
    store = box.master.state.store
    claim = box.master.state.claim(instance.id)
    assert claim.migration is None, f"{instance.name} is still being migrated: {claim}"
    where = box.world.running(instance.id)
    holder = names(box).get(claim.holder or "")
    if instance.desired == "stopped":
        assert where == [], f"{instance.name} should be stopped, and runs on {where}"
        return
    if holder is None:
        assert free, f"{instance.name} should run, but nobody holds its claim"
        assert where == []
        return
    if claim.holder and (store.get(DeathProof, claim.holder) is not None or holder not in box.agents):
        return
    assert where == [holder], f"{instance.name} should run on {holder}, and runs on {where}"
    guest = box.world.guests[holder, instance.id]
    # A migration that was undone has used up a generation.
    assert guest.spec.generation <= claim.generation, f"{instance.name} is {guest.spec.generation}, its claim {claim.generation}"
    plugged = {(disk.volume, disk.slot) for disk in guest.disks.values()}
    assert plugged == {(disk.volume, disk.slot) for disk in instance.disks}, f"{instance.name}: {plugged} are plugged, not {instance.disks}"
    for volume, disk in guest.disks.items():
        assert disk.size == store.require(Volume, volume).size, f"the guest sees {disk.size} of {volume}"


def _check_guests(box: Box, stuck: bool) -> None:
    """No process of a guest but where its claim is."""
    if stuck:
        return
    store = box.master.state.store
    for (node, ident), guest in box.world.guests.items():
        if node not in box.agents or node in box.cut:
            continue
        instance = store.get(Instance, ident)
        assert instance is not None, f"a guest of a removed instance on {node}: {guest.state}"
        assert box.nodes[node] in box.master.state.claim(ident).nodes, f"{instance.name} has a process on {node}: {guest.state}"


# --- stories ---


async def running(box: Box, name: str = "web1", **request: Any) -> None:
    """An instance that runs on node1 with two disks, and has written."""
    request = {"disks": [{"size": 2 * GIB}, {"size": GIB}], "memory": GIB, "node": "node1", "template": "shared", **request}
    await box.do("instance.add", name=name, **request)
    box.world.tick(3)


async def stopped(box: Box, **request: Any) -> None:
    await running(box, **request)
    await box.do("instance.stop", "web1", timeout=1.0)


async def installed(box: Box) -> None:
    await stopped(box, os="noop")


async def exported(box: Box) -> None:
    await running(box)
    await box.do("instance.export", "web1", **EXPORT, shutdown=True)


async def stopped_by_storage(box: Box) -> None:
    """Running, until a write failed; it would go well now."""
    await running(box)
    box.world.trouble = lambda node, volume: "failed"
    box.world.tick()
    box.world.trouble = lambda node, volume: ""
    await asyncio.sleep(2)


async def local(box: Box, **request: Any) -> None:
    await box.add_pool("local", "file")
    await running(box, template="local", **request)


async def local_stopped(box: Box) -> None:
    await local(box)
    await box.do("instance.stop", "web1", timeout=1.0)


async def mirrored(box: Box) -> None:
    await box.add_pool("mirror", "fakemirror")
    await running(box, template="mirror", secondary="node2")


def image_on(node: str) -> Callable[[Box], Awaitable[None]]:
    async def begin(box: Box) -> None:
        box.disks.files[node, IMAGE["path"]] = {"format": "qcow2", "size": GIB}

    return begin


async def local_image(box: Box) -> None:
    await local(box)
    await image_on("node2")(box)


async def with_volume(box: Box) -> None:
    await running(box)
    await box.do("volume.create", name="data", pool="shared", size=GIB)


async def only_volume(box: Box) -> None:
    await box.do("volume.create", name="data", pool="shared", size=GIB)


async def dead_node(box: Box) -> None:
    await running(box)
    await box.power_cut("node1")
    await asyncio.sleep(10)


async def dead_mirror(box: Box) -> None:
    # This driver's copies are brought up when a guest stops or moves, so only what was written before that survives.
    await mirrored(box)
    await box.do("instance.stop", "web1", timeout=1.0)
    await box.do("instance.start", "web1", node="node1")
    await box.power_cut("node1")
    await asyncio.sleep(10)


async def two_running(box: Box) -> None:
    await running(box)
    await running(box, "web2", disks=[{"size": GIB}])
    await running(box, "web3", disks=[{"size": GIB}], start=False)


async def missing(box: Box) -> None:
    await running(box)
    ident = box.master.state.store.find(Instance, "web1").id
    box.world.kill_guest(ident, "node1")


async def lost_image(box: Box) -> None:
    await stopped(box)
    volume = box.master.state.store.find(Volume, "web1-disk1")
    del box.disks.images[volume.pool][volume.logical_id]
    box.world.images.pop(volume.id)
    box.world.acknowledged.pop(volume.id)


async def activated(box: Box) -> None:
    await stopped(box)
    await box.do("instance.activate-disks", "web1", node="node2")


async def with_disks(box: Box) -> None:
    await box.do("cluster.modify", storage_options={"ceph": {"disk": "/dev/sdb:/dev/sdc"}})


async def with_ceph(box: Box) -> None:
    await with_disks(box)
    await box.do("storage.init", "default", type="ceph")


async def with_ceph_of_two(box: Box) -> None:
    """Two nodes, one monitor: with the third there are three."""
    await with_disks(box)
    await box.do("group.add", name="away")
    await box.do("group.assign-nodes", "away", nodes=["node3"])
    await box.do("storage.init", "default", type="ceph")
    await box.do("node.modify", "node3", offline=True)
    await box.do("group.assign-nodes", "default", nodes=["node3"])
    # Not by way of the operation, after which it would join by itself.
    record = box.master.state.store.find(Node, "node3")
    await box.master.state.store.write(put=[record.model_copy(update={"offline": False, "ready": True})])


async def with_ceph_stopped(box: Box) -> None:
    await with_ceph(box)
    await box.do("node.modify", "node2", offline=True)


async def with_ceph_and_dead(box: Box) -> None:
    """Four nodes, three monitors, and node3 has lost its power for good."""
    await with_ceph(box)
    await box.power_cut("node3")
    await asyncio.sleep(20)


async def with_ceph_and_spare(box: Box) -> None:
    """The same, but node4 has no part in it yet."""
    await with_disks(box)
    await box.do("group.add", name="away")
    await box.do("group.assign-nodes", "away", nodes=["node4"])
    await box.do("storage.init", "default", type="ceph")
    await box.do("node.modify", "node4", offline=True)
    await box.do("group.assign-nodes", "default", nodes=["node4"])
    record = box.master.state.store.find(Node, "node4")
    await box.master.state.store.write(put=[record.model_copy(update={"offline": False, "ready": True})])
    await box.power_cut("node3")
    await asyncio.sleep(20)


IMAGE = {"node": "node2", "path": "/srv/debian.qcow2"}
IMAGED = [{"image": IMAGE}]
MIGRATES = ("done", "undone")
#: A node that has joined stays so, whatever becomes of the one in whose place it came.
JOINED = ("storage:", "node:", "ceph:")
EXPORT = {"node": "node2", "path": "/srv/web1.atoll"}
STORIES = [
    Story("add", "instance.add", "", {"name": "new", "disks": [{"size": GIB}, {"size": GIB}], "memory": GIB, "node": "node1"}),
    Story("add-local", "instance.add", "", {"name": "new", "template": "local", "disks": [{"size": GIB}], "memory": GIB}, local),
    Story("add-image", "instance.add", "", {"name": "new", "disks": IMAGED, "memory": GIB, "node": "node1"}, image_on("node2")),
    Story("add-seed", "instance.add", "", {"name": "new", "disks": [{"size": GIB}], "cloud_init": {"user_data": "#!/bin/sh"}}),
    Story("add-image-local", "instance.add", "", {"name": "new", "node": "node1", "template": "local", "disks": IMAGED}, local_image),
    Story("add-os", "instance.add", "", {"name": "new", "disks": [{"size": GIB}], "memory": GIB, "os": "noop"}),
    Story("reinstall", "instance.reinstall", "web1", {"os": "noop"}, stopped),
    Story("rename-os", "instance.rename", "web1", {"new_name": "www"}, installed),
    Story("export", "instance.export", "web1", EXPORT, stopped),
    Story("export-running", "instance.export", "web1", {**EXPORT, "shutdown": True, "timeout": 1.0}, running),
    Story("import", "instance.import", "", {"name": "web2", **EXPORT, "template": "shared"}, exported),
    Story("remove", "instance.remove", "web1", {"timeout": 1.0}, running),
    Story("start", "instance.start", "web1", {}, stopped),
    Story("start-elsewhere", "instance.start", "web1", {"node": "node3"}, stopped),
    Story("stop", "instance.stop", "web1", {"timeout": 1.0}, running),
    Story("resume", "instance.resume", "web1", {}, stopped_by_storage, broken=True),
    Story("reboot-full", "instance.reboot", "web1", {"type": "full"}, running),
    Story("migrate", "instance.migrate", "web1", {}, running, ends=MIGRATES),
    Story("migrate-mirrored", "instance.migrate", "web1", {}, mirrored, ends=MIGRATES),
    Story("failover", "instance.failover", "web1", {"timeout": 1.0}, running),
    Story("failover-dead", "instance.failover", "web1", {"node_is_dead": True}, dead_node, frees=True),
    Story("failover-dead-mirrored", "instance.failover", "web1", {"node_is_dead": True}, dead_mirror, frees=True),
    Story("move-stopped", "instance.move", "web1", {"node": "node2"}, local_stopped),
    Story("move-running", "instance.move", "web1", {"node": "node2"}, local, ends=MIGRATES),
    Story("rename", "instance.rename", "web1", {"new_name": "www"}, stopped),
    Story("modify", "instance.modify", "web1", {"memory": 2 * GIB}, running, records=True),
    Story("grow-disk", "instance.grow-disk", "web1", {"index": 1, "increment": GIB}, running),
    Story("grow-disk-stopped", "instance.grow-disk", "web1", {"index": 0, "size": 5 * GIB}, stopped),
    Story("add-disk", "instance.add-disk", "web1", {"disk": {"size": GIB}}, running),
    Story("attach-disk", "instance.attach-disk", "web1", {"volume": "data"}, with_volume),
    Story("detach-disk", "instance.detach-disk", "web1", {"index": 1}, running),
    Story("remove-disk", "instance.remove-disk", "web1", {"index": 1}, running),
    Story("activate-disks", "instance.activate-disks", "web1", {"node": "node2"}, stopped),
    Story("deactivate-disks", "instance.deactivate-disks", "web1", {}, activated),
    Story("recreate", "instance.recreate", "web1", {}, lost_image, broken=True),
    Story("volume-create", "volume.create", "", {"name": "data", "pool": "shared", "size": GIB}),
    Story("volume-image", "volume.create", "", {"name": "data", "pool": "shared", "size": 2 * GIB, "image": IMAGE}, image_on("node2")),
    Story("volume-delete", "volume.delete", "data", {}, only_volume),
    Story("volume-grow", "volume.grow", "data", {"increment": GIB}, only_volume),
    Story("volume-rename", "volume.rename", "data", {"new_name": "facts"}, only_volume),
    Story("pool-add", "pool.add", "", {"name": "more", "driver": "sharedfile", "options": {"path": "/box/more", "mount": "none"}}),
    Story("pool-add-local", "pool.add", "", {"name": "more", "driver": "file", "options": {"path": "/box/more", "mount": "none"}}),
    Story("pool-remove", "pool.remove", "shared"),
    Story("pool-check", "pool.check", "shared"),
    Story("pool-mark", "pool.mark", "shared", {"node": "node2"}),
    Story("node-evacuate", "node.evacuate", "node1", {}, two_running, ends=MIGRATES, partial=True),
    Story("node-failover-dead", "node.failover", "node1", {"node_is_dead": True}, dead_node, frees=True, partial=True),
    Story("storage-init", "storage.init", "default", {"type": "ceph"}, with_disks),
    Story("node-join-storage", "node.join-storage", "node3", {}, with_ceph_of_two),
    Story("node-offline-storage", "node.modify", "node2", {"offline": True}, with_ceph),
    Story("node-online-storage", "node.modify", "node2", {"offline": False}, with_ceph_stopped),
    Story("node-leave-storage", "node.leave-storage", "node2", {}, with_ceph, nodes=4),
    Story("node-leave-storage-dead", "node.leave-storage", "node3", {"dead": True}, with_ceph_and_dead, nodes=4),
    Story("node-remove-storage-dead", "node.remove", "node3", {"dead": True}, with_ceph_and_dead, nodes=4),
    Story("node-replace-storage", "node.replace-storage", "node3", {"node": "node4"}, with_ceph_and_spare, nodes=4, stays=JOINED),
    Story("node-add-storage-disks", "node.add-storage-disks", "node2", {"disks": ["/dev/sdd"]}, with_ceph),
    Story("node-remove-storage-disks", "node.remove-storage-disks", "node2", {"disks": ["/dev/sdc"]}, with_ceph),
    Story("restart-missing", "instance.restart-missing", "web1", {}, missing, internal=True),
]
