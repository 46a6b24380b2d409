"""One suite for every form of hypervisor: what ``atoll.hypervisor.contract`` promises."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypervisors import INSTANCE, MIB, NODES, FakeHarness, Harness, MemoryHarness, quiet

from atoll.hypervisor.contract import Hypervisor
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, GuestError, MigrationFailed
from atoll.model.messages import Progress

A, B = NODES


@pytest_asyncio.fixture(params=["memory", "fake"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    """A form of hypervisor on two nodes."""
    if request.param == "memory":
        yield MemoryHarness()
        return
    fake = FakeHarness(tmp_path)
    yield fake
    await fake.close()


# --- life ---


async def test_it_is_a_hypervisor(harness: Harness) -> None:
    assert isinstance(harness.a, Hypervisor)
    assert await harness.a.probe() in ("kvm", "tcg", "none")


async def test_a_start_repeated_is_one_start(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    first = await harness.a.status(INSTANCE)
    assert (first.state, first.generation, first.name, first.memory, first.vcpus) == ("running", 1, "web1", 64 * MIB, 1)
    await harness.a.start(harness.spec(), quiet)
    again = await harness.a.status(INSTANCE)
    assert (again.state, again.pid) == ("running", first.pid)
    await harness.records(A)
    harness.check()


async def test_starts_at_the_same_time_are_one_start(harness: Harness) -> None:
    async def start() -> int | None:
        await harness.a.start(harness.spec(), quiet)
        return (await harness.a.status(INSTANCE)).pid

    assert len(set(await asyncio.gather(*(start() for _ in range(4))))) == 1
    assert [guest.state for guest in await harness.a.guests()] == ["running"]


async def test_another_generation_is_refused(harness: Harness) -> None:
    await harness.a.start(harness.spec(generation=5), quiet)
    before = await harness.a.status(INSTANCE)
    for generation in (4, 6):
        with pytest.raises(Conflict, match=f"generation 5, not {generation}"):
            await harness.a.start(harness.spec(generation=generation), quiet)
        with pytest.raises(Conflict):
            await harness.a.incoming(harness.spec(generation=generation), [], B, quiet)
    assert await harness.a.status(INSTANCE) == before


async def test_a_disk_that_is_written_elsewhere_is_refused(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    for instance in (INSTANCE, "i-0123456789abcdef1"):
        with pytest.raises(DiskInUse):
            await harness.b.start(harness.spec(instance=instance), quiet)
        assert (await harness.b.status(instance)).state == "gone"
    await harness.records(A)
    await harness.a.kill(INSTANCE)
    await harness.b.start(harness.spec(generation=2), quiet)
    await harness.records(B)
    harness.check()


async def test_readers_share_a_disk_but_not_with_a_writer(harness: Harness) -> None:
    def reader(instance: str):
        return harness.spec(instance=instance, disks=[harness.disk("vol-0", mode="ro")])

    await harness.a.start(reader("i-1"), quiet)
    await harness.b.start(reader("i-2"), quiet)
    with pytest.raises(DiskInUse):
        await harness.b.start(harness.spec(instance="i-3"), quiet)


async def test_stop_with_grace(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    pid = (await harness.a.status(INSTANCE)).pid
    assert harness.lives(pid)
    assert await harness.a.stop(INSTANCE, 20, quiet) is True
    assert await harness.state(A) == "gone"
    assert await harness.a.guests() == []
    assert not harness.lives(pid)
    assert await harness.a.stop(INSTANCE, 20, quiet) is True


async def test_a_guest_that_does_not_listen_is_killed_after_its_grace(harness: Harness) -> None:
    await harness.a.start(harness.spec(harness.deaf), quiet)
    await harness.records(A)
    began = time.monotonic()
    assert await harness.a.stop(INSTANCE, 0.5, quiet) is False
    assert 0.45 < time.monotonic() - began < 10
    assert await harness.state(A) == "gone"
    harness.check()


async def test_stop_at_once(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    pid = (await harness.a.status(INSTANCE)).pid
    assert harness.lives(pid)
    assert await harness.a.stop(INSTANCE, 0, quiet) is False
    assert await harness.state(A) == "gone"
    assert not harness.lives(pid)


async def test_kill(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    pid = (await harness.a.status(INSTANCE)).pid
    assert harness.lives(pid)
    await harness.records(A)
    await harness.a.kill(INSTANCE)
    assert await harness.state(A) == "gone"
    assert not harness.lives(pid)
    await harness.a.kill(INSTANCE)
    await harness.a.start(harness.spec(), quiet)
    await harness.records(A)
    harness.check()


async def test_killed_from_outside_it_is_gone(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    await harness.kill_process(A)
    assert await harness.state(A) == "gone"
    assert await harness.a.guests() == []


async def test_a_guest_that_ended_itself(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    await harness.power_off_itself(A)
    await harness.until(A, lambda status: status.state == "shutdown")
    with pytest.raises(GuestError):
        await harness.a.resume(INSTANCE)
    await harness.a.start(harness.spec(), quiet)
    assert await harness.state(A) == "running"
    await harness.power_off_itself(A)
    await harness.until(A, lambda status: status.state == "shutdown")
    assert await harness.a.stop(INSTANCE, 5, quiet) is True
    assert await harness.state(A) == "gone"


async def test_reboot(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    pid = (await harness.a.status(INSTANCE)).pid
    for hard in (False, True):
        await harness.a.reboot(INSTANCE, hard)
        await harness.records(A)
    assert (await harness.a.status(INSTANCE)).pid == pid
    harness.check()


async def test_found_again_by_a_new_object(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    before = await harness.a.status(INSTANCE)
    again = harness.new(A)
    assert await again.guests() == [before]
    assert await again.status(INSTANCE) == before
    await again.start(harness.spec(), quiet)
    assert (await again.status(INSTANCE)).pid == before.pid
    assert await harness.b.guests() == []
    assert await again.stop(INSTANCE, 20, quiet) is True
    assert await harness.state(A) == "gone"


async def test_unknown_guest(harness: Harness) -> None:
    a = harness.a
    target = await harness.b.incoming(harness.spec(), [], A, quiet)
    refused = [
        a.reboot(INSTANCE, False),
        a.resume(INSTANCE),
        a.plug(INSTANCE, harness.disk("vol-1", 1)),
        a.unplug(INSTANCE, "vol-1", 1),
        a.resize(INSTANCE, "vol-0", 8 * MIB),
        a.migrate_out(INSTANCE, target, [], quiet),
        a.migrate_continue(INSTANCE, quiet),
    ]
    for call in refused:
        with pytest.raises(GuestError):
            await call
    await a.kill(INSTANCE)
    assert await a.stop(INSTANCE, 1, quiet) is True
    assert (await a.migrate_cancel(INSTANCE)).state == "gone"
    assert (await a.await_incoming(INSTANCE, 1)).state == "gone"
    assert await harness.state(A) == "gone"


async def test_hung(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    before = await harness.a.status(INSTANCE)
    await harness.hang(A)
    status = await harness.a.status(INSTANCE)
    assert (status.state, status.pid, status.generation) == ("hung", before.pid, 1)
    assert [guest.state for guest in await harness.new(A).guests()] == ["hung"]
    with pytest.raises(GuestError):
        await harness.a.start(harness.spec(), quiet)
    await harness.hang(A, False)
    await harness.records(A)
    await harness.hang(A)
    assert await harness.a.stop(INSTANCE, 0.2, quiet) is False
    assert await harness.state(A) == "gone"
    harness.check()


# --- disks ---


async def test_plug_and_unplug(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    extra = harness.disk("vol-1", 1)
    for _ in range(2):
        await harness.a.plug(INSTANCE, extra)
    other = harness.spec(instance="i-2", disks=[harness.disk("vol-1", 0)])
    with pytest.raises(DiskInUse):
        await harness.b.start(other, quiet)
    with pytest.raises(Conflict, match="slot 1"):
        await harness.a.plug(INSTANCE, harness.disk("vol-2", 1))
    for _ in range(2):
        await harness.new(A).unplug(INSTANCE, "vol-1", 20)
    await harness.b.start(other, quiet)
    with pytest.raises(DiskInUse):
        await harness.a.plug(INSTANCE, extra)
    await harness.records(A)
    harness.check()


async def test_a_disk_that_the_guest_does_not_let_go(harness: Harness) -> None:
    if harness.clinging is None:
        pytest.skip("guests of this form let go of every disk")
    await harness.a.start(harness.spec(harness.clinging), quiet)
    await harness.a.plug(INSTANCE, harness.disk("vol-1", 1))
    with pytest.raises(DeadlineExceeded):
        await harness.a.unplug(INSTANCE, "vol-1", 0.2)
    with pytest.raises(DiskInUse):
        await harness.b.start(harness.spec(instance="i-2", disks=[harness.disk("vol-1")]), quiet)


async def test_resize(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    harness.grow("vol-0", 8 * MIB)
    for _ in range(2):
        await harness.a.resize(INSTANCE, "vol-0", 8 * MIB)
    with pytest.raises(GuestError):
        await harness.a.resize(INSTANCE, "vol-9", 8 * MIB)


# --- migration ---


async def test_migrate(harness: Harness) -> None:
    target = await harness.paired()
    assert target.node == B
    assert await harness.state(B) == "incoming"
    seen: list[Progress] = []
    await harness.a.migrate_out(INSTANCE, target, [], seen.append)
    assert any((progress.percent or 0) > 0 for progress in seen)
    status = await harness.a.status(INSTANCE)
    assert (status.state, status.migration) == ("paused", "pre-switchover")
    assert await harness.state(B) == "incoming"
    figures = await harness.a.migrate_continue(INSTANCE, quiet)
    assert 0 < figures.downtime_ms <= figures.total_ms
    assert await harness.state(A) == "migrated"
    arrived = await harness.b.await_incoming(INSTANCE, 20)
    assert (arrived.state, arrived.generation) == ("paused", 2)
    for _ in range(2):
        await harness.b.resume(INSTANCE)
    await harness.records(B)
    await harness.a.stop(INSTANCE, 0, quiet)
    assert (await harness.state(A), await harness.state(B)) == ("gone", "running")
    await harness.records(B)
    await harness.b.start(harness.spec(generation=2), quiet)
    harness.check()


async def test_there_and_back(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    here, there = A, B
    for generation in (2, 3):
        await harness.records(here)
        target = await harness.nodes[there].incoming(harness.spec(generation=generation), [], here, quiet)
        await harness.nodes[here].migrate_out(INSTANCE, target, [], quiet)
        await harness.nodes[here].migrate_continue(INSTANCE, quiet)
        assert (await harness.nodes[there].await_incoming(INSTANCE, 20)).state == "paused"
        await harness.nodes[there].resume(INSTANCE)
        await harness.nodes[here].kill(INSTANCE)
        here, there = there, here
    await harness.records(A)
    harness.check()


async def test_incoming_repeated_is_one(harness: Harness) -> None:
    spec = harness.spec(generation=2)
    first = await harness.b.incoming(spec, [], A, quiet)
    pid = (await harness.b.status(INSTANCE)).pid
    assert await harness.new(B).incoming(spec, [], A, quiet) == first
    assert (await harness.b.status(INSTANCE)).pid == pid
    with pytest.raises(Conflict):
        await harness.b.incoming(harness.spec(generation=3), [], A, quiet)
    with pytest.raises(Conflict):
        await harness.b.start(spec, quiet)
    with pytest.raises(GuestError):
        await harness.b.resume(INSTANCE)


async def test_await_incoming_ends_in_time(harness: Harness) -> None:
    await harness.paired()
    began = time.monotonic()
    assert (await harness.b.await_incoming(INSTANCE, 0.2)).state == "incoming"
    assert time.monotonic() - began < 10


async def test_migrate_out_again_joins(harness: Harness) -> None:
    target = await harness.paired("fake.ram=0.5")
    first = asyncio.create_task(harness.a.migrate_out(INSTANCE, target, [], quiet))
    await harness.until(A, lambda status: status.migration == "active")
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await asyncio.gather(*(harness.new(A).migrate_out(INSTANCE, target, [], quiet) for _ in range(2)))
    assert (await harness.a.status(INSTANCE)).migration == "pre-switchover"
    await harness.a.migrate_continue(INSTANCE, quiet)
    await harness.a.migrate_out(INSTANCE, target, [], quiet)
    assert await harness.state(A) == "migrated"


async def test_continue_twice_gives_the_same_figures(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    both = await asyncio.gather(*(harness.a.migrate_continue(INSTANCE, quiet) for _ in range(2)))
    await asyncio.sleep(0.05)  # figures that were measured anew would differ by now
    assert both[0] == both[1] == await harness.new(A).migrate_continue(INSTANCE, quiet)


async def test_continue_before_the_pause_or_without_a_migration(harness: Harness) -> None:
    target = await harness.paired(harness.slow)
    with pytest.raises(MigrationFailed):
        await harness.a.migrate_continue(INSTANCE, quiet)
    out = asyncio.create_task(harness.a.migrate_out(INSTANCE, target, [], quiet))
    await harness.until(A, lambda status: status.migration == "active")
    with pytest.raises(GuestError):
        await harness.a.migrate_continue(INSTANCE, quiet)
    assert (await harness.a.migrate_cancel(INSTANCE)).state == "running"
    with pytest.raises(MigrationFailed):
        await out


async def test_what_has_migrated_never_runs_again_here(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    await harness.a.migrate_continue(INSTANCE, quiet)
    with pytest.raises(GuestError):
        await harness.a.resume(INSTANCE)
    with pytest.raises(Conflict):
        await harness.a.start(harness.spec(), quiet)
    assert (await harness.a.migrate_cancel(INSTANCE)).state == "migrated"
    assert await harness.state(A) == "migrated"


async def test_a_paused_source_does_not_resume_on_request(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    with pytest.raises(GuestError):
        await harness.a.resume(INSTANCE)
    with pytest.raises(Conflict):
        await harness.a.start(harness.spec(), quiet)
    assert await harness.state(A) == "paused"


async def test_cancel_while_memory_moves(harness: Harness) -> None:
    target = await harness.paired(harness.slow)
    out = asyncio.create_task(harness.a.migrate_out(INSTANCE, target, [], quiet))
    await harness.until(A, lambda status: status.migration == "active")
    await harness.records(A)
    for _ in range(2):
        assert (await harness.a.migrate_cancel(INSTANCE)).state == "running"
    with pytest.raises(MigrationFailed):
        await out
    await harness.until(B, lambda status: status.state == "gone")
    await harness.records(A)
    harness.check()


async def test_cancel_at_the_pause_then_migrate_again(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    assert (await harness.a.migrate_cancel(INSTANCE)).state == "running"
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "gone"
    with pytest.raises(MigrationFailed, match="cancelled"):
        await harness.a.migrate_continue(INSTANCE, quiet)
    await harness.records(A)
    target = await harness.b.incoming(harness.spec(generation=3), [], A, quiet)
    await harness.a.migrate_out(INSTANCE, target, [], quiet)
    await harness.a.migrate_continue(INSTANCE, quiet)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "paused"
    await harness.b.resume(INSTANCE)
    await harness.records(B)
    harness.check()


async def test_target_killed_while_memory_moves(harness: Harness) -> None:
    target = await harness.paired(harness.slow)
    out = asyncio.create_task(harness.a.migrate_out(INSTANCE, target, [], quiet))
    await harness.until(A, lambda status: status.migration == "active")
    await harness.kill_process(B)
    with pytest.raises(MigrationFailed):
        await out
    assert await harness.state(A) == "running"
    await harness.records(A)
    harness.check()


async def test_target_killed_at_the_pause_and_the_source_goes_on_by_itself(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    await harness.b.kill(INSTANCE)
    await harness.until(A, lambda status: status.state == "running")
    with pytest.raises(MigrationFailed):
        await harness.a.migrate_continue(INSTANCE, quiet)
    await harness.records(A)
    harness.check()


async def test_target_not_there(harness: Harness) -> None:
    target = await harness.paired()
    await harness.kill_process(B)
    with pytest.raises(MigrationFailed):
        await harness.a.migrate_out(INSTANCE, target, [], quiet)
    await harness.records(A)


async def test_source_killed_before_completed_ends_the_target(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    await harness.kill_process(A)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "gone"
    with pytest.raises(GuestError) as caught:
        await harness.a.migrate_continue(INSTANCE, quiet)
    assert not isinstance(caught.value, MigrationFailed)
    await harness.b.start(harness.spec(generation=3), quiet)
    await harness.records(B)
    harness.check()


async def test_source_killed_while_memory_moves(harness: Harness) -> None:
    target = await harness.paired(harness.slow)
    out = asyncio.create_task(harness.a.migrate_out(INSTANCE, target, [], quiet))
    await harness.until(A, lambda status: status.migration == "active")
    await harness.kill_process(A)
    with pytest.raises(GuestError) as caught:
        await out
    assert not isinstance(caught.value, MigrationFailed)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "gone"


async def test_source_killed_after_completed(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    await harness.a.migrate_continue(INSTANCE, quiet)
    await harness.kill_process(A)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "paused"
    await harness.b.resume(INSTANCE)
    await harness.records(B)
    harness.check()


async def test_target_that_has_everything_holds_the_disk(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    await harness.a.migrate_continue(INSTANCE, quiet)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "paused"
    with pytest.raises(DiskInUse):
        await harness.a.start(harness.spec(instance="i-2"), quiet)
    assert (await harness.b.incoming(harness.spec(generation=2), [], A, quiet)).node == B


async def test_the_watchdog_lets_a_forgotten_guest_go_on(harness: Harness) -> None:
    harness.watchdog(0.3)
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    assert await harness.state(A) == "paused"
    await harness.until(A, lambda status: status.state == "running")
    with pytest.raises(MigrationFailed, match="watchdog"):
        await harness.a.migrate_continue(INSTANCE, quiet)
    await harness.until(B, lambda status: status.state == "gone")
    await harness.records(A)
    harness.check()


async def test_only_the_named_peer_may_connect(harness: Harness) -> None:
    await harness.a.start(harness.spec(), quiet)
    target = await harness.b.incoming(harness.spec(generation=2), [], "elsewhere", quiet)
    with pytest.raises(MigrationFailed):
        await harness.a.migrate_out(INSTANCE, target, [], quiet)
    assert (await harness.state(A), await harness.state(B)) == ("running", "incoming")
    await harness.records(A)


async def test_disks_that_only_one_node_has_are_copied(harness: Harness) -> None:
    await harness.a.start(harness.spec(disks=[harness.disk("vol-0", node=A)]), quiet)
    await harness.records(A, 20)
    target = await harness.b.incoming(harness.spec(disks=[harness.disk("vol-0", node=B)], generation=2), ["vol-0"], A, quiet)
    await harness.a.migrate_out(INSTANCE, target, ["vol-0"], quiet)
    await harness.a.migrate_continue(INSTANCE, quiet)
    assert (await harness.b.await_incoming(INSTANCE, 20)).state == "paused"
    await harness.b.resume(INSTANCE)
    await harness.records(B)
    assert harness.check(node=B) >= 25
    await harness.b.kill(INSTANCE)
    harness.check(node=B)
    await harness.b.start(harness.spec(disks=[harness.disk("vol-0", node=B)], generation=3), quiet)
    await harness.records(B)
    harness.check(node=B)


async def test_disks_do_not_change_while_it_is_migrated(harness: Harness) -> None:
    await harness.a.migrate_out(INSTANCE, await harness.paired(), [], quiet)
    with pytest.raises(GuestError):
        await harness.a.plug(INSTANCE, harness.disk("vol-1", 1))
    with pytest.raises(GuestError):
        await harness.a.unplug(INSTANCE, "vol-0", 1)
