"""Disks of guests in real QEMU: plugged, grown and taken out while the guest runs and sees it."""

from __future__ import annotations

import os
import time

import pytest
import qemu_support
from qemu_support import World, image, says, started, text, until, writes

from atoll.hypervisor.qemu.command import SLOTS
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, GuestError, InvalidInput
from atoll.model.units import MIB

pytestmark = pytest.mark.qemu
guest_image, world = qemu_support.guest_image, qemu_support.world


async def test_plug_grow_and_unplug_in_a_running_guest(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await started(a, spec, world.report)
    guest = spec.instance
    extra, last = world.disk(1), world.disk(SLOTS - 1, 4 * MIB)

    for _ in range(2):
        await a.plug(guest, extra)
    await says(a, spec, rf"SIZE vdb {16 * MIB}\b")
    await a.plug(guest, last)
    await says(a, spec, rf"SIZE vdc {4 * MIB}\b")
    with pytest.raises(Conflict, match="slot 1 is taken"):
        await a.plug(guest, world.disk(1))
    with pytest.raises(Conflict, match="not in slot 2"):
        await a.plug(guest, extra.model_copy(update={"slot": 2}))
    with pytest.raises(InvalidInput, match=f"slot {SLOTS} does not exist"):
        await a.plug(guest, world.disk(SLOTS))
    with pytest.raises(DiskInUse):
        await a.plug(guest, spec.disks[0].model_copy(update={"volume": "vol-other", "slot": 3}))

    os.truncate(image(extra), 32 * MIB)
    for _ in range(2):
        await a.resize(guest, extra.volume, 32 * MIB)
    await says(a, spec, rf"SIZE vdb {32 * MIB}\b")
    os.truncate(image(spec.disks[0]), 64 * MIB)
    await a.resize(guest, spec.disks[0].volume, 64 * MIB)
    await says(a, spec, rf"SIZE vda {64 * MIB}\b")
    with pytest.raises(GuestError):
        await a.resize(guest, "vol-unknown", MIB)

    for _ in range(2):
        await world.hypervisor("a").unplug(guest, extra.volume, 30)
    await until(lambda: "GONE vdb" in text(a, spec), 10, "GONE vdb")
    # Closed too, not only out of the guest; and its slot is free again.
    async with a._session(guest) as session:
        assert extra.volume not in {node["node-name"] for node in await session.execute("query-named-block-nodes", {"flat": True})}
    await a.plug(guest, extra.model_copy(update={"volume": "vol-again", "slot": 1}))
    await writes(a, spec)
    assert world.ring(spec, a).ok


async def test_a_guest_that_does_not_let_go_keeps_its_disk(world: World) -> None:
    a = world.hypervisor("a")
    spec = world.spec()
    await a.start(spec, world.report)
    extra = world.disk(1)
    await a.plug(spec.instance, extra)
    async with a._session(spec.instance) as session:
        await session.execute("stop")  # so that it cannot answer
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not let go"):
        await a.unplug(spec.instance, extra.volume, 1.0)
    assert time.monotonic() - begin < 5
    with pytest.raises(DiskInUse):
        await world.hypervisor("b").start(world.spec(extra.model_copy(update={"slot": 0})), world.report)
    await a.resume(spec.instance)
    await a.unplug(spec.instance, extra.volume, 60)


async def test_a_read_only_disk_is_shared_but_not_with_a_writer(world: World) -> None:
    a, b = world.hypervisor("a"), world.hypervisor("b")
    disk = world.disk(0)
    reader = disk.model_copy(update={"mode": "ro"})
    first, second = world.spec(reader), world.spec(reader)
    await a.start(first, world.report)
    await b.start(second, world.report)
    with pytest.raises(DiskInUse):
        await b.start(world.spec(disk), world.report)
    await says(a, first, "CTR ERR")
