"""Orders about storage: the pool half and disks on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atoll.agent.memory import Memory
from atoll.agent.service import Handler
from atoll.model.errors import AtollError, InvalidInput, NotFound, PoolUnavailable, StaleGeneration
from atoll.model.messages import Attached, Connection, GuestStatus, PoolRef, Progress
from atoll.rpc.contract import Report
from atoll.storage import registry
from atoll.storage.contract import StorageAccess

#: Seconds for calls that touch metadata only, and for those that may write a whole image (preallocation, sync).
QUICK, LONG = 30.0, 3600.0
#: For copying a terabyte.
HOURS = 82000.0
#: Seconds for a sample of how the storage is; a child that takes longer is replaced.
WATCH = 10.0
#: For those that may have to wait until the storage gives up a dead client, which takes Ceph 30 seconds.
PATIENT = 90.0
#: Seconds after which a deletion says why it may take long.
SLOW = 3.0


def by_hand(instance: str) -> str:
    """The owner of what an administrator has attached of an instance's disks, apart from its guest."""
    return f"{instance}.by-hand"


class Attachments:
    """What this agent attached for which instance, remembered in the run directory: like the attachments, it is gone after a reboot.

    ``kept``: where a simulation, which has no run directory, remembers it.
    """

    def __init__(self, storage: StorageAccess, run_dir: Path | None, kept: dict[str, dict[str, dict[str, Any]]] | None = None) -> None:
        self._storage = storage
        self._dir = run_dir / "attached" if run_dir else None
        self._kept: dict[str, dict[str, dict[str, Any]]] = {} if kept is None else kept
        if self._dir and self._dir.is_dir():
            for path in self._dir.glob("*.json"):
                self._kept[path.stem] = json.loads(path.read_text())

    async def attach(self, owner: str, pool: str, connection: Connection, access: str) -> Attached:
        """Attach a volume for an owner (an instance id). Twice is success."""
        return await self._use(owner, pool, connection, "attach", access=access)

    async def map(self, owner: str, pool: str, connection: Connection, *, read_only: bool) -> Attached:
        """Make a volume a block device for an owner. Twice is success."""
        return await self._use(owner, pool, connection, "map", read_only=read_only)

    async def _use(self, owner: str, pool: str, connection: Connection, how: str, **args: Any) -> Attached:
        # Remembered before it is done: whoever comes next must find what this agent had begun.
        entry = {"pool": pool, "connection": connection.model_dump(mode="json"), "how": how, "access": args.get("access", "")}
        self._kept.setdefault(owner, {})[connection.volume] = entry
        self._save(owner)
        data = await self._storage.connector(pool, connection.driver, how, QUICK, connection=connection.model_dump(mode="json"), **args)
        told = {"path": data["path"], "way": data.get("way", ""), "warning": data.get("warning", "")}
        self._kept[owner][connection.volume] = {**entry, **told}
        self._save(owner)
        return Attached(**data)

    async def detach(self, owner: str, volumes: Iterable[str] | None = None) -> None:
        """Detach volumes of an owner (all by default). Not attached is success."""
        kept = self._kept.get(owner, {})
        for volume in list(kept if volumes is None else volumes):
            entry = kept.get(volume)
            if entry is not None:
                connection = entry["connection"]
                how = "unmap" if entry.get("how") == "map" else "detach"
                await self._storage.connector(entry["pool"], connection["driver"], how, QUICK, connection=connection)
                del kept[volume]
                self._save(owner)

    async def unmap_forgotten(self) -> list[str]:
        """End mappings of this node that nothing here remembers; gives their volumes. For the beginning, when nothing is under way."""
        known = sorted({volume for kept in self._kept.values() for volume in kept})
        gone: set[str] = set()
        for driver in registry.drivers():
            gone |= set(await self._storage.connector("leftovers", driver.name, "unmap_others", QUICK, keep=known))
        return sorted(gone)

    def owners_by_hand(self) -> list[str]:
        """Instances of whose disks something is attached apart from their guests."""
        return sorted(owner.removesuffix(by_hand("")) for owner, kept in self._kept.items() if kept and owner.endswith(by_hand("")))

    def holds(self, owner: str) -> bool:
        """Whether anything is attached for the owner."""
        return bool(self._kept.get(owner))

    def connection(self, owner: str, volume: str) -> tuple[str, Connection] | None:
        """The pool and connection of an attached volume."""
        entry = self._kept.get(owner, {}).get(volume)
        return (entry["pool"], Connection(**entry["connection"])) if entry else None

    def paths(self, owner: str) -> dict[str, str]:
        """Volume -> the path under which it is attached for the owner."""
        return {volume: entry["path"] for volume, entry in self._kept.get(owner, {}).items() if entry.get("path")}

    def seen(self, guest: GuestStatus) -> GuestStatus:
        """A guest's status with how its disks are attached."""
        kept = self._kept.get(guest.instance)
        if not kept:
            return guest
        access = {volume: entry["access"] for volume, entry in kept.items() if entry.get("access")}
        ways = {volume: entry["way"] for volume, entry in kept.items() if entry.get("way")}
        warnings = sorted({entry["warning"] for entry in kept.values() if entry.get("warning")})
        return guest.model_copy(update={"access": access, "ways": ways, "warnings": warnings})

    def _save(self, owner: str) -> None:
        if self._dir is None:
            return
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._dir / f"{owner}.json"
        if self._kept.get(owner):
            new = path.with_suffix(".new")
            new.write_text(json.dumps(self._kept[owner]))
            new.replace(path)
        else:
            path.unlink(missing_ok=True)


