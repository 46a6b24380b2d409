"""A pool that becomes full under a running guest: it stands still, says why, goes on when there is room, and is never taken for dead."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import check, running, settle

from atoll.lab.box import Box, simulate
from atoll.master import resume
from atoll.model.errors import PoolFull, PoolUnavailable, WrongState
from atoll.model.objects import Instance, Job, Pool
from atoll.model.units import GIB, MIB
from atoll.operations import views


async def made(**request: Any) -> tuple[Box, Instance]:
    box = await Box.make()
    await box.add_pool()
    await running(box, **request)
    await asyncio.sleep(20)  # the master knows the pool's space
    return box, box.master.state.store.find(Instance, "web1")


def pool_of(box: Box) -> Pool:
    return box.master.state.store.find(Pool, "shared")


async def fill(box: Box, what: str = "full") -> None:
    """Somebody takes all the room; the guests' next writes fail."""
    images = box.disks.images[pool_of(box).id]
    box.disks.taken[pool_of(box).id] = box.disks.capacity - sum(image["size"] for image in images.values())
    box.world.trouble = lambda node, volume: what
    box.world.tick()
    await asyncio.sleep(2)


def free(box: Box, size: int = GIB) -> None:
    """``size`` bytes are free again, and writes go well."""
    box.disks.taken[pool_of(box).id] -= size
    box.world.trouble = lambda node, volume: ""


def row(box: Box, name: str = "web1") -> dict[str, Any]:
    return next(r for r in views.rows(box.master.state, "instance")[0] if r["name"] == name)


def resumes(box: Box) -> list[Job]:
    return [job for job in box.master.state.store.all(Job) if job.operation == "instance.resume"]


def test_it_says_which_pool_is_full_and_what_to_type() -> None:
    async def story() -> None:
        box, _ = await made()
        await fill(box)
        shown = row(box)
        assert (shown["state"], shown["node"]) == ("paused", "node1")
        assert shown["reason"].startswith("io-error: pool shared is full (volume web1-disk")
        assert shown["commands"] == ["atoll pool info shared", "atoll instance resume web1"]
        found = [f for f in await box.master.verify() if f.about == "web1 on node1"]
        assert [(f.severity, f.what) for f in found] == [("error", "guest stands still: io-error")]
        assert "pool shared is full" in found[0].why
        assert "atoll instance resume web1" in found[0].commands
        await box.close()

    simulate(story)


def test_it_goes_on_by_itself_when_there_is_room_and_nothing_is_lost() -> None:
    async def story() -> None:
        box, web = await made()
        before = dict(box.world.acknowledged)
        await fill(box)
        box.world.tick(3)
        assert box.world.acknowledged == before, "what failed was not acknowledged"
        await asyncio.sleep(120)
        assert not resumes(box), "it tries again only when there is room"
        free(box)
        await asyncio.sleep(30)
        assert box.world.running(web.id) == ["node1"]
        assert len(resumes(box)) == 1
        box.world.tick(5)
        assert not box.world.missing()
        await settle(box)
        check(box)
        assert row(box)["commands"] == []
        await box.close()

    simulate(story)


def test_too_little_room_for_all_that_wait_is_no_room() -> None:
    async def story() -> None:
        box, _ = await made()
        await box.do("instance.add", name="web2", disks=[{"size": GIB}], memory=GIB, template="shared", node="node2")
        await fill(box)
        free(box, resume.ROOM * 2 - MIB)
        await asyncio.sleep(60)
        assert not resumes(box)
        free(box, MIB)
        await asyncio.sleep(30)
        assert {row(box, name)["state"] for name in ("web1", "web2")} == {"running"}
        await box.close()

    simulate(story)


def test_a_guest_that_stops_again_and_again_is_tried_ever_more_seldom() -> None:
    async def story() -> None:
        box, web = await made()
        await fill(box)
        # Free space that does not help: a quota, or a guest that writes faster than room is made.
        box.disks.taken.clear()

        async def writes() -> None:
            while True:
                box.world.tick()
                await asyncio.sleep(0.3)

        writing = asyncio.ensure_future(writes())
        await asyncio.sleep(3000)
        writing.cancel()
        assert 5 <= len(resumes(box)) <= 12
        assert box.world.running(web.id) == []
        box.world.trouble = lambda node, volume: ""
        await asyncio.sleep(resume.LONGEST + 30)
        assert box.world.running(web.id) == ["node1"]
        check(box)
        await box.close()

    simulate(story, limit=7200)


def test_old_figures_of_space_count_for_nothing() -> None:
    async def story() -> None:
        box, _ = await made()
        box.world.trouble = lambda node, volume: "full"
        box.disks.taken[pool_of(box).id] = box.disks.capacity
        stale = box.master.spaces()[pool_of(box).id, ""]
        assert stale.free > GIB, "the master has not looked since"
        box.world.tick()
        await asyncio.sleep(60)
        assert not resumes(box)
        await box.close()

    simulate(story)


