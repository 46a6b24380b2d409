"""Guests in real QEMU: start, look, stop, find again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import qemu_support
from qemu_support import World, image, pid_of, power_off_from_within, says, started, stopped, until, writes

from atoll.hypervisor.contract import Hypervisor
from atoll.hypervisor.qemu import process
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, GuestError, HostError
from atoll.model.messages import Attached

pytestmark = pytest.mark.qemu
guest_image, world = qemu_support.guest_image, qemu_support.world


def field(pid: int, name: str) -> list[str]:
    """A line of /proc/PID/status."""
    return next(line.split()[1:] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name + ":"))


@pytest.mark.root
async def test_a_life_as_an_unprivileged_user(world: World) -> None:
    a, b = world.hypervisor("a", user="nobody"), world.hypervisor("b", user="nobody")
    assert isinstance(a, Hypervisor)
    spec = world.spec()
    await a.start(spec, world.report)
    first = await a.status(spec.instance)
    assert (first.state, first.generation, first.name, first.memory, first.vcpus) == ("running", 1, "test", spec.memory, 1)
    pid = await pid_of(a, spec)
    # No right that it could lose: not root, no new privileges, a system call filter, a parent that is not us.
    assert field(pid, "Uid")[0] != "0"
    assert field(pid, "CapEff") == ["0000000000000000"]
    assert field(pid, "Seccomp") == ["2"]
    assert field(pid, "PPid") != [str(os.getpid())]
    await writes(a, spec)

    await a.start(spec, world.report)
    assert await pid_of(a, spec) == pid
    with pytest.raises(Conflict, match="generation 1, not 2"):
        await a.start(spec.model_copy(update={"generation": 2}), world.report)

    again = world.hypervisor("a", user="nobody")
    assert [(guest.instance, guest.pid) for guest in await again.guests()] == [(spec.instance, pid)]
    assert await b.guests() == []

    with pytest.raises(DiskInUse, match="Failed to get"):
        await b.start(spec, world.report)
    assert (await b.status(spec.instance)).state == "gone"
    assert not (world.place / "b" / "guests" / spec.instance).exists()

    await power_off_from_within(again, spec)
    assert (await again.status(spec.instance)).state == "shutdown"
    with pytest.raises(GuestError, match="powered itself off"):
        await again.resume(spec.instance)
    assert await again.stop(spec.instance, 10, world.report) is True
    assert (await a.status(spec.instance)).state == "gone"
    assert not process.arguments(pid)
    assert not (world.place / "a" / "guests" / spec.instance).exists()
    assert world.ring(spec, a).ok


async def test_stop_by_the_power_button_then_start_and_kill(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await started(a, spec, world.report)
    begin = time.monotonic()
    assert await a.stop(spec.instance, 30, world.report) is True
    assert time.monotonic() - begin < 20
    assert any("asked to power off" in progress.text for progress in world.report.seen)
    assert await a.stop(spec.instance, 30, world.report) is True
    assert world.ring(spec, a).ok

    await started(a, spec.model_copy(update={"generation": 2}), world.report)
    await says(a, spec, r"CTR RESUME [1-9]")
    os.kill(await pid_of(a, spec), signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await process.gone(a._files(spec.instance), 10)
    assert (await a.status(spec.instance)).state == "gone"
    assert await a.guests() == []
    with pytest.raises(GuestError, match="no process"):
        await a.reboot(spec.instance, hard=True)
    assert world.ring(spec, a).ok


async def test_a_guest_that_ignores_the_button_is_killed_after_its_grace(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec(more="deaf")
    await started(a, spec, world.report)
    pid = await pid_of(a, spec)
    begin = time.monotonic()
    assert await a.stop(spec.instance, 1.0, world.report) is False
    assert time.monotonic() - begin > 0.9
    assert not process.arguments(pid)
    assert world.ring(spec, a).ok


async def test_a_stopped_process_is_hung_and_hinders_nobody(world: World) -> None:
    a = world.hypervisor("a")
    spec, other = world.spec(), world.spec()
    await started(a, spec, world.report)
    await a.start(other, world.report)
    pid = await pid_of(a, spec)
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: stopped(pid), 5, "stopped")
    begin = time.monotonic()
    states = {guest.instance: guest.state for guest in await world.hypervisor("a").guests()}
    assert 0.9 < time.monotonic() - begin < 2.5
    assert states == {spec.instance: "hung", other.instance: "running"}
    with pytest.raises(GuestError, match="does not answer"):
        await a.start(spec, world.report)
    os.kill(pid, signal.SIGCONT)
    await writes(a, spec)
    assert (await a.status(spec.instance)).state == "running"
    os.kill(pid, signal.SIGSTOP)
    assert await a.stop(spec.instance, 20, world.report) is False
    assert not process.arguments(pid)


async def test_reboots(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await started(a, spec, world.report)
    pid = await pid_of(a, spec)
    for count, hard in ((2, False), (3, True)):
        await a.reboot(spec.instance, hard)
        assert (await a.status(spec.instance)).state == "running"
        await until(lambda count=count: a.console_log(spec.instance).read_text().count("CTR RESUME") == count, 40, "another boot")
    assert "POWER BUTTON" in a.console_log(spec.instance).read_text()
    assert await pid_of(a, spec) == pid
    assert world.ring(spec, a).ok


async def test_a_failed_write_stops_the_guest_until_it_is_resumed(world: World) -> None:
    a = world.hypervisor("a")
    disk = world.disk(0)
    assert disk.attached is not None
    failing = {
        "driver": "blkdebug",
        "image": disk.attached.blockdev,
        "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
        "inject-error": [{"event": "write_aio", "state": 2, "errno": 5, "once": True}],
    }
    spec = world.spec(disk.model_copy(update={"attached": disk.attached.model_copy(update={"blockdev": failing})}))
    await a.start(spec, world.report)
    for _ in range(400):
        if (await a.status(spec.instance)).state == "paused":
            break
        await asyncio.sleep(0.05)
    status = await a.status(spec.instance)
    assert (status.state, status.reason) == ("paused", "io-error: its storage failed")
    await a.resume(spec.instance)
    await writes(a, spec, 10)
    assert "CTR ERR" not in a.console_log(spec.instance).read_text()
    assert world.ring(spec, a).ok


async def test_a_start_cut_short_is_finished_by_the_next(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await a._launch(spec, arriving=False)  # and then the agent died
    again = world.hypervisor("a")
    assert (await again.status(spec.instance)).state == "paused"
    await again.start(spec, world.report)
    assert len(await again.guests()) == 1
    assert (await again.status(spec.instance)).state == "running"


async def test_starts_at_the_same_time_are_one(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await asyncio.gather(*(a.start(spec, world.report) for _ in range(3)))
    assert [guest.state for guest in await a.guests()] == ["running"]


async def test_what_cannot_start_leaves_nothing(world: World) -> None:
    a = world.hypervisor("a")
    disk = world.disk(0)
    spec = world.spec(disk)
    image(disk).unlink()
    with pytest.raises(GuestError, match="No such file"):
        await a.start(spec, world.report)
    assert (await a.guests(), list((world.place / "a" / "guests").iterdir())) == ([], [])
    with pytest.raises(HostError, match="no user 'nobody-such'"):
        await world.hypervisor("a", user="nobody-such").start(spec, world.report)
    assert list((world.place / "a" / "guests").iterdir()) == []


async def test_a_start_on_storage_that_hangs_ends_at_its_deadline(world: World) -> None:
    a = world.hypervisor("a")
    a.tuning.launch = 1.0
    disk = world.disk(0)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(world.place / "silent"))
        silent.listen()
        server = {"driver": "nbd", "server": {"type": "unix", "path": str(world.place / "silent")}}
        spec = world.spec(disk.model_copy(update={"attached": Attached(volume=disk.volume, blockdev=server)}))
        with pytest.raises(DeadlineExceeded, match="not ready after 1 s"):
            await a.start(spec, world.report)
        assert (await a.guests(), list((world.place / "a" / "guests").iterdir())) == ([], [])
        a.tuning.launch = 60.0
        starting = asyncio.create_task(a.start(spec, world.report))
        await until(lambda: process.find(a._files(spec.instance)), 10, "a process")
        assert (await world.hypervisor("a").status(spec.instance)).state in ("paused", "hung")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert (await a.guests(), list((world.place / "a" / "guests").iterdir())) == ([], [])


@pytest.mark.root
def test_a_bridged_network_card(world: World) -> None:
    """In a network namespace of its own, so that this machine's network stays as it is."""
    script = Path(__file__).with_name("qemu_bridge_guest.py")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, str(script), str(world.place)], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_the_accelerator_is_found_by_running_a_guest(world: World) -> None:
    a = world.hypervisor("a")
    begin = time.monotonic()
    found = await a.probe()
    assert time.monotonic() - begin < 11
    assert found in ("kvm", "tcg")
    begin = time.monotonic()
    assert await world.hypervisor("a").probe() == found
    assert time.monotonic() - begin < 0.5
