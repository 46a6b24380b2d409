"""The hypervisor of simulations: virtual time, what the world sees, and how it can be harmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from atoll.hypervisor.memory import MemoryHypervisor, World
from atoll.model.errors import DiskInUse, GuestError, MigrationFailed
from atoll.model.messages import Endpoint, GuestDisk, GuestSpec, GuestStatus, Progress
from atoll.model.objects import Boot
from atoll.runtime.clock import VirtualLoop

VM = "i-0123456789abcdef0"


def virtually(story: Coroutine[Any, Any, None]) -> None:
    """Run a story in virtual time."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(story)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def quiet(progress: Progress) -> None:
    """A report that nobody reads."""


def now() -> float:
    return asyncio.get_running_loop().time()


def spec(generation: int = 1, append: str = "", instance: str = VM) -> GuestSpec:
    disk = GuestDisk(volume="vol-0", slot=0, size=1 << 20)
    return GuestSpec(instance=instance, name="web1", generation=generation, memory=1 << 20, boot=Boot(append=append), disks=[disk])


async def state(node: MemoryHypervisor) -> str:
    return (await node.status(VM)).state


class Pair:
    """Two nodes of a world, a guest that runs on the first and one that waits on the second."""

    def __init__(self, locking: bool = True) -> None:
        self.world = World(locking)
        self.a, self.b = MemoryHypervisor(self.world, "a"), MemoryHypervisor(self.world, "b")

    async def ready(self) -> Endpoint:
        await self.a.start(spec(), quiet)
        self.world.tick(3)
        return await self.b.incoming(spec(2), [], "a", quiet)

    async def until(self, node: MemoryHypervisor, migration: str) -> GuestStatus:
        while (status := await node.status(VM)).migration != migration:
            assert status.state != "gone"
            await asyncio.sleep(0.01)
        return status

    def unharmed(self, records: int) -> bool:
        self.world.tick()
        return not self.world.violations and not self.world.missing() and self.world.acknowledged == {"vol-0": records + 1}


def test_the_watchdog_waits_fifteen_virtual_seconds() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.migrate_out(VM, await pair.ready(), [], quiet)
        paused = now()
        await pair.until(pair.a, "cancelled")
        assert 14.9 < now() - paused < 15.1
        assert (await state(pair.a), await state(pair.b)) == ("running", "gone")
        assert pair.unharmed(3)

    began = time.monotonic()
    virtually(story())
    assert time.monotonic() - began < 5


def test_memory_takes_half_a_second_and_says_how_far_it_is() -> None:
    async def story() -> None:
        pair, seen = Pair(), []
        target = await pair.ready()
        began = now()
        await pair.a.migrate_out(VM, target, [], lambda progress: seen.append(progress.percent))
        assert 0.5 <= now() - began < 0.6
        assert seen == sorted(seen)
        assert len(seen) > 5

    virtually(story())


def test_without_locks_two_writers_run_and_are_seen() -> None:
    async def story() -> None:
        pair = Pair(locking=False)
        await pair.a.start(spec(), quiet)
        pair.world.tick(3)
        await pair.b.start(spec(2), quiet)
        assert pair.world.running(VM) == ["a", "b"]
        assert pair.world.violations == [f"{VM} runs on a and on b", f"vol-0 is written by {VM} on a and {VM} on b"]
        pair.world.tick()
        assert len(pair.world.violations) == 3
        assert "record 4 after record 4" in pair.world.violations[-1]

    virtually(story())


def test_with_locks_the_second_writer_is_refused() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.start(spec(), quiet)
        with pytest.raises(DiskInUse):
            await pair.b.start(spec(instance="i-2"), quiet)
        assert pair.unharmed(0)

    virtually(story())


def test_an_old_copy_of_a_disk_is_seen() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.start(spec(), quiet)
        pair.world.tick(5)
        await pair.a.kill(VM)
        pair.world.images["vol-0"] = 3
        assert pair.world.missing() == {"vol-0": 2}
        await pair.b.start(spec(2), quiet)
        assert pair.world.violations == ["vol-0 on b ends at record 3, but 5 was acknowledged"]

    virtually(story())


@pytest.mark.parametrize("copied", [True, False])
def test_a_local_disk_that_does_not_move_along_is_seen(copied: bool) -> None:
    async def story() -> None:
        pair = Pair()
        pair.world.image = lambda node, volume: f"{volume}@{node}"
        await pair.ready()
        await pair.a.migrate_out(VM, Endpoint(node="b", host="b", port=1), ["vol-0"] if copied else [], quiet)
        await pair.a.migrate_continue(VM, quiet)
        await pair.b.resume(VM)
        assert pair.unharmed(3) is copied

    virtually(story())


