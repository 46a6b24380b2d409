"""Plugging disks into a running guest and taking them out."""

from __future__ import annotations

import asyncio

from atoll.hypervisor.qemu import command
from atoll.hypervisor.qemu.qmp import Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.errors import Conflict, DeadlineExceeded
from atoll.model.messages import GuestDisk

#: A guest that ignores the request to let go of a disk is asked again after this many seconds.
_ASK_AGAIN = 2.0


async def plug(session: Session, disk: GuestDisk, tuning: Tuning) -> None:
    """Open the disk and plug it into its slot; a call that stopped halfway is finished. Raises Refused. Errors: Conflict, InvalidInput."""
    node, device = command.disk_node(disk), command.disk_device(disk)
    if await _plugged(session, disk.volume):
        path = f"/machine/peripheral/{disk.volume}"
        bus = str(await session.execute("qom-get", {"path": path, "property": "parent_bus"}))
        if bus.rpartition("/")[2] != command.port_id(disk.slot):
            raise Conflict(f"disk {disk.volume} is plugged in already, but not in slot {disk.slot}")
        return
    if not await _opened(session, disk.volume):
        for secret in command.secrets(disk):
            await _remove_object(session, secret["id"])
            await session.execute("object-add", secret)
        await session.execute("blockdev-add", node, limit=tuning.disk_command)
        for secret in command.secrets(disk):
            # It has read it; the next disk of that name brings its own.
            await _remove_object(session, secret["id"])
    try:
        await session.execute("device_add", device, limit=tuning.disk_command)
    except Refused as error:
        await _close(session, disk.volume, tuning)
        if "in use by" in str(error):
            raise Conflict(f"slot {disk.slot} is taken: {error}") from None
        raise


async def unplug(session: Session, guest: str, volume: str, timeout: float, tuning: Tuning) -> None:
    """Ask the guest to let go, wait until it has, close the disk. Not there = success. Raises Refused (it migrates). Errors:
    DeadlineExceeded (the disk is still in)."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    with session.events("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") as events:
        ask = loop.time()
        while await _plugged(session, volume):
            left = end - loop.time()
            if left <= 0:
                raise DeadlineExceeded(
                    f"guest {guest} did not let go of disk {volume} within {timeout:.0f} s", hint="unmount it in the guest, then try again"
                )
            if loop.time() >= ask:
                await _ask(session, volume)
                ask = loop.time() + _ASK_AGAIN
            await events.next(min(left, max(ask - loop.time(), 0.01), 0.5))
    await _close(session, volume, tuning)


async def _ask(session: Session, volume: str) -> None:
    try:
        await session.execute("device_del", {"id": volume})
    except Refused as error:
        if "already in the process of unplug" not in str(error) and "not found" not in str(error):
            raise


async def _plugged(session: Session, volume: str) -> bool:
    return any(child["name"] == volume for child in await session.execute("qom-list", {"path": "/machine/peripheral"}))


async def _remove_object(session: Session, name: str) -> None:
    if any(child["name"] == name for child in await session.execute("qom-list", {"path": "/objects"})):
        await session.execute("object-del", {"id": name})


async def _opened(session: Session, volume: str) -> bool:
    nodes = await session.execute("query-named-block-nodes", {"flat": True})
    return any(node.get("node-name") == volume for node in nodes)


async def _close(session: Session, volume: str, tuning: Tuning) -> None:
    if await _opened(session, volume):
        await session.execute("blockdev-del", {"node-name": volume}, limit=tuning.disk_command)
