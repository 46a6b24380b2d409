"""The table of bad input, at the level of operations: each case gives its documented error and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from simsupport import (
    activated,
    check,
    dead_node,
    dump,
    everything,
    jobs,
    local,
    local_stopped,
    mirrored,
    only_volume,
    running,
    settle,
    stopped,
    with_volume,
)

from atoll.lab.box import ROOT, Box, simulate
from atoll.model.errors import AtollError, StaleTerm
from atoll.model.messages import Call
from atoll.model.objects import Instance, JobState, Volume
from atoll.model.units import GIB
from atoll.rpc.agents import quiet


@dataclass
class Case:
    """A request that must be refused with this code, at once or (``late``) by its job."""

    label: str
    code: str
    operation: str
    target: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[Box], Awaitable[None]] | None = None
    late: bool = False
    hint: str = ""


async def offline(box: Box) -> None:
    await box.do("node.modify", "node2", offline=True)


async def offline_with_instance(box: Box) -> None:
    await running(box)
    await offline(box)


async def drained(box: Box) -> None:
    await running(box)
    await box.do("node.modify", "node2", drained=True)


async def silent(box: Box) -> None:
    await running(box)
    await box.crash_agent("node2")
    await asyncio.sleep(10)


async def silent_pool(box: Box) -> None:
    await box.crash_agent("node2")
    await asyncio.sleep(10)


async def two_pools(box: Box) -> None:
    await box.add_pool("second", path="/box/second")


async def other_group(box: Box) -> None:
    await running(box)
    await box.do("group.add", name="far")
    await box.do("group.assign-nodes", "far", nodes=["node3"])
    await asyncio.sleep(5)


async def small(box: Box) -> None:
    await running(box)
    box.disks.capacity = 4 * GIB


async def full_in_the_middle(box: Box) -> None:
    """The first disk still fits, the second does not."""
    box.disks.capacity = 3 * GIB


async def unmounted(box: Box) -> None:
    await running(box)
    box.disks.lost.update(box.disks.images)


async def unmounted_stopped(box: Box) -> None:
    await stopped(box)
    box.disks.lost.update(box.disks.images)


async def foreign_writer(box: Box) -> None:
    """Somebody who is no instance of ours has the disk open."""
    await running(box)
    web1 = box.master.state.store.find(Instance, "web1").id
    spec = box.world.guests["node1", web1].spec
    await box.do("instance.stop", "web1", timeout=1.0)
    box.world.make(spec.model_copy(update={"instance": "i-00000000000000bad", "name": "stranger"}), "node3", incoming=False)


async def foreign_image(box: Box) -> None:
    await running(box)
    pool = next(iter(box.disks.images))
    box.disks.images[pool]["theirs.img"] = {"size": GIB, "volume": None}
    await box.do("volume.create", name="taken", pool="shared", adopt="theirs.img")


async def two_local(box: Box) -> None:
    await local(box)
    await box.do("volume.create", name="there", pool="local", size=GIB, node="node3")


async def eight_disks(box: Box) -> None:
    await running(box, disks=[{"size": GIB}] * 8)


async def needs_attention(box: Box) -> None:
    """A job that could neither be done nor undone holds web1."""
    await stopped(box)

    async def cut(phase: str, node: str, call: Call) -> None:
        if call.method == "guest.start":
            box.cut.add(node)

    box.link_fault = cut
    number = (await box.submit("instance.start", "web1", node="node1")).job
    assert number is not None
    assert (await box.end_of(number)).state is JobState.NEEDS_ATTENTION


async def one_done(box: Box) -> None:
    await box.submit("instance.add", name="web1", disks=[{"size": GIB}], key="the key")
    await asyncio.sleep(5)


HUGE = (1 << 60) + 512
ADD: dict[str, Any] = {"name": "new", "disks": [{"size": GIB}], "memory": GIB}
GOOD = {"path": "/box/more", "mount": "none"}
SHARED = {"path": "/box/shared", "mount": "none"}
CASES = [
    # --- names ---
    *(
        Case(f"{operation} of an unknown object", "not_found", operation, "nobody", request)
        for operation, request in {
            "instance.remove": {}, "instance.start": {}, "instance.stop": {}, "instance.reboot": {}, "instance.migrate": {},
            "instance.failover": {}, "instance.move": {"node": "node2"}, "instance.rename": {"new_name": "x"}, "instance.modify": {},
            "instance.grow-disk": {"increment": GIB}, "instance.add-disk": {"disk": {"size": GIB}}, "instance.attach-disk": {"volume": "v"},
            "instance.detach-disk": {"index": 0}, "instance.remove-disk": {"index": 0}, "instance.activate-disks": {},
            "instance.deactivate-disks": {}, "instance.recreate": {}, "instance.tags": {"add": ["a"]}, "volume.delete": {},
            "volume.grow": {"increment": GIB}, "volume.rename": {"new_name": "x"}, "volume.tags": {"add": ["a"]}, "pool.remove": {},
            "pool.check": {}, "pool.connect": {"group": "default"}, "pool.disconnect": {"group": "default"},
            "pool.modify": {"state": "closed"}, "pool.tags": {"add": ["a"]}, "group.modify": {}, "group.remove": {},
            "group.rename": {"new_name": "x"}, "group.assign-nodes": {"nodes": ["node1"]}, "group.tags": {"add": ["a"]},
            "node.modify": {"drained": True}, "node.remove": {}, "node.migrate": {}, "node.failover": {}, "node.evacuate": {},
            "node.declare-dead": {}, "node.tags": {"add": ["a"]},
        }.items()
    ),
    Case("an unknown operation", "not_found", "instance.explode", "web1"),
    Case("an unknown pool", "not_found", "instance.add", "", {**ADD, "template": "nowhere"}),
    Case("an unknown driver", "not_found", "pool.add", "", {"name": "p", "driver": "floppy", "options": GOOD}),
    Case("a pool of another driver", "not_found", "instance.add", "", {**ADD, "template": "file:shared"}),
    Case("an unknown node", "not_found", "instance.add", "", {**ADD, "node": "node9"}),
    Case("an unknown group", "not_found", "instance.add", "", {**ADD, "group": "moon"}),
    Case("an unknown group of a pool", "not_found", "pool.add", "", {"name": "p", "driver": "file", "options": GOOD, "groups": ["moon"]}),
    Case("an unknown target node", "not_found", "instance.migrate", "web1", {"node": "node9"}, running),
    Case("an unknown volume", "not_found", "instance.attach-disk", "web1", {"volume": "nothing"}, running),
    Case("an unknown disk", "not_found", "instance.grow-disk", "web1", {"index": 7, "increment": GIB}, running),
    Case("a volume that is no disk of it", "not_found", "instance.detach-disk", "web1", {"volume": "data"}, with_volume),
    Case("an image to adopt that is not there", "not_found", "volume.create", "", {"pool": "shared", "adopt": "no.img"}, late=True),
    Case("a taken instance name", "already_exists", "instance.add", "", {**ADD, "name": "web1"}, running),
    Case("a taken pool name", "already_exists", "pool.add", "", {"name": "shared", "driver": "file", "options": GOOD}),
    Case("a taken volume name", "already_exists", "volume.create", "", {"name": "data", "pool": "shared", "size": GIB}, only_volume),
    Case("a taken group name", "already_exists", "group.add", "", {"name": "default"}),
    Case("a taken name of a disk", "already_exists", "instance.add", "", {**ADD, "disks": [{"size": GIB, "name": "data"}]}, only_volume),
    Case("a taken new name", "already_exists", "volume.rename", "data", {"new_name": "web1-disk0"}, with_volume),
    *(
        Case(f"the name {name!r}", "invalid_input", "volume.create", "", {"name": name, "pool": "shared", "size": GIB})
        for name in ("", "-a", "a-", "a b", "a/b", "../a", "ä", "a" * 64, "vol-0123456789abcdef0", "a\n", "--help", ".")
    ),
    Case("an instance named like an id", "invalid_input", "instance.add", "", {**ADD, "name": "i-0123456789abcdef0"}),
    Case("a pool named like a driver", "invalid_input", "pool.add", "", {"name": "file", "driver": "file", "options": GOOD}),
    Case("several pools of the driver", "ambiguous_pool", "instance.add", "", {**ADD, "template": "sharedfile"}, two_pools),
    Case("no pool said", "invalid_input", "instance.add", "", ADD, two_pools),
    # --- sizes ---
    *(
        Case(f"a size of {size!r}", "invalid_input", "volume.create", "", {"name": "v", "pool": "shared", "size": size})
        for size in (0, -1, HUGE, 1 << 80, "ten", 1.5, None)
    ),
    Case("a disk of size zero", "invalid_input", "instance.add", "", {**ADD, "disks": [{"size": 0}]}),
    Case("a negative increment", "invalid_input", "instance.grow-disk", "web1", {"index": 0, "increment": -GIB}, running),
    Case("a growth above what there is", "invalid_size", "instance.grow-disk", "web1", {"index": 0, "increment": 1 << 60}, running),
    Case("a smaller size", "shrink_refused", "instance.grow-disk", "web1", {"index": 0, "size": GIB}, running),
    Case("a smaller volume", "shrink_refused", "volume.grow", "data", {"size": 512}, only_volume),
    Case("neither size nor increment", "invalid_input", "volume.grow", "data", {}, only_volume),
    Case("size and increment", "invalid_input", "volume.grow", "data", {"size": 9 * GIB, "increment": GIB}, only_volume),
    Case("a full pool", "pool_full", "volume.create", "", {"name": "v", "pool": "shared", "size": 9 * GIB}, small, late=True),
    Case("a pool that fills up", "pool_full", "instance.add", "", {**ADD, "disks": [{"size": 2 * GIB}] * 2}, full_in_the_middle, late=True),
    Case("no room to grow", "pool_full", "instance.grow-disk", "web1", {"index": 0, "increment": 9 * GIB}, small, late=True),
    Case("no room for another disk", "pool_full", "instance.add-disk", "web1", {"disk": {"size": 9 * GIB}}, small, late=True),
    # --- nodes and places ---
    Case("an offline node", "node_unavailable", "instance.add", "", {**ADD, "node": "node2"}, offline),
    Case("a drained node", "node_unavailable", "instance.migrate", "web1", {"node": "node2"}, drained),
    Case("an offline target", "node_unavailable", "instance.failover", "web1", {"node": "node2"}, offline_with_instance),
    Case("a silent target", "node_unavailable", "instance.migrate", "web1", {"node": "node2"}, silent),
    Case("a silent owner", "node_unavailable", "instance.add", "", {**ADD, "node": "node2"}, silent),
    Case("a pool on a silent node", "node_unavailable", "pool.add", "", {"name": "p", "driver": "file", "options": GOOD}, silent_pool),
    Case("an instance on a silent node", "node_unavailable", "instance.migrate", "web1", {}, dead_node),
    Case("a stop on a silent node", "node_unavailable", "instance.stop", "web1", {}, dead_node),
    Case("an evacuation of a silent node", "node_unavailable", "node.evacuate", "node1", {}, dead_node),
    Case("no proof", "needs_proof", "instance.failover", "web1", {}, dead_node, hint="--node-is-dead"),
    Case("no proof for a start", "needs_proof", "instance.start", "web1", {"node": "node2"}, dead_node, hint="--node-is-dead"),
    Case("dead, but it answers", "node_answers", "instance.failover", "web1", {"node_is_dead": True}, running),
    Case("dead, but nobody holds it", "node_answers", "instance.failover", "web1", {"node_is_dead": True}, stopped),
    Case("dead, but the node answers", "node_answers", "node.failover", "node1", {"node_is_dead": True}, running),
    Case("declared dead, but it answers", "node_answers", "node.declare-dead", "node1"),
    Case("more memory than there is", "no_place", "instance.add", "", {**ADD, "memory": 1 << 40}),
    Case("more memory than the node has", "node_unavailable", "instance.add", "", {**ADD, "memory": 1 << 40, "node": "node1"}),
    Case("a group without the pool", "pool_not_reachable", "instance.add", "", {**ADD, "group": "far", "template": "shared"}, other_group),
    Case("a target whose group has not the pool", "node_unavailable", "instance.migrate", "web1", {"node": "node3"}, other_group),
    Case("migrating a local disk", "not_mobile", "instance.migrate", "web1", {}, local, hint="instance move web1"),
    Case("failing a local disk over", "not_mobile", "instance.failover", "web1", {}, local),
    Case("starting a local disk elsewhere", "not_mobile", "instance.start", "web1", {"node": "node2"}, local_stopped, hint="instance move"),
    Case("moving a shared disk", "wrong_state", "instance.move", "web1", {"node": "node2"}, running, hint="instance migrate"),
    Case("moving to where it is", "invalid_input", "instance.move", "web1", {"node": "node1"}, local),
    Case("moving to a shared pool", "invalid_input", "instance.move", "web1", {"node": "node2", "pool": "shared"}, local),
    Case("migrating to where it is", "invalid_input", "instance.migrate", "web1", {"node": "node1"}, running),
    Case("evacuating to itself", "invalid_input", "node.evacuate", "node1", {"target": "node1"}),
    Case("a mirrored disk on a third node", "node_unavailable", "instance.migrate", "web1", {"node": "node3"}, mirrored),
    Case("a secondary without a mirror", "invalid_input", "instance.add", "", {**ADD, "secondary": "node2"}),
    Case("a local volume without a node", "invalid_input", "volume.create", "", {"name": "v", "pool": "local", "size": GIB}, local),
    Case("a local volume of another node", "wrong_state", "instance.attach-disk", "web1", {"volume": "there"}, two_local),
    Case("an unknown role", "invalid_input", "node.modify", "node1", {"roles": ["king"]}),
    # --- storage that is not there ---
    Case("a share that is gone", "pool_unavailable", "volume.create", "", {"pool": "shared", "size": GIB}, unmounted, late=True),
    Case("a new instance on it", "pool_unavailable", "instance.add", "", ADD, unmounted, late=True),
    Case("growing on it", "pool_unavailable", "instance.grow-disk", "web1", {"increment": GIB}, unmounted, late=True),
    Case("starting from it", "pool_unavailable", "instance.start", "web1", {}, unmounted_stopped, late=True),
    Case("migrating on it", "pool_unavailable", "instance.migrate", "web1", {}, unmounted, late=True),
    Case("plugging from it", "pool_unavailable", "instance.add-disk", "web1", {"disk": {"size": GIB}}, unmounted, late=True),
    # --- what is in use ---
    Case("a disk that a stranger writes", "disk_in_use", "instance.start", "web1", {"node": "node1"}, foreign_writer, late=True),
    Case("a disk of another instance", "in_use", "instance.attach-disk", "web1", {"volume": "web1-disk1"}, running),
    Case("deleting a disk in use", "in_use", "volume.delete", "web1-disk0", {}, running),
    Case("growing it past its instance", "in_use", "volume.grow", "web1-disk0", {"increment": GIB}, running),
    Case("renaming it", "in_use", "volume.rename", "web1-disk0", {"new_name": "x"}, running),
    Case("renaming what runs", "in_use", "instance.rename", "web1", {"new_name": "x"}, running),
    Case("taking the first disk from what runs", "in_use", "instance.detach-disk", "web1", {"index": 0}, running),
    Case("removing a pool with volumes", "in_use", "pool.remove", "shared", {}, running),
    Case("disconnecting a pool in use", "in_use", "pool.disconnect", "shared", {"group": "default"}, running),
    Case("removing a node in use", "in_use", "node.remove", "node1", {}, running),
    Case("removing a node with volumes", "in_use", "node.remove", "node1", {}, local_stopped),
    Case("an offline node that runs something", "in_use", "node.modify", "node1", {"offline": True}, running),
    Case("removing a group with nodes", "in_use", "group.remove", "default"),
    Case("the same storage twice", "in_use", "pool.add", "", {"name": "p", "driver": "sharedfile", "options": SHARED}),
    Case("activating what runs", "in_use", "instance.activate-disks", "web1", {}, running),
    Case("starting what is activated", "wrong_state", "instance.start", "web1", {"node": "node3"}, activated, late=True),
    Case("recreating what runs", "in_use", "instance.recreate", "web1", {}, running),
    Case("an image of a volume", "wrong_state", "volume.create", "", {"pool": "shared", "adopt": "theirs.img"}, foreign_image, late=True),
    # --- what is not so ---
    Case("starting what runs", "wrong_state", "instance.start", "web1", {}, running),
    Case("stopping what is stopped", "wrong_state", "instance.stop", "web1", {}, stopped),
    Case("rebooting what is stopped", "wrong_state", "instance.reboot", "web1", {}, stopped),
    Case("migrating what is stopped", "wrong_state", "instance.migrate", "web1", {}, stopped),
    Case("a ninth disk", "wrong_state", "instance.add-disk", "web1", {"disk": {"size": GIB}}, eight_disks),
    Case("a job of a held instance", "held", "instance.start", "web1", {}, needs_attention, hint="atoll job"),
    Case("its removal", "held", "instance.remove", "web1", {}, needs_attention, hint="atoll job"),
    Case("its disk", "held", "volume.rename", "web1-disk0", {"new_name": "x"}, needs_attention, hint="atoll job"),
    Case("an evacuation with it", "held", "instance.migrate", "web1", {}, needs_attention, hint="atoll job"),
    Case("another pool of a group", "not_found", "pool.disconnect", "shared", {"group": "far"}, other_group),
    # --- form ---
    Case("an unknown field", "invalid_input", "instance.start", "web1", {"quickly": True}, stopped),
    Case("a wrong type", "invalid_input", "instance.add", "", {**ADD, "disks": "many"}),
    Case("a missing field", "invalid_input", "instance.move", "web1", {}, local),
    Case("too little memory", "invalid_input", "instance.add", "", {**ADD, "memory": 1}),
    Case("no processor", "invalid_input", "instance.add", "", {**ADD, "vcpus": 0}),
    Case("too many disks", "invalid_input", "instance.add", "", {**ADD, "disks": [{"size": GIB}] * 9}),
    Case("a bad mode", "invalid_input", "instance.attach-disk", "web1", {"volume": "data", "mode": "wo"}, with_volume),
    Case("a bad MAC address", "invalid_input", "instance.add", "", {**ADD, "nics": [{"mac": "zz"}]}),
    Case("a bridge without a name", "invalid_input", "instance.add", "", {**ADD, "nics": [{"mode": "bridged"}]}),
    Case("a bad tag", "invalid_input", "instance.tags", "web1", {"add": ["a b"]}, running),
    Case("a negative time", "invalid_input", "instance.stop", "web1", {"timeout": -1}, running),
    Case("both ways to name a disk", "invalid_input", "instance.detach-disk", "web1", {"index": 1, "volume": "web1-disk1"}, running),
    Case("an unknown option", "invalid_input", "pool.add", "", {"name": "p", "driver": "file", "options": {**GOOD, "colour": "red"}}),
    Case("a missing option", "invalid_input", "pool.add", "", {"name": "p", "driver": "file"}),
    Case("a bad choice", "invalid_input", "pool.add", "", {"name": "p", "driver": "file", "options": {**GOOD, "preallocation": "much"}}),
    Case("an unknown state", "invalid_input", "pool.modify", "shared", {"state": "broken"}),
    Case("a volume with neither size nor image", "invalid_input", "volume.create", "", {"name": "v", "pool": "shared"}),
]  # fmt: skip


def _storage(box: Box) -> str:
    return str(({pool: images for pool, images in box.disks.images.items() if images}, box.disks.marks))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace("\n", "n"))
def test_bad_input(case: Case) -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        if case.begin is not None:
            await case.begin(box)
        before, image = everything(box), (dump(box), _storage(box), sorted(box.world.guests))
        if case.late:
            number = (await box.submit(case.operation, case.target, **case.request)).job
            job = await box.end_of(number or 0)
            assert job.state is JobState.UNDONE, (job.state, job.error, job.reason)
            assert job.error is not None
            assert job.error["code"] == case.code, job.error
        else:
            with pytest.raises(AtollError) as caught:
                await box.submit(case.operation, case.target, **case.request)
            assert caught.value.code == case.code, caught.value
            assert caught.value.message
            assert case.hint in caught.value.hint, caught.value.hint
            assert everything(box) == before
        assert (dump(box), _storage(box), sorted(box.world.guests)) == image
        assert box.master.engine._locks._wants == {}
        await box.close()

    simulate(run)


def test_key_with_another_request() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await one_done(box)
        before = everything(box)
        with pytest.raises(AtollError) as caught:
            await box.submit("instance.add", key="the key", name="web2", disks=[{"size": GIB}])
        assert caught.value.code == "idempotency_key_reused"
        assert everything(box) == before
        again = await box.submit("instance.add", key="the key", name="web1", disks=[{"size": GIB}])
        assert again.repeated
        assert everything(box) == before
        await box.close()

    simulate(run)


def test_jobs_that_are_not_there_or_have_ended() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        before = everything(box)
        for call in (box.master.cancel_job, box.master.resume_job, box.master.undo_job):
            with pytest.raises(AtollError) as caught:
                await call(99)
            assert caught.value.code == "not_found"
            with pytest.raises(AtollError) as caught:
                await call(1)
            assert caught.value.code == "wrong_state"
        assert everything(box) == before
        await box.close()

    simulate(run)


def test_stale_term() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await running(box)
        term = box.master.state.store.term
        before = everything(box)
        call = Call(term=term - 1, job=10**6, step="old", method="guest.stop", args={"instance": "i", "generation": 9})
        with pytest.raises(StaleTerm):
            await box.agents["node1"].service.handle(call, quiet)
        assert everything(box) == before
        await box.close()

    simulate(run)


def test_two_jobs_on_one_instance_wait_for_each_other() -> None:
    """The second is checked again when its turn comes: what no longer fits is refused then."""

    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await with_volume(box)
        await running(box, "web2", node="node2", disks=[{"size": GIB}])
        submitted = [
            await box.submit("instance.detach-disk", "web1", index=1),
            await box.submit("instance.remove-disk", "web1", index=1),
            await box.submit("instance.attach-disk", "web1", volume="data"),
            await box.submit("instance.attach-disk", "web2", volume="data"),
            await box.submit("instance.grow-disk", "web1", index=0, increment=GIB),
            await box.submit("instance.grow-disk", "web1", index=0, increment=GIB),
            await box.submit("instance.add-disk", "web2", disk={"size": GIB}),
            await box.submit("instance.add-disk", "web2", disk={"size": GIB}),
            await box.submit("instance.stop", "web1", timeout=1.0),
            await box.submit("instance.stop", "web1", timeout=1.0),
            await box.submit("volume.create", name="twice", pool="shared", size=GIB),
            await box.submit("volume.create", name="twice", pool="shared", size=GIB),
            await box.submit("pool.check", "shared"),
        ]
        ends = []
        for submission in submitted:
            assert submission.job is not None
            job = await box.end_of(submission.job)
            ends.append(job.error["code"] if job.error else str(job.state))
        # Removing disk 1 became another matter when it was detached, or attached again in another slot.
        assert ends[0] == "done"
        assert ends[1] in ("not_found", "wrong_state")
        assert sorted(ends[2:4]) == ["done", "in_use"]
        assert ends[4:6] == ["done", "done"]
        assert ends[6:8] == ["done", "done"]
        assert ends[8:10] == ["done", "wrong_state"]
        assert sorted(ends[10:12]) == ["already_exists", "done"]
        store = box.master.state.store
        assert store.find(Volume, "web1-disk0").size == 4 * GIB
        assert store.find(Volume, "web1-disk1").instance is None
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_the_same_request_from_many_at_once_is_one_job() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        request = {"name": "web1", "disks": [{"size": GIB}], "memory": GIB}
        found = await asyncio.gather(*(box.master.submit("instance.add", "", request, who=ROOT, key="k") for _ in range(20)))
        assert len({submission.job for submission in found}) == 1
        assert [submission.repeated for submission in found].count(False) == 1
        named = await asyncio.gather(*(box.master.submit("instance.add", "", {**request, "name": "b"}, who=ROOT) for _ in range(20)))
        states = [(await box.end_of(submission.job or 0)).state for submission in named]
        assert states.count(JobState.DONE) == 1
        assert states.count(JobState.UNDONE) == 19
        await settle(box)
        check(box)
        assert len(jobs(box)) == 1 + 1 + 20
        await box.close()

    simulate(run)


def test_a_node_that_is_named_twice_is_assigned_once() -> None:
    """Found by requests that were made up: its job tried to write the node twice, and needed attention."""

    async def story() -> None:
        box = await Box.make(nodes=2)
        await box.do("group.add", name="other")
        result = await box.do("group.assign-nodes", "other", nodes=["node2", box.nodes["node2"], "node2"])
        assert result["nodes"] == [box.nodes["node2"]]
        await settle(box)
        check(box)
        await box.close()

    simulate(story)
