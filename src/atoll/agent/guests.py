"""Orders about guests. Here the promise of one writer is kept on the node: a refused generation never starts (PROTOCOLS 1)."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from typing import Any

from atoll.agent.contact import Contact
from atoll.agent.disks import QUICK, Attachments, by_hand
from atoll.agent.memory import Memory
from atoll.agent.service import Handler
from atoll.hypervisor.contract import Hypervisor
from atoll.model.errors import AtollError, InUse, NotFound, StaleGeneration, WrongState
from atoll.model.messages import Connection, Endpoint, GuestDisk, GuestSpec, GuestStatus, Progress
from atoll.rpc.contract import Report
from atoll.runtime import faults
from atoll.storage.contract import StorageAccess

#: Seconds in which a guest that was let go on shows whether its storage takes its writes now.
RETRY = 1.0


def deleted_files(pid: int | None, paths: dict[str, str]) -> list[tuple[str, int, str]]:
    """Volume, descriptor and path of those files that a process has open and that have no name any more. The storage is not touched."""
    found = {}
    volumes = {f"{path} (deleted)": volume for volume, path in paths.items()}
    try:
        for entry in os.listdir(f"/proc/{pid}/fd") if pid and volumes else ():
            link = os.readlink(f"/proc/{pid}/fd/{entry}")
            if link in volumes:
                found[volumes[link]] = (volumes[link], int(entry), paths[volumes[link]])
    except OSError:
        # It has ended, or has closed a file while we looked.
        return list(found.values())
    return list(found.values())


class GuestOrders:
    """Handlers of ``guest.*`` and ``claim.*``."""

    def __init__(self, hypervisor: Hypervisor, memory: Memory, attachments: Attachments, storage: StorageAccess, contact: Contact) -> None:
        self._hypervisor, self._memory, self._attachments, self._storage = hypervisor, memory, attachments, storage
        self._contact = contact
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "guest.start": self.start,
            "guest.stop": self.stop,
            "guest.reboot": self.reboot,
            "guest.status": self.status,
            "guest.plug": self.plug,
            "guest.unplug": self.unplug,
            "guest.resize": self.resize,
            "guest.incoming": self.incoming,
            "guest.migrate_out": self.migrate_out,
            "guest.migrate_continue": self.migrate_continue,
            "guest.migrate_cancel": self.migrate_cancel,
            "guest.await_incoming": self.await_incoming,
            "guest.resume": self.resume,
            "guest.go_on": self.go_on,
            "guest.list": self.list_guests,
            "guest.deleted": self.deleted,
            "claim.release": self.release,
        }

    def _check_generation(self, instance: str, generation: int) -> None:
        refused = self._memory.refused(instance)
        if generation <= refused:
            raise StaleGeneration(f"this node has promised to refuse generation {generation} of {instance} (and all up to {refused})")

    def _check_by_hand(self, instance: str) -> None:
        if self._attachments.holds(by_hand(instance)):
            raise WrongState("its disks are activated here for an administrator", hint="atoll instance deactivate-disks INSTANCE")

    async def _attach_all(self, spec: GuestSpec, disks: list[dict[str, Any]], report: Report) -> GuestSpec:
        by_volume = {d["connection"]["volume"]: d for d in disks}
        attached = []
        for disk in spec.disks:
            found = by_volume[disk.volume]
            usable = await self._attachments.attach(spec.instance, found["pool"], Connection(**found["connection"]), found["access"])
            if usable.warning:
                report(Progress(text=f"warning: {usable.warning}"))
            attached.append(disk.model_copy(update={"attached": usable}))
            await faults.point("agent:guest:attached")
        return spec.model_copy(update={"disks": attached})

    async def start(self, args: dict[str, Any], report: Report) -> Any:
        """Attach the disks and start the guest. ``disks``: pool, connection, access."""
        spec = GuestSpec(**args["spec"])
        async with self._locks[spec.instance]:
            self._check_generation(spec.instance, spec.generation)
            self._check_by_hand(spec.instance)
            try:
                spec = await self._attach_all(spec, args["disks"], report)
                # Attaching may have taken long: the instance may be somebody else's by now.
                self._contact.check_again("guest.start")
                report(Progress(text="starting the guest"))
                await self._hypervisor.start(spec, report)
            except AtollError:
                if (await self._hypervisor.status(spec.instance)).state == "gone":
                    await self._attachments.detach(spec.instance)
                raise
            return None

    async def incoming(self, args: dict[str, Any], report: Report) -> Any:
        """Attach the disks and start a guest that waits for its migration; its endpoint."""
        spec = GuestSpec(**args["spec"])
        async with self._locks[spec.instance]:
            self._check_generation(spec.instance, spec.generation)
            self._check_by_hand(spec.instance)
            spec = await self._attach_all(spec, args["disks"], report)
            endpoint = await self._hypervisor.incoming(spec, args.get("copy", []), args["peer"], report)
            return endpoint.model_dump(mode="json")

    async def stop(self, args: dict[str, Any], report: Report) -> Any:
        """Stop the guest, detach its disks, and promise to refuse its generation: the durable "it does not run here"."""
        instance = args["instance"]
        async with self._locks[instance]:
            self._check_by_hand(instance)
            clean = await self._hypervisor.stop(instance, args.get("grace", 0.0), report)
            await self._attachments.detach(instance)
            self._memory.refuse(instance, args["generation"])
            return {"clean": clean}

    async def release(self, args: dict[str, Any], report: Report) -> Any:
        """Promise to refuse the generation, if the guest does not run here. Errors: InUse when it does."""
        instance = args["instance"]
        async with self._locks[instance]:
            status = await self._hypervisor.status(instance)
            if status.state != "gone":
                raise InUse(f"the guest is {status.state} here (pid {status.pid})")
            self._check_by_hand(instance)
            await self._attachments.detach(instance)
            self._memory.refuse(instance, args["generation"])
            return None

    async def reboot(self, args: dict[str, Any], report: Report) -> Any:
        """Ask for a reboot, or reset."""
        await self._hypervisor.reboot(args["instance"], args["hard"])

    async def status(self, args: dict[str, Any], report: Report) -> Any:
        """The guest as the hypervisor sees it."""
        return (await self._hypervisor.status(args["instance"])).model_dump(mode="json")

    async def list_guests(self, args: dict[str, Any], report: Report) -> Any:
        """All guests here."""
        return [status.model_dump(mode="json") for status in await self._hypervisor.guests()]

    async def deleted(self, args: dict[str, Any], report: Report) -> Any:
        """The images that guests here have open although their files were deleted: their data is there until the guest ends."""
        return [
            {"instance": guest.instance, "volume": volume, "pid": guest.pid, "fd": fd, "path": path}
            for guest in await self._hypervisor.guests()
            for volume, fd, path in deleted_files(guest.pid, self._attachments.paths(guest.instance))
        ]

    async def plug(self, args: dict[str, Any], report: Report) -> Any:
        """Attach a volume and plug it."""
        if args.get("even_ended") and await self._ended(args["instance"]):
            return  # as an undo: it gets its disks when it starts again
        disk = GuestDisk(**args["disk"])
        connection = Connection(**args["connection"])
        attached = await self._attachments.attach(args["instance"], args["pool"], connection, args["access"])
        if attached.warning:
            report(Progress(text=f"warning: {attached.warning}"))
        await faults.point("agent:guest:attached")
        self._contact.check_again("guest.plug")
        await self._hypervisor.plug(args["instance"], disk.model_copy(update={"attached": attached}))

    async def unplug(self, args: dict[str, Any], report: Report) -> Any:
        """Unplug a volume and detach it; a guest that does not run has nothing plugged."""
        if args.get("even_ended") and (await self._hypervisor.status(args["instance"])).state == "shutdown":
            return  # as an undo: it writes nothing any more, and its process is cleared away with all its attachments
        if (await self._hypervisor.status(args["instance"])).state != "gone":
            await self._hypervisor.unplug(args["instance"], args["volume"], args["timeout"])
        await faults.point("agent:guest:unplugged")
        await self._attachments.detach(args["instance"], [args["volume"]])

    async def _ended(self, instance: str) -> bool:
        """Whether the guest has no process, or one that only waits to be cleared away: nothing in it can change any more."""
        return (await self._hypervisor.status(instance)).state in ("gone", "shutdown")

    async def resize(self, args: dict[str, Any], report: Report) -> Any:
        """Tell a running guest of its disk's new size; one that does not run sees it when it starts."""
        if await self._ended(args["instance"]):
            return
        found = self._attachments.connection(args["instance"], args["volume"])
        if found is None:
            raise NotFound(f"volume {args['volume']} is not attached to {args['instance']} here")
        pool, connection = found
        connection = connection.model_copy(update={"size": max(args["size"], connection.size)})
        await self._storage.connector(pool, connection.driver, "resized", QUICK, connection=connection.model_dump(mode="json"))
        await self._hypervisor.resize(args["instance"], args["volume"], args["size"])

    async def migrate_out(self, args: dict[str, Any], report: Report) -> Any:
        """Move memory until the pause before the switchover."""
        await self._hypervisor.migrate_out(args["instance"], Endpoint(**args["endpoint"]), args.get("copy", []), report)

    async def migrate_continue(self, args: dict[str, Any], report: Report) -> Any:
        """From the pause to ``completed``: figures."""
        return (await self._hypervisor.migrate_continue(args["instance"], report)).model_dump(mode="json")

    async def migrate_cancel(self, args: dict[str, Any], report: Report) -> Any:
        """Cancel; the guest's status afterwards (``migrated``: too late, it had completed)."""
        return (await self._hypervisor.migrate_cancel(args["instance"])).model_dump(mode="json")

    async def await_incoming(self, args: dict[str, Any], report: Report) -> Any:
        """Wait until the incoming guest is loaded; its status."""
        status: GuestStatus = await self._hypervisor.await_incoming(args["instance"], args.get("timeout", 30.0))
        return status.model_dump(mode="json")

    async def resume(self, args: dict[str, Any], report: Report) -> Any:
        """Let a loaded or paused guest run. Checked like a start: it begins to write here."""
        async with self._locks[args["instance"]]:
            self._check_generation(args["instance"], args["generation"])
            self._contact.check_again("guest.resume")
            await self._hypervisor.resume(args["instance"])

    async def go_on(self, args: dict[str, Any], report: Report) -> Any:
        """Let a guest that its storage stopped try again; its status once it goes on, or stands still again."""
        await self.resume(args, report)
        loop = asyncio.get_running_loop()
        end = loop.time() + RETRY
        while True:
            # QEMU tells nobody that a write has gone well this time; one that fails again stops the guest within a moment.
            status = await self._hypervisor.status(args["instance"])
            if status.state != "running" or loop.time() >= end:
                return status.model_dump(mode="json")
            await asyncio.sleep(0.1)
