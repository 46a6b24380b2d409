"""The fake hypervisor without processes: guests live in a ``World``, in the memory of one simulation, under any event loop.

It takes no time but the loop's and does no I/O, so a whole cluster runs under ``VirtualLoop``.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from atoll.hypervisor.contract import Report
from atoll.hypervisor.fakerules import admit
from atoll.hypervisor.memoryworld import MemoryGuest, Move, World
from atoll.model.errors import Conflict, DeadlineExceeded, GuestError, MigrationFailed
from atoll.model.messages import Endpoint, GuestDisk, GuestSpec, GuestStatus, MigrationFigures, Progress

__all__ = ["MemoryHypervisor", "World"]

#: Seconds that a call waits for a guest that does not answer.
SILENCE = 10.0


class MemoryHypervisor:
    """The guests of one node of a ``World``. Keeps nothing itself: a new one for the same node finds the same guests."""

    name = "fake"

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node

    # --- what is there ---

    async def probe(self) -> str:
        return "tcg"

    async def guests(self) -> list[GuestStatus]:
        return [guest.status() for (node, _), guest in sorted(self.world.guests.items(), key=lambda item: item[0]) if node == self.node]

    async def status(self, guest: str) -> GuestStatus:
        return self._status(guest)

    def console(self, guest: str) -> str:
        return f"/nowhere/{self.node}/{guest}/console.sock"

    # --- life ---

    async def start(self, spec: GuestSpec, report: Report) -> None:
        async with self._effect("start", self.world.start_time):
            match admit(self._status(spec.instance), spec, incoming=False):
                case "resume":
                    self._resume(spec.instance)
                case "make" | "replace":
                    self.world.kill_guest(spec.instance, self.node)
                    self.world.make(spec, self.node, incoming=False)
        report(Progress(percent=100, text="running"))

    async def stop(self, guest: str, grace: float, report: Report) -> bool:
        async with self._effect("stop"):
            found = self.world.guests.get((self.node, guest))
            ended = found is None or found.state == "shutdown"
            if found and found.state in ("running", "paused") and grace > 0:
                report(Progress(text="waiting for the guest to power off"))
                ended = await self._power_off(found, grace)
            if found:
                self.world.remove(found)
        return ended

    async def _power_off(self, guest: MemoryGuest, grace: float) -> bool:
        until = asyncio.get_running_loop().time() + grace
        await self.world.wait(lambda: guest.state != "paused" or not self.world.present(guest), grace)
        self.world.press_power(guest)
        left = until - asyncio.get_running_loop().time()
        await self.world.wait(lambda: guest.state == "shutdown" or not self.world.present(guest), left)
        return guest.state == "shutdown"

    async def kill(self, guest: str) -> None:
        async with self._effect("kill"):
            self.world.kill_guest(guest, self.node)

    async def reboot(self, guest: str, hard: bool) -> None:
        async with self._effect("reboot"):
            found = await self._find(guest)
            if found.state != "running":
                raise GuestError(f"{guest} is {found.state} and cannot be rebooted")

    async def resume(self, guest: str) -> None:
        async with self._effect("resume"):
            await self._find(guest)
            self._resume(guest)

    # --- disks ---

    async def plug(self, guest: str, disk: GuestDisk) -> None:
        async with self._effect("plug"):
            found = await self._find(guest)
            present = found.disks.get(disk.volume)
            if present and present.slot == disk.slot:
                return
            self._settled(found)
            if present:
                raise Conflict(f"{disk.volume} is plugged into slot {present.slot}, not {disk.slot}")
            if any(other.slot == disk.slot for other in found.disks.values()):
                raise Conflict(f"another disk is plugged into slot {disk.slot}")
            self.world.plug(found, disk)

    async def unplug(self, guest: str, volume: str, timeout: float) -> None:
        async with self._effect("unplug"):
            found = await self._find(guest)
            if volume not in found.disks:
                return
            self._settled(found)
            if found.options.get("fake.unplug") == "off":
                await self.world.wait(lambda: not self.world.present(found), timeout)
                raise DeadlineExceeded(f"{guest} has not let go of {volume} within {timeout:g} s")
            del found.disks[volume]

    async def resize(self, guest: str, volume: str, size: int) -> None:
        async with self._effect("resize"):
            found = await self._find(guest)
            if volume not in found.disks:
                raise GuestError(f"{volume} is not plugged into {guest}")
            self._settled(found)
            found.disks[volume] = found.disks[volume].model_copy(update={"size": size})

    # --- migration ---

    async def incoming(self, spec: GuestSpec, copy: list[str], peer: str, report: Report) -> Endpoint:
        async with self._effect("incoming", self.world.start_time):
            if admit(self._status(spec.instance), spec, incoming=True) != "done":
                self.world.kill_guest(spec.instance, self.node)
                self.world.make(spec, self.node, incoming=True, peer=peer, copy=copy)
        found = await self._find(spec.instance)
        return Endpoint(node=self.node, host=self.node, port=found.pid, tls=False)

    async def migrate_out(self, guest: str, to: Endpoint, copy: list[str], report: Report) -> None:
        async with self._effect("migrate_out"):
            found = await self._find(guest)
            move = found.move
            if move is None or move.status in ("failed", "cancelled"):
                if found.state != "running" and not found.disk_errors:
                    raise GuestError(f"{guest} is {found.state} and cannot be migrated")
                move = self.world.begin_move(found, to.node, copy)
            elif move.target != to.node:
                raise Conflict(f"{guest} is being migrated to {move.target}")
            await self._follow(found, move, ("pre-switchover", "device", "completed", "failed", "cancelled"), report)

    async def migrate_continue(self, guest: str, report: Report) -> MigrationFigures:
        async with self._effect("migrate_continue"):
            found = await self._find(guest)
            move = found.move
            if move is None:
                kind = MigrationFailed if found.state == "running" else GuestError
                raise kind(f"there is no migration to go on with: {guest} is {found.state}")
            if move.status in ("setup", "active"):
                raise GuestError(f"{guest} is not paused before its switchover yet")
            move.go = True
            self.world.notify()
            await self._follow(found, move, ("completed", "failed", "cancelled"), report)
            return move.figures

    async def migrate_cancel(self, guest: str) -> GuestStatus:
        async with self._effect("migrate_cancel"):
            found = self.world.guests.get((self.node, guest))
            if found and not found.hung and found.moving and found.move and found.move.task:
                found.move.task.cancel()
                self.world.stay(found, found.move, "cancelled", "it was cancelled")
        return self._status(guest)

    async def await_incoming(self, guest: str, timeout: float) -> GuestStatus:
        await self.world.wait(lambda: self._status(guest).state not in ("incoming", "hung"), timeout)
        return self._status(guest)

    async def _follow(self, guest: MemoryGuest, move: Move, until: tuple[str, ...], report: Report) -> None:
        told = Progress()

        def news() -> bool:
            return move.status in until or move.progress != told or not self.world.present(guest)

        while move.status not in until and self.world.present(guest):
            if move.progress != told:
                report(move.progress)
                told = move.progress
            await self.world.wait(news)
        if not self.world.present(guest):
            raise GuestError(f"the process of {guest.spec.instance} on {self.node} ended while it was migrated")
        if move.status in ("failed", "cancelled"):
            raise MigrationFailed(f"{guest.spec.instance}: {move.error}")

    # --- helpers ---

    def _status(self, guest: str) -> GuestStatus:
        found = self.world.guests.get((self.node, guest))
        return found.status() if found else GuestStatus(instance=guest, state="gone")

    async def _find(self, guest: str) -> MemoryGuest:
        """The guest, once it answers. Errors: GuestError (no process), DeadlineExceeded (it hangs)."""
        found = self.world.guests.get((self.node, guest))
        if found is None:
            raise GuestError(f"{guest} does not run on {self.node}")
        if not await self.world.wait(lambda: not found.hung or not self.world.present(found), SILENCE):
            raise DeadlineExceeded(f"{guest} on {self.node} says nothing for {SILENCE:g} s", hint="kill the guest if it hangs")
        if not self.world.present(found):
            raise GuestError(f"the process of {guest} on {self.node} ended")
        return found

    def _resume(self, guest: str) -> None:
        found = self.world.guests[self.node, guest]
        if found.state == "running":
            return
        if found.state != "paused" or found.moving:
            raise GuestError(f"{guest} is {found.state} and cannot go on")
        self.world.activate(found)
        found.arriving = ""
        self.world.become(found, "running")

    @staticmethod
    def _settled(guest: MemoryGuest) -> None:
        if guest.state not in ("running", "paused") or guest.moving:
            moving = " and being migrated" if guest.moving else ""
            raise GuestError(f"its disks cannot change while {guest.spec.instance} is {guest.state}{moving}")

    @asynccontextmanager
    async def _effect(self, method: str, seconds: float | None = None) -> AsyncIterator[None]:
        """Around an effect: it takes time, and faults may strike before and after it."""
        await self._fault(method, "before")
        await asyncio.sleep(self.world.latency if seconds is None else seconds)
        yield
        await self._fault(method, "after")

    async def _fault(self, method: str, phase: str) -> None:
        if self.world.fault is not None:
            outcome = self.world.fault(self.node, method, phase)
            if inspect.isawaitable(outcome):
                await outcome