def test_a_power_cut_ends_guests_and_what_hangs_on_them() -> None:
    async def story() -> None:
        pair = Pair()
        out = asyncio.create_task(pair.a.migrate_out(VM, await pair.ready(), [], quiet))
        await pair.until(pair.a, "active")
        pair.world.power_cut("a")
        with pytest.raises(GuestError):
            await out
        assert (await state(pair.a), await state(pair.b)) == ("gone", "gone")
        await pair.b.start(spec(3), quiet)
        assert pair.unharmed(3)

    virtually(story())


def test_a_silent_power_cut_leaves_the_target_waiting() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.migrate_out(VM, await pair.ready(), [], quiet)
        pair.world.power_cut("a", silent=True)
        assert (await pair.b.await_incoming(VM, 60)).state == "incoming"
        with pytest.raises(GuestError):
            await pair.b.resume(VM)

    virtually(story())


def test_a_power_cut_after_completed_does_not_matter() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.migrate_out(VM, await pair.ready(), [], quiet)
        await pair.a.migrate_continue(VM, quiet)
        pair.world.power_cut("a")
        assert (await pair.b.await_incoming(VM, 5)).state == "paused"
        await pair.b.resume(VM)
        assert pair.unharmed(3)

    virtually(story())


@pytest.mark.parametrize("phase", ["active", "device"])
def test_over_a_cut_link_it_hangs_until_it_is_cancelled(phase: str) -> None:
    async def story() -> None:
        pair = Pair()
        target = await pair.ready()
        call = asyncio.create_task(pair.a.migrate_out(VM, target, [], quiet))
        if phase == "active":
            await pair.until(pair.a, "active")
            pair.world.unreachable = lambda a, b: {a, b} == {"a", "b"}
        else:
            await call
            pair.world.unreachable = lambda a, b: {a, b} == {"a", "b"}
            call = asyncio.create_task(pair.a.migrate_continue(VM, quiet))
        await asyncio.sleep(600)
        assert not call.done()
        assert (await pair.a.status(VM)).migration == phase
        assert (await pair.a.migrate_cancel(VM)).state == "running"
        with pytest.raises(MigrationFailed):
            await call
        assert await state(pair.b) == "incoming"
        assert pair.unharmed(3)

    virtually(story())


def test_over_a_link_that_heals_it_goes_on() -> None:
    async def story() -> None:
        pair = Pair()
        target = await pair.ready()
        pair.world.unreachable = lambda a, b: now() < 100
        await pair.a.migrate_out(VM, target, [], quiet)
        assert now() > 100
        await pair.a.migrate_continue(VM, quiet)
        await pair.b.resume(VM)
        assert pair.unharmed(3)

    virtually(story())


def test_a_migration_goes_on_without_whoever_asked() -> None:
    async def story() -> None:
        pair = Pair()
        call = asyncio.create_task(pair.a.migrate_out(VM, await pair.ready(), [], quiet))
        await pair.until(pair.a, "active")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await pair.until(pair.a, "pre-switchover")
        again = MemoryHypervisor(pair.world, "a")
        await again.migrate_out(VM, Endpoint(node="b", host="b", port=1), [], quiet)
        await again.migrate_continue(VM, quiet)
        assert await state(pair.b) == "paused"

    virtually(story())


def test_a_guest_that_ends_while_its_memory_moves_stays() -> None:
    async def story() -> None:
        pair = Pair()
        call = asyncio.create_task(pair.a.migrate_out(VM, await pair.ready(), [], quiet))
        await pair.until(pair.a, "active")
        pair.world.end_guest(VM, "a")
        with pytest.raises(MigrationFailed, match="ended meanwhile"):
            await call
        assert (await state(pair.a), await state(pair.b)) == ("shutdown", "gone")

    virtually(story())


@pytest.mark.parametrize(("phase", "after"), [("before", "gone"), ("after", "running")])
def test_faults_strike_before_or_after_the_effect(phase: str, after: str) -> None:
    class Crash(Exception):
        pass

    seen = []

    def fault(node: str, method: str, when: str) -> None:
        seen.append((node, method, when))
        if when == phase:
            raise Crash

    async def story() -> None:
        pair = Pair()
        pair.world.fault = fault
        with pytest.raises(Crash):
            await pair.a.start(spec(), quiet)
        assert await state(pair.a) == after

    virtually(story())
    assert seen[-1] == ("a", "start", phase)


def test_a_fault_may_delay_a_call() -> None:
    async def late(node: str, method: str, when: str) -> None:
        if when == "before":
            await asyncio.sleep(3600)

    async def story() -> None:
        pair = Pair()
        pair.world.fault = late
        await pair.a.start(spec(), quiet)
        assert now() > 3600

    virtually(story())


def test_a_hung_guest_answers_nothing_and_can_be_killed() -> None:
    async def story() -> None:
        pair = Pair()
        await pair.a.start(spec(), quiet)
        pair.world.hang(VM, "a")
        assert await state(pair.a) == "hung"
        pair.world.tick(5)
        assert pair.world.acknowledged == {}
        await pair.a.kill(VM)
        assert await state(pair.a) == "gone"

    virtually(story())
