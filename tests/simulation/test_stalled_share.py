"""A share that gives no answer, on one node or on all: what is refused, what goes elsewhere, what jobs say, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import check, finish, running, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, DiskInUse, NodeUnavailable, NoPlace, PoolUnavailable
from atoll.model.objects import Instance, JobState, Pool
from atoll.model.units import GIB
from atoll.operations import views

WHY = "no answer to space"


async def made() -> tuple[Box, Instance]:
    box = await Box.make()
    await box.add_pool()
    await box.add_pool("quick")
    await running(box)
    return box, box.master.state.store.find(Instance, "web1")


async def stall(box: Box, *nodes: str) -> None:
    pool = box.master.state.store.find(Pool, "shared")
    box.disks.stalled = {node: {pool.id: WHY} for node in nodes or box.nodes}
    await box.settle_reports()


async def back(box: Box) -> None:
    box.disks.stalled = {}
    await box.settle_reports()


def row(box: Box, noun: str, name: str) -> dict[str, Any]:
    return next(r for r in views.rows(box.master.state, noun)[0] if r["name"] == name)


def test_it_is_shown_where_somebody_looks() -> None:
    async def story() -> None:
        box, web = await made()
        await stall(box, "node1")
        assert row(box, "pool", "shared")["stalled"] == {"node1": f"{WHY}, for 60 s"}
        assert row(box, "node", "node1")["stalled_pools"] == {"shared": f"{WHY}, for 60 s"}
        shown = row(box, "instance", "web1")
        assert (shown["state"], shown["reason"]) == ("running", "pool shared does not answer on its node")
        found = [f for f in await box.master.verify() if f.what == "pool is stalled on a node"]
        assert [(f.severity, f.about, f.why, f.since) for f in found] == [("error", "shared on node1", WHY, 60.0)]
        assert found[0].commands[0] == "atoll pool info shared"
        await back(box)
        assert not await box.master.verify()
        assert box.world.running(web.id) == ["node1"]
        await box.close()

    simulate(story)


def test_who_can_work_elsewhere_does() -> None:
    async def story() -> None:
        box, _ = await made()
        await stall(box, "node1", "node2")
        await box.do("volume.create", name="data", pool="shared", size=GIB)
        await box.do("instance.add", name="web2", disks=[{"size": GIB}], memory=GIB, template="shared")
        assert row(box, "instance", "web2")["node"] == "node3"
        with pytest.raises(NodeUnavailable, match="node2 gets no answer from the storage of pool shared"):
            await box.do("instance.migrate", "web2", node="node2")
        await back(box)
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize(
    ("operation", "target", "request_", "error"),
    [
        ("volume.create", "", {"name": "data", "pool": "shared", "size": GIB}, PoolUnavailable),
        ("instance.add", "", {"name": "web2", "disks": [{"size": GIB}], "memory": GIB, "template": "shared"}, (PoolUnavailable, NoPlace)),
        ("instance.migrate", "web1", {}, (PoolUnavailable, NoPlace)),
        ("instance.grow-disk", "web1", {"index": 0, "increment": GIB}, PoolUnavailable),
        ("instance.add-disk", "web1", {"disk": {"size": GIB, "pool": "shared"}}, PoolUnavailable),
    ],
)
def test_where_it_is_silent_everywhere_it_is_said_at_once_and_nothing_stays(
    operation: str, target: str, request_: dict[str, Any], error: Any
) -> None:
    async def story() -> None:
        box, web = await made()
        await stall(box)
        began = box.clock.monotonic()
        with pytest.raises(error):
            await box.do(operation, target, **request_)
        assert box.clock.monotonic() - began < 5
        # Other pools are not concerned.
        await box.do("volume.create", name="other", pool="quick", size=GIB)
        await back(box)
        await settle(box)
        check(box)
        assert box.world.running(web.id) == ["node1"]
        await box.do(operation, target, **request_)
        check(box)
        await box.close()

    simulate(story)


def test_a_check_of_the_pool_tells_instead_of_failing() -> None:
    async def story() -> None:
        box, _ = await made()
        await stall(box, "node2")
        found = await box.do("pool.check", "shared")
        assert found["ok"] is False
        assert found["nodes"]["node1"]["ok"]
        assert WHY in found["nodes"]["node2"]["reason"]
        await box.close()

    simulate(story)


def test_a_job_in_the_middle_of_it_is_taken_back_when_the_share_is_back() -> None:
    """The image may have been made: it can be neither seen nor removed. The job says what it waits for, and nobody is to type anything."""

    async def story() -> None:
        box, _ = await made()

        async def hangs(node: str, method: str, phase: str) -> None:
            if method == "create" and phase == "after":
                await stall(box)
                raise DeadlineExceeded("pool shared: create took longer than 3600 s")

        box.disks.fault = hangs
        submitted = await box.submit("volume.create", name="data", pool="shared", size=GIB)
        assert submitted.job
        await asyncio.sleep(600)
        job = box.master.engine.job(submitted.job)
        assert job.state is JobState.UNDOING
        assert "waits for the storage, to take back" in box.master.engine.progress(job.number).text
        assert "pool shared is stalled" in box.master.engine.progress(job.number).text
        # A new master waits on.
        await box.crash_master()
        await box.boot_master()
        await asyncio.sleep(60)
        assert box.master.engine.job(submitted.job).state is JobState.UNDOING
        box.disks.fault = None
        await back(box)
        assert (await box.end_of(job.number)).state is JobState.UNDONE
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


def test_a_deletion_in_the_middle_of_it_is_finished_when_the_share_is_back() -> None:
    async def story() -> None:
        box, _ = await made()
        await box.do("volume.create", name="data", pool="shared", size=GIB)

        async def hangs(node: str, method: str, phase: str) -> None:
            if method == "delete" and phase == "before":
                await stall(box)
                raise PoolUnavailable("pool shared is stalled: no answer")

        box.disks.fault = hangs
        submitted = await box.submit("volume.delete", "data")
        assert submitted.job
        await asyncio.sleep(600)
        assert box.master.engine.job(submitted.job).state is JobState.RUNNING
        assert "waits for the storage: " in box.master.engine.progress(submitted.job).text
        box.disks.fault = None
        await back(box)
        assert (await box.end_of(submitted.job)).state is JobState.DONE
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


def test_storage_that_never_comes_back_ends_in_a_question() -> None:
    """After as long as the job may take: somebody may have removed that pool for good."""

    async def story() -> None:
        box, _ = await made()
        await box.do("volume.create", name="data", pool="shared", size=GIB)

        async def refuses(node: str, method: str, phase: str) -> None:
            if method == "delete" and phase == "before":
                raise PoolUnavailable("pool shared is stalled: no answer")

        box.disks.fault = refuses
        submitted = await box.submit("volume.delete", "data")
        assert submitted.job
        began = box.clock.monotonic()
        job = await box.end_of(submitted.job)
        assert job.state is JobState.NEEDS_ATTENTION
        assert 3500 < box.clock.monotonic() - began < 3700
        assert "pool shared is stalled" in job.reason
        box.disks.fault = None
        assert (await finish(box, job.number)).state is JobState.DONE
        await box.close()

    simulate(story)


@pytest.mark.parametrize(("verb", "error"), [("delete", DiskInUse), ("delete", Conflict)])
def test_a_deletion_that_the_storage_refuses_changes_nothing(verb: str, error: type[AtollError]) -> None:
    """Somebody else has it open, or has made snapshots of it: the volume is as it was, and may be used and deleted later."""

    async def story() -> None:
        box, _ = await made()
        await box.do("volume.create", name="data", pool="shared", size=GIB)

        async def refuses(node: str, method: str, phase: str) -> None:
            if method == verb and phase == "before":
                raise error("not now")

        box.disks.fault = refuses
        with pytest.raises(error, match="not now"):
            await box.do("volume.delete", "data")
        assert row(box, "volume", "data")["state"] == "available"
        box.disks.fault = None
        check(box)
        await box.do("volume.delete", "data")
        check(box)
        await box.close()

    simulate(story)


def test_a_deletion_is_refused_before_it_is_begun_where_the_storage_is_not_there() -> None:
    async def story() -> None:
        box, _ = await made()
        await box.do("volume.create", name="data", pool="shared", size=GIB)
        await stall(box)
        with pytest.raises(PoolUnavailable):
            await box.do("volume.delete", "data")
        assert row(box, "volume", "data")["state"] == "available"
        await back(box)
        await box.do("volume.delete", "data")
        check(box)
        await box.close()

    simulate(story)


def test_a_guest_on_it_is_not_taken_for_dead() -> None:
    async def story() -> None:
        box, web = await made()
        await stall(box)
        pid = box.world.guests["node1", web.id].pid
        await box.crash_agent("node1")
        await box.boot_agent("node1")
        await asyncio.sleep(600)
        assert box.world.guests["node1", web.id].pid == pid
        assert box.world.running(web.id) == ["node1"]
        await back(box)
        check(box)
        await box.close()

    simulate(story)
