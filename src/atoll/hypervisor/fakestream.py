"""How a guest of the fake hypervisor moves: QEMU's states over a plain TCP stream. The moving state is the writer's counter.

A line of JSON says what comes, the target answers with a line; then frames. Disks are sent whole while the guest runs and again while
it is paused: simple, and right. The source lets go of its locks, then sends the last frame: that is ``completed``, the commit point.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time

from atoll.hypervisor.fakedisk import Refused
from atoll.hypervisor.fakeloop import Wait, alive, connect, receive, receive_line, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from atoll.hypervisor.fakedisk import Disk
    from atoll.hypervisor.fakeguest import Guest
    from atoll.hypervisor.fakeloop import Task

#: A frame: kind, slot, offset, length. D data (a payload follows), Z zeros, R memory (a payload; acknowledged by one byte, so that
#: a cut link is felt), F the end (its offset is the counter).
FRAME = struct.Struct("<cHQQ")
RAM_STEPS, RAM_PIECE = 10, 4096


class Migration:
    """One way out, with QEMU's words for its status: setup, active, pre-switchover, device, completed, failed, cancelled."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.host, self.port, self.target, self.copy = str(order["host"]), int(order["port"]), str(order["to"]), list(order["copy"])
        self.watchdog = float(order["watchdog"])
        self.status, self.error, self.percent, self.text = "setup", "", 0.0, "connecting"
        self.go, self.sent, self.began, self.paused = False, 0, time.monotonic(), 0.0
        self.before: tuple[str, str, dict[str, str]] = ("running", "", {})
        self.final: dict[str, int] = {}
        self.task: Task | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    def figures(self) -> dict[str, int]:
        """Milliseconds and bytes of a completed migration."""
        now = time.monotonic()
        return {"total_ms": round((now - self.began) * 1e3), "downtime_ms": round((now - self.paused) * 1e3), "ram_bytes": self.sent}


def description(guest: Guest) -> dict[str, Any]:
    """What must be equal on both sides."""
    disks = sorted([disk.slot, disk.volume, disk.writes] for disk in guest.disks.values())
    return {"disks": disks, **{key: guest.spec[key] for key in ("instance", "memory", "vcpus", "pin")}}


async def leave(guest: Guest, move: Migration) -> None:
    """The source's side, to its end."""
    try:
        sock = await connect(move.host, move.port, 10)
        try:
            await _transfer(guest, move, sock)
        finally:
            sock.close()
    except (OSError, Refused) as error:
        stay(guest, move, "failed", str(error))


def stay(guest: Guest, move: Migration, status: str, why: str) -> None:
    """The migration has ended without success: the guest goes on here."""
    paused = move.status in ("pre-switchover", "device")
    move.status, move.error = status, why
    if paused:
        try:
            guest.activate()
        except Refused as error:
            guest.become("paused", f"cannot go on after a failed migration: {error}")
            return
        guest.become(*move.before)
    guest.loop.notify()


async def _transfer(guest: Guest, move: Migration, sock: socket.socket) -> None:
    hello = {"from": guest.spec["node"], "to": move.target, "copy": sorted(move.copy), **description(guest)}
    await send(sock, json.dumps(hello).encode() + b"\n", 10)
    answer = await receive_line(sock, 10)
    if "error" in answer:
        raise Refused("migration_failed", f"{move.target} refuses: {answer['error']}")
    move.status = "active"
    guest.loop.notify()
    for volume in move.copy:
        await _send_disk(guest, move, sock, volume)
    for step in range(RAM_STEPS):
        await send(sock, FRAME.pack(b"R", 0, 0, RAM_PIECE) + bytes(RAM_PIECE))
        await receive(sock, 1)
        move.sent += RAM_PIECE
        await Wait(sock.fileno(), select.POLLIN, float(guest.options.get("fake.ram") or 0.1) / RAM_STEPS)
        _check(guest, sock)
        move.percent, move.text = (50 if move.copy else 0) + (step + 1) * (5 if move.copy else 10), "memory"
        guest.loop.notify()
    move.before, move.paused, move.status = (guest.state, guest.reason, guest.disk_errors), time.monotonic(), "pre-switchover"
    guest.become("paused", "migration")
    until = move.paused + move.watchdog
    while not move.go:
        if time.monotonic() >= until:
            stay(guest, move, "cancelled", f"the watchdog cancelled it: nobody went on for {move.watchdog:g} s")
            return
        await Wait(sock.fileno(), select.POLLIN, until - time.monotonic(), change=True)
        alive(sock)
    move.status = "device"
    for volume in move.copy:
        await _send_disk(guest, move, sock, volume)
    alive(sock)
    for disk in guest.disks.values():
        disk.close()
    # Nothing is awaited from here to the end: a cancel comes before the commit point or after it, not in between.
    frame = FRAME.pack(b"F", 0, guest.n, 0)
    if sock.send(frame) != len(frame):
        raise BrokenPipeError("the stream is full")
    move.final = move.figures()
    move.status = "completed"
    guest.become("migrated")


