"""Live migration between two real QEMUs, while the guest writes: as it should go, and with everything killed in turn.

Each test ends with the ring check: what the guest was told is on the disk, is on the disk.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import qemu_support
from qemu_support import Reports, World, image, pid_of, says, started, text, until, writes

from atoll.hypervisor.qemu import QemuHypervisor, guard
from atoll.lab.guest import acks, check_ring
from atoll.model.errors import Conflict, GuestError, HostError, MigrationFailed
from atoll.model.messages import Endpoint, GuestSpec
from atoll.model.units import MIB
from atoll.runtime import certs

pytestmark = pytest.mark.qemu
guest_image, world = qemu_support.guest_image, qemu_support.world

#: So slow that memory takes half a minute, in bytes per second.
SLOW = 2 * MIB


async def is_at(hypervisor: QemuHypervisor, spec: GuestSpec, *states: str, deadline: float = 30.0) -> None:
    """Wait for a state, or a state of the migration."""
    end = time.monotonic() + deadline
    while not {(status := await hypervisor.status(spec.instance)).state, status.migration} & set(states):
        assert time.monotonic() < end, f"still {status}"
        await asyncio.sleep(0.02)


async def arrive(target: QemuHypervisor, spec: GuestSpec) -> None:
    """Let a guest that has come run."""
    assert (await target.await_incoming(spec.instance, 20)).state == "paused"
    await target.resume(spec.instance)


async def move(source: QemuHypervisor, target: QemuHypervisor, spec: GuestSpec, to: Endpoint, copy: list[str], report: Reports) -> None:
    """A migration that nothing disturbs."""
    await source.migrate_out(spec.instance, to, copy, report)
    await source.migrate_continue(spec.instance, report)
    await arrive(target, spec)


async def test_there_and_back_while_it_writes(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    guest = spec.instance
    await started(a, spec, world.report)
    plugged = world.disk(5)
    await a.plug(guest, plugged)
    await says(a, spec, "SIZE vdb")
    moved = spec.model_copy(update={"disks": [*spec.disks, plugged], "generation": 2})

    to = await b.incoming(moved, [], "a", world.report)
    assert (to.node, to.host, to.tls, to.nbd_port) == ("b", "127.0.0.1", True, None)
    assert (await b.status(guest)).state == "incoming"
    # Every step again, by an agent that was started anew.
    assert await world.hypervisor("b").incoming(moved, [], "a", world.report) == to
    with pytest.raises(Conflict):
        await b.incoming(spec, [], "a", world.report)
    with pytest.raises(GuestError, match="waits for its memory"):
        await b.resume(guest)
    seen = Reports()
    await a.migrate_out(guest, to, [], seen)
    assert max(progress.percent or 0 for progress in seen.seen) == 99
    await world.hypervisor("a").migrate_out(guest, to, [], seen)
    with pytest.raises(Conflict, match="to another place"):
        await a.migrate_out(guest, to.model_copy(update={"port": 1}), [], seen)
    status = await a.status(guest)
    assert (status.state, status.migration) == ("paused", "pre-switchover")
    with pytest.raises(GuestError, match="stands still for its migration"):
        await a.resume(guest)
    with pytest.raises(GuestError, match="migrat"):
        await a.unplug(guest, plugged.volume, 5)
    figures = await a.migrate_continue(guest, world.report)
    assert figures == await world.hypervisor("a").migrate_continue(guest, world.report)
    assert 0 < figures.downtime_ms <= figures.total_ms
    assert figures.ram_bytes > 10 * MIB
    assert (await a.status(guest)).state == "migrated"
    assert (await a.migrate_cancel(guest)).state == "migrated"
    with pytest.raises(GuestError, match="handed over"):
        await a.resume(guest)
    with pytest.raises(Conflict):
        await a.start(spec, world.report)
    await arrive(b, spec)
    await b.resume(guest)
    await until(lambda: not guard.watchdogs(a._files(guest)), 10, "no watchdog")
    await a.stop(guest, 30, world.report)
    await writes(b, spec)
    status = await b.status(guest)
    assert (status.state, status.migration, status.generation) == ("running", "", 2)
    # The disk that was plugged before is where it was, so that the guest lets go of it.
    await b.unplug(guest, plugged.volume, 30)
    await says(b, spec, "GONE vdb")

    # A guest that has come must be able to leave again: QEMU's "completed" was that of its arrival.
    back = spec.model_copy(update={"generation": 3})
    await move(b, a, back, await a.incoming(back, [], "b", world.report), [], world.report)
    await b.kill(guest)
    await writes(a, spec)
    assert world.ring(spec, a, b).ok
    numbers = acks(text(b, spec))
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


async def test_only_the_right_peer_may_send_and_only_to_the_right_node(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    await started(a, spec, world.report)
    to = await b.incoming(spec, [], "a", world.report)
    stranger = world.hypervisor("stranger")
    wrong = QemuHypervisor(a.run_dir, stranger.tls_dir, "127.0.0.1", "a")
    with pytest.raises(MigrationFailed):
        await wrong.migrate_out(spec.instance, to, [], world.report)
    bare = QemuHypervisor(a.run_dir, world.place / "none", "127.0.0.1", "a")
    with pytest.raises(HostError, match="no certificate"):
        await bare.migrate_out(spec.instance, to, [], world.report)
    with pytest.raises(HostError, match="no certificate"):
        await QemuHypervisor(world.place / "c", world.place / "none", "127.0.0.1", "c").incoming(spec, [], "a", world.report)
    assert not list((world.place / "c" / "guests").iterdir())
    await writes(a, spec)
    assert (await b.status(spec.instance)).state == "incoming"
    # The keys were readable for a moment only.
    assert not [*world.place.glob("*/guests/**/*key*.pem")]
    # The other way round: not the node that it shall go to. The target has lost its one chance then.
    with pytest.raises(MigrationFailed, match="does not match the hostname c"):
        await a.migrate_out(spec.instance, to.model_copy(update={"node": "c"}), [], world.report)
    await writes(a, spec)
    assert (await b.await_incoming(spec.instance, 20)).state == "gone"
    await move(a, b, spec, await b.incoming(spec, [], "a", world.report), [], world.report)
    await a.kill(spec.instance)
    await writes(b, spec)
    assert world.ring(spec, a, b).ok


async def test_the_source_runs_on_whatever_happens_before_completed(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    guest = spec.instance
    await started(a, spec, world.report)

    async def memory_moves() -> asyncio.Task[None]:
        a.tuning.bandwidth = SLOW
        out = asyncio.create_task(a.migrate_out(guest, await b.incoming(spec, [], "a", world.report), [], world.report))
        await is_at(a, spec, "active")
        await writes(a, spec)
        return out

    async def pause() -> None:
        a.tuning.bandwidth = 10 << 30
        await a.migrate_out(guest, await b.incoming(spec, [], "a", world.report), [], world.report)

    # The target dies while memory moves.
    out = await memory_moves()
    os.kill(await pid_of(b, spec), signal.SIGKILL)
    with pytest.raises(MigrationFailed, match="runs on here"):
        await out
    assert (await a.status(guest)).state == "running"

    # It is cancelled while memory moves.
    out = await memory_moves()
    with pytest.raises(GuestError, match="not at its switchover"):
        await a.migrate_continue(guest, world.report)
    assert (await world.hypervisor("a").migrate_cancel(guest)).state == "running"
    with pytest.raises(MigrationFailed, match="cancelled"):
        await out
    assert (await b.await_incoming(guest, 20)).state == "gone"

    # The target stands still while memory moves: no error ever comes from the network.
    a.tuning.stall = 1.0
    out = await memory_moves()
    os.kill(await pid_of(b, spec), signal.SIGSTOP)
    a.tuning.bandwidth = 10 << 30
    async with a._session(guest) as session:
        await session.execute("migrate-set-parameters", {"max-bandwidth": 10 << 30})
    with pytest.raises(MigrationFailed, match="nothing was sent for 1 s"):
        await out
    await b.kill(guest)
    a.tuning.stall = 30.0

    # The target dies at the pause.
    await writes(a, spec)
    await pause()
    os.kill(await pid_of(b, spec), signal.SIGKILL)
    with pytest.raises(MigrationFailed, match="at its switchover"):
        await a.migrate_continue(guest, world.report)
    assert (await a.status(guest)).state == "running"

    # It is cancelled at the pause.
    await writes(a, spec)
    await pause()
    assert (await a.migrate_cancel(guest)).state == "running"
    with pytest.raises(MigrationFailed, match="cancelled"):
        await a.migrate_continue(guest, world.report)
    assert (await b.await_incoming(guest, 20)).state == "gone"

    await writes(a, spec)
    assert world.ring(spec, a).ok
    await until(lambda: not guard.watchdogs(a._files(guest)), 10, "no watchdog")


async def test_the_watchdog_frees_a_guest_whose_agent_died(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    guest = spec.instance
    await started(a, spec, world.report)

    # An agent brings it to its pause, and is killed there.
    to = await b.incoming(spec, [], "a", world.report)
    script = Path(__file__).with_name("qemu_dying_agent.py")
    call = {"run_dir": str(a.run_dir), "tls_dir": str(a.tls_dir), "guest": guest, "to": to.model_dump(), "watchdog": 2}
    done = subprocess.run([sys.executable, str(script), json.dumps(call)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (await a.status(guest)).migration == "pre-switchover"
    begin = time.monotonic()
    await is_at(a, spec, "running")
    assert time.monotonic() - begin > 0.5
    await writes(a, spec)
    assert (await b.await_incoming(guest, 20)).state == "gone"
    with pytest.raises(MigrationFailed, match="watchdog"):
        await a.migrate_continue(guest, world.report)

    # The target stands still during the switchover: not completed yet, so the source may have it back.
    a.tuning.watchdog = 1
    await a.migrate_out(guest, await b.incoming(spec, [], "a", world.report), [], world.report)
    os.kill(await pid_of(b, spec), signal.SIGSTOP)
    with pytest.raises(MigrationFailed, match="watchdog"):
        await a.migrate_continue(guest, world.report)
    await writes(a, spec)
    await b.kill(guest)
    await until(lambda: not guard.watchdogs(a._files(guest)), 10, "no watchdog")

    # One that has completed is never taken back.
    await a.migrate_out(guest, await b.incoming(spec, [], "a", world.report), [], world.report)
    await a.migrate_continue(guest, world.report)
    await asyncio.sleep(1.5)  # longer than the watchdog waits: nothing must happen
    assert (await a.status(guest)).state == "migrated"
    await arrive(b, spec)
    await writes(b, spec)
    assert world.ring(spec, a, b).ok


async def test_a_source_that_dies(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    guest = spec.instance
    await started(a, spec, world.report)

    # After completed: the target has everything.
    await a.migrate_out(guest, await b.incoming(spec, [], "a", world.report), [], world.report)
    await a.migrate_continue(guest, world.report)
    os.kill(await pid_of(a, spec), signal.SIGKILL)
    await is_at(a, spec, "gone")
    await arrive(b, spec)
    await writes(b, spec)
    assert world.ring(spec, a, b).ok

    # At the pause: nobody has everything, and nothing is left but a cold start.
    await b.migrate_out(guest, await a.incoming(spec, [], "b", world.report), [], world.report)
    os.kill(await pid_of(b, spec), signal.SIGKILL)
    with pytest.raises(GuestError) as caught:
        await b.migrate_continue(guest, world.report)
    assert not isinstance(caught.value, MigrationFailed)
    assert (await a.await_incoming(guest, 20)).state == "gone"
    await started(a, spec, world.report)
    assert world.ring(spec, a, b).ok


@pytest.mark.root
async def test_a_guest_that_powers_off_on_its_way_arrives_so(world: World) -> None:
    a, b = world.hypervisor("a", user="nobody"), world.hypervisor("b", user="nobody")
    spec = world.spec()
    await started(a, spec, world.report)
    a.tuning.bandwidth = SLOW
    out = asyncio.create_task(a.migrate_out(spec.instance, await b.incoming(spec, [], "a", world.report), [], world.report))
    await is_at(a, spec, "active")
    async with a._session(spec.instance) as session:
        await session.execute("system_powerdown")
        await is_at(a, spec, "shutdown")
        await session.execute("migrate-set-parameters", {"max-bandwidth": 10 << 30})
    await out
    await a.migrate_continue(spec.instance, world.report)
    assert (await b.await_incoming(spec.instance, 20)).state == "shutdown"
    await b.resume(spec.instance)
    assert await b.stop(spec.instance, 10, world.report) is True
    assert world.ring(spec, a).ok


async def test_the_ca_is_changed_while_it_moves(world: World) -> None:
    """Trust both, new certificates, trust the new one: one of these steps at each moment of a migration, and again while memory moves."""
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec()
    await started(a, spec, world.report)
    old, new = certs.create_ca("test"), certs.create_ca("test", number=2)
    both = old.cert_pem + new.cert_pem

    def save(ca: certs.KeyPair, trust: str) -> None:
        for node in "ab":
            pair = certs.issue(ca, "node", node, node, ["127.0.0.1"])
            certs.save(world.place / f"tls-{node}", trust, pair.cert_pem, pair.key_pem)

    save(old, both)
    to = await b.incoming(spec, [], "a", world.report)
    save(new, both)
    a.tuning.bandwidth = SLOW
    out = asyncio.create_task(a.migrate_out(spec.instance, to, [], world.report))
    await is_at(a, spec, "active")
    save(new, new.cert_pem)
    await writes(a, spec)
    async with a._session(spec.instance) as session:
        await session.execute("migrate-set-parameters", {"max-bandwidth": 10 << 30})
    await out
    await a.migrate_continue(spec.instance, world.report)
    await arrive(b, spec)
    await a.stop(spec.instance, 30, world.report)
    await writes(b, spec)
    # The next one is by the new CA alone.
    back = spec.model_copy(update={"generation": 2})
    a.tuning.bandwidth = 10 << 30
    await move(b, a, back, await a.incoming(back, [], "b", world.report), [], world.report)
    await b.kill(spec.instance)
    await writes(a, back)
    assert world.ring(back, a, b).ok


async def test_disks_of_one_node_move_with_the_guest(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    spec = world.spec(world.disk(0, 64 * MIB, "a.raw"))
    guest, volume = spec.instance, spec.disks[0].volume
    there = world.disk(0, 64 * MIB, "b.raw").model_copy(update={"volume": volume})
    moved = spec.model_copy(update={"disks": [there]})
    await started(a, spec, world.report)

    # The target dies while the disk is copied: the guest keeps its disk, and can try again.
    to = await b.incoming(moved, [volume], "a", world.report)
    os.kill(await pid_of(b, spec), signal.SIGKILL)
    await is_at(b, spec, "gone")
    with pytest.raises(MigrationFailed):
        await a.migrate_out(guest, to, [volume], world.report)
    # It is cancelled after the copy: the guest goes on writing to its own disk alone.
    await a.migrate_out(guest, await b.incoming(moved, [volume], "a", world.report), [volume], world.report)
    assert (await a.migrate_cancel(guest)).state == "running"
    assert (await b.await_incoming(guest, 20)).state == "gone"
    async with a._session(guest) as session:
        assert await session.execute("query-jobs") == []
    await writes(a, spec)
    assert check_ring(image(spec.disks[0]), max(acks(text(a, spec)))).ok

    # Only the peer may write to the disk that is being filled.
    to = await b.incoming(moved, [volume], "a", world.report)
    assert to.nbd_port
    stranger = world.hypervisor("stranger")
    wrong = QemuHypervisor(a.run_dir, stranger.tls_dir, "127.0.0.1", "a")
    with pytest.raises(MigrationFailed):
        await wrong.migrate_out(guest, to, [volume], world.report)
    # An agent dies while the copies run; another joins.
    first = asyncio.create_task(a.migrate_out(guest, to, [volume], world.report))
    await until(lambda: any("disks: " in progress.text for progress in world.report.seen[-5:]), 20, "a copy")
    first.cancel()
    await asyncio.wait({first})
    seen = Reports()
    again = world.hypervisor("a")
    await again.migrate_out(guest, to, [volume], seen)
    assert [progress.percent for progress in seen.seen] == sorted(progress.percent or 0 for progress in seen.seen)
    await again.migrate_continue(guest, world.report)
    await arrive(b, spec)
    await a.kill(guest)
    await writes(b, spec)
    assert check_ring(image(there), max(acks(text(b, spec)))).ok
    assert await b.stop(guest, 30, world.report) is True
    assert check_ring(image(there), max(acks(text(b, spec)))).ok