class StorageOrders:
    """Handlers of ``pool.*``, ``volume.*`` and ``disks.*``."""

    def __init__(self, storage: StorageAccess, attachments: Attachments, memory: Memory) -> None:
        self._storage, self._attachments, self._memory = storage, attachments, memory

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        simple = {
            "pool.prepare": ("prepare", QUICK),
            "pool.forget": ("forget", QUICK),
            "pool.mark": ("mark", QUICK),
            "pool.check": ("check", QUICK),
            "pool.space": ("space", QUICK),
            "pool.probe": ("probe_writers", QUICK),
            "pool.health": ("health", WATCH),
            "pool.images": ("images", QUICK),
            "pool.readmit": ("readmit", QUICK),
            "volume.create": ("create", LONG),
            "volume.clone": ("clone", LONG),
            "volume.grow": ("grow", LONG),
            "volume.stat": ("stat", QUICK),
            "volume.list": ("volumes", QUICK),
            "volume.adopt": ("adopt", QUICK),
            "volume.writers": ("writers", QUICK),
            "volume.sync": ("sync", LONG),
            "snapshot.create": ("snapshot", PATIENT),
            "snapshot.delete": ("delete_snapshot", PATIENT),
            "snapshot.list": ("snapshots", QUICK),
            "snapshot.waiting": ("waiting", QUICK),
        }
        handlers: dict[str, Handler] = {name: self._pool(method, deadline) for name, (method, deadline) in simple.items()}
        handlers["pool.unprepare"] = self.unprepare
        handlers["volume.uncreate"] = self.uncreate
        handlers["volume.flatten"] = self.flatten
        handlers["volume.unflatten"] = self.unflatten
        handlers["volume.delete"] = self.delete
        handlers["volume.rename"] = self.rename
        handlers["disks.connect"] = self.connect
        handlers["disks.note"] = self.note
        handlers["disks.revoke"] = self.revoke
        handlers["disks.activate"] = self.activate
        handlers["disks.deactivate"] = self.deactivate
        handlers["disks.mapped"] = self.mapped
        return handlers

    def _pool(self, method: str, deadline: float) -> Handler:
        async def handler(args: dict[str, Any], report: Report) -> Any:
            ref = PoolRef(**args["ref"])
            rest = {k: v for k, v in args.items() if k != "ref"}
            # What may write for an hour leaves room to other calls, and is one of few.
            quick = method in ("create", "clone") and registry.info(ref.driver).quick
            return await self._storage.pool(ref, method, QUICK if quick else deadline, **rest)

        return handler

    async def unprepare(self, args: dict[str, Any], report: Report) -> Any:
        """The undo of a preparation: where the storage is not there, or the options name none, nothing was marked, and nothing is to be
        taken back."""
        try:
            await self._storage.pool(PoolRef(**args["ref"]), "forget", QUICK)
        except (InvalidInput, PoolUnavailable) as error:
            report(Progress(text=f"nothing to take back: {error.message}"))

    async def flatten(self, args: dict[str, Any], report: Report) -> Any:
        """Copy what an image reads of others into it; whether there was anything."""
        ref = PoolRef(**args["ref"])

        def told(percent: float) -> None:
            report(Progress(percent=percent, text="copying"))

        return await self._storage.pool(ref, "flatten", HOURS, told, logical_id=args["logical_id"])

    async def unflatten(self, args: dict[str, Any], report: Report) -> Any:
        """Nothing is taken back: the worker that copied ended with the order, and what it has copied stays copied."""

    async def uncreate(self, args: dict[str, Any], report: Report) -> Any:
        """The undo of a creation: delete by what the creation would have made, whether or not its logical id was ever told."""
        ref = PoolRef(**args["ref"])
        for stat in await self._storage.pool(ref, "volumes", QUICK):
            if stat["volume"] == args["volume"]:
                if registry.info(ref.driver).fencing and stat["size"]:
                    # What filled it may have been killed; nobody else ever knew of it.
                    await self._storage.pool(ref, "fence", QUICK, logical_id=stat["logical_id"], whom="all", volume=args["volume"])
                await self._delete(ref, stat["logical_id"], report)
        return None

    async def rename(self, args: dict[str, Any], report: Report) -> Any:
        """Let an image's name follow its volume's. The undo comes without a logical id: then an image that is not there needs no name."""
        rest = {k: v for k, v in args.items() if k != "ref"}
        try:
            return await self._storage.pool(PoolRef(**args["ref"]), "rename", QUICK, **rest)
        except NotFound as error:
            if args["logical_id"]:
                raise
            report(Progress(text=f"nothing to take back: {error.message}"))
            return ""

    async def delete(self, args: dict[str, Any], report: Report) -> Any:
        """Remove a volume's image. Guests that were noted are gone, or the volume would not be free: they need not be waited for."""
        ref = PoolRef(**args["ref"])
        if registry.info(ref.driver).fencing:
            with contextlib.suppress(NotFound):
                await self._storage.pool(ref, "fence", QUICK, logical_id=args["logical_id"], whom="known")
        await self._delete(ref, args["logical_id"], report)

    async def _delete(self, ref: PoolRef, logical_id: str, report: Report) -> None:
        """Say what is waited for: an agent that was killed while it worked on the image still counts as alive for a while."""
        words = "the storage has not answered yet; it may still count on a client that was killed, for half a minute"
        told = asyncio.get_running_loop().call_later(SLOW, report, Progress(text=f"removing image {logical_id}: {words}"))
        try:
            await self._storage.pool(ref, "delete", PATIENT, logical_id=logical_id)
        finally:
            told.cancel()

    async def connect(self, args: dict[str, Any], report: Report) -> Any:
        """Everything that a start needs to know of its disks: connection, writers and what the storage says of the size."""

        async def one(disk: dict[str, Any]) -> dict[str, Any]:
            ref = PoolRef(**disk["ref"])
            name = {"logical_id": disk["logical_id"]}
            found: dict[str, Any] = {"volume": disk["volume"], "pool": ref.id}
            if disk.get("fence"):
                found |= await self._storage.pool(ref, "ready", QUICK, **name, whom=disk["fence"], volume=disk["volume"])
                if out := found.pop("out"):
                    report(Progress(text=f"shut out of {disk['volume']}: {', '.join(out)}"))
                if found["writers"]:
                    found["writers"] = await self._writers(ref, disk["logical_id"], args.get("patience", 0.0))
                    if not found["writers"]:
                        # Who has died without a word has left his lock.
                        await self._storage.pool(ref, "fence", QUICK, **name, whom="none")
            else:
                found["stat"] = await self._storage.pool(ref, "stat", QUICK, **name)
                if found["stat"] is not None:
                    found["writers"] = await self._writers(ref, disk["logical_id"], args.get("patience", 0.0))
            if found["stat"] is not None:
                found["connection"] = await self._storage.pool(
                    ref, "connection", QUICK, **name, volume=disk["volume"], size=disk["size"], node=disk.get("node", "")
                )
            return found

        return list(await asyncio.gather(*(one(disk) for disk in args["disks"])))

    async def note(self, args: dict[str, Any], report: Report) -> Any:
        """Let the storage remember who has disks open now. It is only the sooner believed of them that they are gone: so it may fail."""

        async def one(disk: dict[str, Any]) -> None:
            try:
                await self._storage.pool(PoolRef(**disk["ref"]), "note", QUICK, logical_id=disk["logical_id"], node=disk.get("node", ""))
            except AtollError as error:
                report(Progress(text=f"{disk['volume']}: {error.message}"))

        await asyncio.gather(*(one(disk) for disk in args["disks"]))

    async def revoke(self, args: dict[str, Any], report: Report) -> Any:
        """Take a node's rights for disks that it has let go. The next start does so too, before it: so it may fail."""
        for disk in args["disks"]:
            try:
                await self._storage.pool(PoolRef(**disk["ref"]), "revoke", QUICK, volume=disk["volume"], node=args["node"])
            except AtollError as error:
                report(Progress(text=f"{disk['volume']}: {error.message}"))

    async def _writers(self, ref: PoolRef, logical_id: str, patience: float) -> Any:
        """Who writes it, after waiting up to ``patience`` seconds for them to go: a dead client's locks end with its lease."""
        end = asyncio.get_running_loop().time() + patience
        while True:
            writers = await self._storage.pool(ref, "writers", QUICK, logical_id=logical_id)
            if not writers or asyncio.get_running_loop().time() >= end:
                return writers
            await asyncio.sleep(0.5)

    async def activate(self, args: dict[str, Any], report: Report) -> Any:
        """Make disks block devices for an administrator or an OS script: their paths. ``generation``: of the claim that allows it."""
        if args.get("generation", 0) and args["generation"] <= (refused := self._memory.refused(args["owner"])):
            raise StaleGeneration(f"this node has promised to refuse generation {args['generation']} (and all up to {refused})")
        paths = {}
        try:
            for disk in args["disks"]:
                connection = Connection(**disk["connection"])
                read_only = disk.get("mode", "rw") == "ro"
                attached = await self._attachments.map(by_hand(args["owner"]), disk["pool"], connection, read_only=read_only)
                paths[connection.volume] = attached.path
        except AtollError:
            await self._attachments.detach(by_hand(args["owner"]))
            raise
        return paths

    async def mapped(self, args: dict[str, Any], report: Report) -> Any:
        """The instances whose disks are active here, apart from guests."""
        return self._attachments.owners_by_hand()

    async def deactivate(self, args: dict[str, Any], report: Report) -> Any:
        """End that."""
        await self._attachments.detach(by_hand(args["owner"]))
        return None
