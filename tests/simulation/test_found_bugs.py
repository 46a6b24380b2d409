"""Every bug that random faults have found, each with the shortest story that shows it. ``docs/explanation/faults.md`` has the table.

A new one gets a test here, and a line there: ``test_the_table_is_whole`` compares them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from simsupport import Ticking, check, running, settle, stopped

from atoll.lab.box import Box, simulate
from atoll.model.errors import GuestError, PoolUnavailable
from atoll.model.objects import Instance, Job, Volume
from atoll.model.units import GIB

pytestmark = pytest.mark.timeout(300)
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "faults.md"
Begin = Callable[[Box], Awaitable[None]]


def play(begin: Begin, story: Callable[[Box], Awaitable[None]]) -> None:
    """Begin, let the story happen, and check everything."""

    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await begin(box)
        async with Ticking(box):
            await story(box)
            box.disks.fault = box.world.fault = None
            await settle(box)
        check(box)
        await box.close()

    simulate(run)


async def nothing(box: Box) -> None:
    """Only the pool."""


async def submit(box: Box, operation: str, target: str = "", /, **request: object) -> int:
    number = (await box.submit(operation, target, **request)).job
    assert number is not None
    return number


async def ends(box: Box, number: int, *states: str) -> Job:
    job = await asyncio.wait_for(box.end_of(number), 300)
    assert job.state in states, (job.operation, job.state, job.error, job.reason)
    return job


def slow_storage(box: Box, method: str, seconds: float = 5.0) -> None:
    async def fault(node: str, found: str, phase: str) -> None:
        if found == method and phase == "before":
            await asyncio.sleep(seconds)

    box.disks.fault = fault


# --- what is still being made ---


def test_an_instance_is_removed_while_it_is_made() -> None:
    async def story(box: Box) -> None:
        slow_storage(box, "create")
        add = await submit(box, "instance.add", name="new", disks=[{"size": GIB}], memory=GIB, node="node1")
        await asyncio.sleep(1)
        remove = await submit(box, "instance.remove", "new", timeout=1.0)
        await ends(box, add, "done")
        await ends(box, remove, "done")
        assert not box.master.state.store.all(Instance)

    play(nothing, story)


def test_an_instance_is_changed_while_it_is_made_and_its_making_fails() -> None:
    async def story(box: Box) -> None:
        slow_storage(box, "create")
        box.world.fault = failing("start", "before")
        add = await submit(box, "instance.add", name="new", disks=[{"size": GIB}], memory=GIB, node="node1")
        await asyncio.sleep(1)
        modify = await submit(box, "instance.modify", "new", memory=2 * GIB)
        await ends(box, add, "undone")
        await ends(box, modify, "undone")

    play(nothing, story)


def test_a_volume_is_grown_while_it_is_made() -> None:
    async def story(box: Box) -> None:
        slow_storage(box, "create")
        create = await submit(box, "volume.create", name="data", pool="shared", size=GIB)
        await asyncio.sleep(1)
        grow = await submit(box, "volume.grow", "data", increment=GIB)
        await ends(box, create, "done")
        await ends(box, grow, "done")
        assert box.master.state.store.find(Volume, "data").size == 2 * GIB

    play(nothing, story)


# --- locks ---


def test_an_evacuation_and_who_waits_for_its_node_and_its_group() -> None:
    async def story(box: Box) -> None:
        evacuate = await submit(box, "node.evacuate", "node1")
        assign = await submit(box, "group.assign-nodes", "default", nodes=["node1"])
        await ends(box, evacuate, "done")
        await ends(box, assign, "done")
        await box.do("node.modify", "node1", drained=False)

    play(running, story)


# --- guests that end themselves meanwhile ---


def power_off_at(box: Box, method: str) -> Callable[[str, str, str], Awaitable[None]]:
    """The guest powers itself off just before an effect."""

    async def fault(node: str, found: str, phase: str) -> None:
        if found == method and phase == "before":
            box.world.fault = None
            box.world.end_guest(box.master.state.store.find(Instance, "web1").id, node)

    return fault


def failing(method: str, phase: str) -> Callable[[str, str, str], Awaitable[None]]:
    async def fault(node: str, found: str, now: str) -> None:
        if (found, now) == (method, phase):
            raise GuestError(f"{method} fails")

    return fault


def test_a_guest_powers_itself_off_while_its_disk_grows() -> None:
    async def story(box: Box) -> None:
        box.world.fault = power_off_at(box, "resize")
        await ends(box, await submit(box, "instance.grow-disk", "web1", index=1, increment=GIB), "done")

    play(running, story)


@pytest.mark.parametrize("operation", ["add-disk", "detach-disk"])
def test_a_guest_powers_itself_off_before_a_change_of_its_disks_is_undone(operation: str) -> None:
    async def story(box: Box) -> None:
        method = "plug" if operation == "add-disk" else "unplug"

        async def fault(node: str, found: str, phase: str) -> None:
            if (found, phase) == (method, "after"):
                box.world.fault = None
                box.world.end_guest(box.master.state.store.find(Instance, "web1").id, node)
                raise GuestError(f"{found} fails")

        box.world.fault = fault
        request = {"disk": {"size": GIB}} if operation == "add-disk" else {"index": 1}
        await ends(box, await submit(box, f"instance.{operation}", "web1", **request), "undone")

    play(running, story)


# --- storage ---


def test_a_grow_is_refused_after_it_has_happened_and_nobody_can_look() -> None:
    async def story(box: Box) -> None:
        away = False

        async def fault(node: str, method: str, phase: str) -> None:
            nonlocal away
            away = away or (method, phase) == ("grow", "after")
            if away:
                raise PoolUnavailable("the pool is away")

        box.disks.fault = fault
        grow = await submit(box, "instance.grow-disk", "web1", index=1, increment=GIB)
        await asyncio.sleep(600)
        # It waits for the storage, whatever that has done.
        job = box.master.engine.job(grow)
        assert (job.committed, str(job.state)) == (True, "running")
        box.disks.fault = None
        await ends(box, grow, "done")

    play(stopped, story)


# --- the table ---


def test_the_table_is_whole() -> None:
    """Every test here is in the table of the docs, and the other way round."""
    there = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_table_is_whole"}
    assert here <= there, f"not in the table: {here - there}"