def _check(guest: Guest, sock: socket.socket) -> None:
    alive(sock)
    if guest.state == "shutdown":
        raise Refused("migration_failed", "the guest has ended meanwhile")


async def _send_disk(guest: Guest, move: Migration, sock: socket.socket, volume: str) -> None:
    disk = guest.disks[volume]
    size = max(1, os.lseek(disk.fd, 0, os.SEEK_END))
    for offset, length, data in disk.extents():
        payload = os.pread(disk.fd, length, offset) if data else b""
        if payload.count(0) == len(payload):
            await send(sock, FRAME.pack(b"Z", disk.slot, offset, length))
        else:
            await send(sock, FRAME.pack(b"D", disk.slot, offset, len(payload)) + payload)
        move.percent, move.text = 50 * (offset + length) / size if move.status == "active" else 100, f"disk {volume}"
        await Wait(seconds=0)  # a fast stream must not keep the guest from running
        guest.loop.notify()


async def arrive(guest: Guest) -> None:
    """The target's side: one stream, from the one peer that may connect. If it breaks, this guest ends."""
    sock = await _peer(guest)
    slots = {disk.slot: disk for disk in guest.disks.values()}
    try:
        while True:
            kind, slot, offset, length = FRAME.unpack(await receive(sock, FRAME.size))
            if kind == b"F":
                break
            await _take(sock, slots.get(slot), kind, offset, length)
        sock.close()
        for volume in guest.spec["copy"]:
            os.fsync(guest.disks[volume].fd)
        guest.activate()
    except (OSError, Refused) as error:
        guest.say(f"load of migration failed: {error}")
        os._exit(1)
    guest.arriving = "completed"
    guest.boot(counter=offset)
    guest.become("paused", "migration has arrived")


async def _take(sock: socket.socket, disk: Disk | None, kind: bytes, offset: int, length: int) -> None:
    if kind == b"R":
        await receive(sock, length)
        await send(sock, b"k")
        return
    if disk is None or disk.fd < 0:
        raise Refused("migration_failed", "data came for a disk that is not to be copied")
    if kind == b"Z":
        disk.zero(offset, length)
        return
    data = await receive(sock, length)
    os.pwrite(disk.fd, data, offset)


async def _peer(guest: Guest) -> socket.socket:
    """Wait for who may connect; others are told why not, and turned away."""
    while True:
        await Wait(guest.listener.fileno(), select.POLLIN)
        try:
            sock = guest.listener.accept()[0]
        except OSError:
            continue
        try:
            sock.setblocking(False)
            why = _objection(guest, await receive_line(sock, 10))
            await send(sock, json.dumps({"error": why} if why else {"ok": True}).encode() + b"\n", 10)
        except (OSError, ValueError):
            sock.close()
            continue
        if not why:
            break
        sock.close()
    guest.listener.close()
    guest.arriving = "active"
    guest.loop.notify()
    return sock


def _objection(guest: Guest, hello: Any) -> str:
    if not isinstance(hello, dict):
        return "that is not a migration"
    if guest.spec["peer"] and hello.get("from") != guest.spec["peer"]:
        return f"only {guest.spec['peer']} may connect, not {hello.get('from')}"
    if hello.get("copy") != sorted(guest.spec["copy"]):
        return "the disks to copy differ"
    mine = json.loads(json.dumps(description(guest)))
    differ = [key for key, value in mine.items() if hello.get(key) != value]
    return f"it differs in {', '.join(differ)}" if differ else ""
