"""Nodes that are gone for good, with disks that only they had: a person's word lets jobs end by forgetting them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import Striker, background, bounce_master, check, local, local_stopped, running, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import InUse, NodeAnswers
from atoll.model.objects import DeathProof, Hold, Instance, Job, JobState, Node, Volume
from atoll.model.units import GIB

WORD = "atoll node declare-dead node1 --disks-are-lost"


async def stuck(box: Box, operation: str, target: str, method: str, **request: Any) -> Job:
    """The node dies for good when the order of a committed job is about to be carried out."""

    async def die(box: Box, point: str) -> None:
        background(box.power_cut("node1"))
        await asyncio.Event().wait()

    with Striker(box, f"agent:{method}:before", die) as striker:
        number = (await box.submit(operation, target, **request)).job
        assert number is not None
        job = await box.end_of(number)
    assert striker.struck == 1
    assert job.state is JobState.NEEDS_ATTENTION
    assert job.commands == (f"atoll job resume {number}", WORD)
    return job


async def resumed(box: Box, job: Job) -> Job:
    await box.master.resume_job(job.number)
    return await box.end_of(job.number)


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("operation", ["instance.remove-disk", "volume.delete", "instance.remove"])
def test_a_removal_ends_by_forgetting_the_disk(operation: str, crash: bool) -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await local_stopped(box)
        target, request = "web1", {}
        if operation == "volume.delete":
            target = "data"
            await box.do("volume.create", name="data", pool="local", size=GIB, node="node1")
        elif operation == "instance.remove-disk":
            request = {"index": 1}
        job = await stuck(box, operation, target, "volume.delete", **request)
        # The word that it is off is not the word that its disks are gone.
        await box.do("node.declare-dead", "node1")
        assert (await resumed(box, job)).state is JobState.NEEDS_ATTENTION
        await box.do("node.declare-dead", "node1", disks_are_lost=True)
        if crash:
            background(bounce_master(box, 0.1))
            await asyncio.sleep(10)
        job = await resumed(box, job)
        assert job.state is JobState.DONE, job.reason
        assert all("on node1 was forgotten, not deleted" in line for line in job.result["lost"])
        assert len(job.result["lost"]) == (2 if operation == "instance.remove" else 1)
        assert not box.master.state.store.all(Hold)
        left = {"instance.remove": 0, "instance.remove-disk": 1, "volume.delete": 2}[operation]
        assert len(box.master.state.store.all(Volume)) == left
        await box.close()

    simulate(story)


@pytest.mark.parametrize("operation", ["instance.grow-disk", "volume.grow"])
def test_a_grow_ends_undone(operation: str) -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        target, request = "data", {}
        if operation == "volume.grow":
            await box.add_pool("local", "file")
            await box.do("volume.create", name="data", pool="local", size=GIB, node="node1")
        else:
            target, request = "web1", {"index": 1}
            await local(box)
        job = await stuck(box, operation, target, "volume.grow", increment=GIB, **request)
        await box.do("node.declare-dead", "node1", disks_are_lost=True)
        job = await resumed(box, job)
        assert job.state is JobState.UNDONE
        assert job.error is not None
        assert "was on node1, whose disks are lost" in job.error["message"]
        assert ("instance remove web1" if target == "web1" else "volume delete data") in job.error["hint"]
        assert not box.master.state.store.all(Hold)
        # What is lost can be dropped then, and the node.
        await box.do("volume.delete" if target == "data" else "instance.remove", target)
        await box.do("node.remove", "node1")
        assert not box.master.state.store.all(Volume)
        assert [n.name for n in box.master.state.store.all(Node)] == ["node2", "node3"]
        await box.close()

    simulate(story)


def test_a_creation_on_lost_disks_is_undone() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool("local", "file")

        async def die(box: Box, point: str) -> None:
            background(box.power_cut("node1"))
            await asyncio.Event().wait()

        with Striker(box, "agent:volume.create:after", die):
            number = (await box.submit("volume.create", name="data", pool="local", size=GIB, node="node1")).job
            assert number is not None
            job = await box.end_of(number)
        assert job.state is JobState.NEEDS_ATTENTION
        await box.do("node.declare-dead", "node1")
        await box.master.undo_job(number)
        job = await box.end_of(number)
        assert job.state is JobState.NEEDS_ATTENTION
        assert WORD in job.commands
        await box.do("node.declare-dead", "node1", disks_are_lost=True)
        await box.master.undo_job(number)
        assert (await box.end_of(number)).state is JobState.UNDONE
        await box.close()

    simulate(story)


def test_a_guest_that_died_after_its_disk_had_grown_needs_no_telling() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await running(box)

        async def die(box: Box, point: str) -> None:
            background(box.power_cut("node1"))
            await asyncio.Event().wait()

        with Striker(box, "agent:guest.resize:before", die):
            number = (await box.submit("instance.grow-disk", "web1", index=1, increment=GIB)).job
            assert number is not None
            job = await box.end_of(number)
        assert job.state is JobState.NEEDS_ATTENTION
        await box.master.resume_job(number, node_is_dead="node1")
        assert (await box.end_of(number)).state is JobState.DONE
        await box.do("instance.failover", "web1", node_is_dead=True)
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


def test_a_node_that_returns_in_spite_of_it_has_orphans() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await local_stopped(box)
        with pytest.raises(InUse) as refused:
            await box.do("node.remove", "node1")
        assert "instance remove web1" in refused.value.hint
        assert "lost" not in refused.value.hint
        await box.power_cut("node1")
        await asyncio.sleep(10)
        with pytest.raises(InUse) as refused:
            await box.do("node.remove", "node1")
        assert WORD in refused.value.hint
        await box.do("node.declare-dead", "node1", disks_are_lost=True)
        # A weaker word does not take it back.
        await box.do("node.declare-dead", "node1")
        await box.do("instance.remove", "web1")
        assert not box.master.state.store.all(Instance)
        await box.boot_agent("node1")
        await settle(box)
        assert not box.master.state.store.all(DeathProof)
        found = [f for f in await box.master.verify() if f.what == "orphan image"]
        assert len(found) == 2
        assert all("local on node1" in f.about for f in found)
        with pytest.raises(NodeAnswers):
            await box.do("node.declare-dead", "node1", disks_are_lost=True)
        await box.close()

    simulate(story)