def test_after_any_other_error_a_person_decides() -> None:
    async def story() -> None:
        box, web = await made()
        await fill(box, "failed")
        assert row(box)["reason"].startswith("io-error: pool shared refused a read or write")
        assert row(box)["commands"] == ["atoll pool check shared", "atoll instance resume web1"]
        free(box)
        await asyncio.sleep(300)
        assert not resumes(box)
        await box.do("instance.resume", "web1")
        assert box.world.running(web.id) == ["node1"]
        await box.do("instance.resume", "web1")  # twice is success
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize(("what", "error"), [("full", PoolFull), ("failed", PoolUnavailable)])
def test_a_resume_in_vain_says_so(what: str, error: type[Exception]) -> None:
    async def story() -> None:
        box, _ = await made()
        await fill(box, what)

        async def writes() -> None:
            while True:
                box.world.tick()
                await asyncio.sleep(0.05)

        writing = asyncio.ensure_future(writes())
        with pytest.raises(error, match="web1 stands still again: io-error: pool shared"):
            await box.do("instance.resume", "web1")
        writing.cancel()
        await settle(box)
        check_paused(box)
        await box.close()

    simulate(story)


def check_paused(box: Box) -> None:
    assert row(box)["state"] == "paused"
    assert not [job for job in box.master.state.store.all(Job) if job.state.active]


def test_who_stands_still_is_not_dead() -> None:
    """No restart, no second copy: not by the master's loops, nor by a person's start, while its process is there."""

    async def story() -> None:
        box, web = await made()
        await fill(box)
        pid = box.world.guests["node1", web.id].pid
        await box.crash_master()
        await box.boot_master()
        await asyncio.sleep(120)
        with pytest.raises(WrongState, match="stands still on node node1"):
            await box.do("instance.start", "web1")
        assert box.world.guests["node1", web.id].pid == pid
        assert [node for node, ident in box.world.guests if ident == web.id] == ["node1"]
        free(box)
        await asyncio.sleep(30)
        assert box.world.running(web.id) == ["node1"]
        assert box.world.guests["node1", web.id].pid == pid
        check(box)
        await box.close()

    simulate(story)


def test_it_migrates_and_tries_again_there() -> None:
    async def story() -> None:
        box, web = await made()
        await fill(box)
        await box.do("instance.migrate", "web1", node="node2")
        box.world.tick()
        await asyncio.sleep(3)
        assert (row(box)["state"], row(box)["node"]) == ("paused", "node2")
        assert box.world.running(web.id) == []
        free(box)
        await asyncio.sleep(60)
        assert box.world.running(web.id) == ["node2"]
        box.world.tick(3)
        assert not box.world.missing()
        check(box)
        await box.close()

    simulate(story)


def test_a_stopped_and_failed_over_guest_does_not_come_back() -> None:
    async def story() -> None:
        box, web = await made()
        await fill(box)
        await box.do("instance.stop", "web1", timeout=30.0)
        assert row(box)["state"] == "stopped"
        free(box)
        await asyncio.sleep(60)
        assert not resumes(box)
        await box.do("instance.start", "web1", node="node2")
        assert box.world.running(web.id) == ["node2"]
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize(
    ("operation", "target", "request_"),
    [
        ("volume.create", "", {"name": "more", "pool": "shared", "size": 2 * GIB}),
        ("instance.add", "", {"name": "web2", "disks": [{"size": 2 * GIB}], "memory": GIB, "template": "shared"}),
        ("instance.grow-disk", "web1", {"index": 0, "increment": 2 * GIB}),
        ("instance.add-disk", "web1", {"disk": {"size": 2 * GIB, "pool": "shared"}}),
    ],
)
def test_what_needs_room_is_refused_and_leaves_nothing(operation: str, target: str, request_: dict[str, Any]) -> None:
    async def story() -> None:
        box, web = await made()
        await fill(box)
        box.world.trouble = lambda node, volume: ""
        await box.do("instance.resume", "web1")
        with pytest.raises(PoolFull):
            await box.do(operation, target, **request_)
        await settle(box)
        check(box)
        assert box.world.running(web.id) == ["node1"]
        free(box, 16 * GIB)
        await box.do(operation, target, **request_)
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize("started", [True, False])
def test_a_move_to_a_full_pool_leaves_it_where_it_is(started: bool) -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool("local", "file")
        await running(box, template="local", disks=[{"size": GIB}])
        if not started:
            await box.do("instance.stop", "web1", timeout=1.0)
        web = box.master.state.store.find(Instance, "web1")
        pool = box.master.state.store.find(Pool, "local")
        box.disks.taken[pool.id] = box.disks.capacity - GIB + MIB
        with pytest.raises(PoolFull):
            await box.do("instance.move", "web1", node="node2")
        await settle(box)
        check(box)
        assert box.world.running(web.id) == (["node1"] if started else [])
        await box.close()

    simulate(story)
