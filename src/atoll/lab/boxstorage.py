"""Storage of a simulated cluster: pools in memory, with the semantics of files on a share. No I/O, so that virtual time stays exact."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from atoll.agent.service import Handler
from atoll.hypervisor.memory import World
from atoll.lab.boxsnapshots import BoxSnapshots
from atoll.model.errors import AlreadyExists, Conflict, HostError, NotFound, PoolFull, PoolUnavailable, ShrinkRefused
from atoll.model.messages import GuestDisk, PoolRef, Progress
from atoll.rpc.contract import Report
from atoll.runtime.worker import Told, nobody
from atoll.storage import registry
from atoll.storage.contract import refuse_observed

#: Called before and after each effect with (node, method, phase); may raise or wait.
StorageFault = Callable[[str, str, str], Awaitable[None]]


class SharedDisks:
    """What lies on the storage of the whole cluster; survives every crash. Images are keyed by place (pool, or pool and node)."""

    def __init__(self, world: World, capacity: int = 1 << 50) -> None:
        self.world, self.capacity = world, capacity
        self.images: dict[str, dict[str, dict[str, Any]]] = {}
        self.marks: dict[str, str] = {}
        #: Pool (id) -> snapshot (id) -> its size, and what was in the image.
        self.snapshots: dict[str, dict[str, dict[str, Any]]] = {}
        #: Pool (id) -> bytes that other people's files take.
        self.taken: dict[str, int] = {}
        #: Pools (ids) whose storage is not there.
        self.lost: set[str] = set()
        #: Node (name) -> the type of the file system that the pools' marks there tell.
        self.marked_on: dict[str, str] = {}
        #: Node (name) -> what was left behind there, as an agent tells it.
        self.remains: dict[str, dict[str, Any]] = {}
        #: Node (name) and pool (id) -> the type of the file system there.
        self.fstypes: dict[tuple[str, str], str] = {}
        #: Node (name) -> why guests cannot use any pool there, though the agent can.
        self.unfit: dict[str, str] = {}
        #: What storage that tells how it is tells (see ``model.health``); else all is well.
        self.health: dict[str, Any] = {}
        #: Node (name) -> pool (id) -> why it does not answer there: calls are refused.
        self.stalled: dict[str, dict[str, str]] = {}
        #: Images that are served for a copy: volume -> (server, peer).
        self.served: dict[str, tuple[str, str]] = {}
        #: Image files of nodes: (node, path) -> format and size.
        self.files: dict[tuple[str, str], dict[str, Any]] = {}
        #: Exports on nodes: (node, path) -> manifest and what was on the disks.
        self.exports: dict[tuple[str, str], dict[str, Any]] = {}
        #: Block devices of nodes: (node, volume) -> ``rw`` or ``ro``.
        self.mapped: dict[tuple[str, str], str] = {}
        #: Block devices that were made for guests: (node, volume).
        self.devices: set[tuple[str, str]] = set()
        #: Node (name) -> what the driver says of block devices there.
        self.risky: dict[str, str] = {}
        #: Node (name) -> the names of its OS definitions, where they are not the usual ones.
        self.definitions: dict[str, set[str]] = {}
        #: OS scripts that run now: (node, instance) -> what.
        self.scripts: dict[tuple[str, str], str] = {}
        self.fault: StorageFault | None = None

    async def strike(self, node: str, method: str, phase: str) -> None:
        """What a test does around an effect."""
        if self.fault is not None:
            await self.fault(node, method, phase)

    def forget_node(self, node: str) -> None:
        """Its power was cut."""
        self.mapped = {key: mode for key, mode in self.mapped.items() if key[0] != node}
        self.devices = {key for key in self.devices if key[0] != node}
        self.scripts = {key: value for key, value in self.scripts.items() if key[0] != node}

    def look(self) -> None:
        """Note it as a violation when a guest writes what somebody has mapped, or what it has as a device is no device any more."""
        for guest in self.world.guests.values():
            gone = [v for v, disk in guest.disks.items() if by_device(disk) and (guest.node, v) not in self.devices]
            if guest.active and gone:
                self.world.violations.append(f"{guest.spec.name} writes {gone} on {guest.node}, whose devices are gone")
        for (node, volume), mode in self.mapped.items():
            for guest in self.world.guests.values():
                if guest.active and volume in guest.disks and mode == "rw":
                    self.world.violations.append(f"{guest.spec.name} writes {volume} on {guest.node} while it is mapped on {node}")

    def free(self, ref: PoolRef, images: dict[str, dict[str, Any]]) -> int:
        """Bytes that are left where these images lie."""
        used: int = sum(image["size"] for image in images.values())
        return self.capacity - self.taken.get(ref.id, 0) - used

    def image(self, node: str, volume: str) -> str:
        """What a guest on the node writes when it writes the volume: an image of its own where the pool is node-local."""
        local = any("@" in place and any(image["volume"] == volume for image in images.values()) for place, images in self.images.items())
        return f"{volume}@{node}" if local else volume

    def copy(self, volume: str, source: str, target: str) -> None:
        """The records of one node's image, copied into another's."""
        records = self.world.images.get(self.image(source, volume), 0)
        image = self.image(target, volume)
        self.world.images[image] = records
        self.world.written.setdefault(volume, set()).add(image)


def by_device(disk: GuestDisk) -> bool:
    """Whether a guest was given a block device for its disk."""
    return disk.attached is not None and disk.attached.blockdev is None


class BoxStorage(BoxSnapshots):
    """A ``StorageAccess`` of one simulated node."""

    def __init__(self, disks: SharedDisks, node: str) -> None:
        self._disks, self._node = disks, node

    async def pool(self, ref: PoolRef, method: str, deadline: float, told: Told = nobody, **args: Any) -> Any:
        """See ``StorageAccess``."""
        why = self._disks.stalled.get(self._node, {}).get(ref.id)
        if why and method != "health":
            raise PoolUnavailable(f"pool {ref.name} is stalled: {why}")
        refuse_observed(ref, method)
        await self._point(method, "before")
        result = getattr(self, "_" + method)(ref, **args)
        await self._point(method, "after")
        return result

    async def _point(self, method: str, phase: str) -> None:
        await self._disks.strike(self._node, method, phase)

    def _place(self, ref: PoolRef) -> dict[str, dict[str, Any]]:
        key = f"{ref.id}@{ref.node}" if registry.info(ref.driver).node_local else ref.id
        if ref.id in self._disks.lost:
            raise PoolUnavailable(f"pool {ref.name} is not mounted on {ref.node}")
        if key not in self._disks.marks and not ref.observed:
            raise PoolUnavailable(f"pool {ref.name} is not prepared on {ref.node}")
        return self._disks.images.setdefault(key, {})

    def _prepare(self, ref: PoolRef, create: bool) -> Any:
        key = f"{ref.id}@{ref.node}" if registry.info(ref.driver).node_local else ref.id
        if not create and key not in self._disks.marks:
            raise PoolUnavailable(f"the directory of pool {ref.name} on {ref.node} has no mark")
        self._disks.marks[key] = ref.id
        return self._status(ref)

    def _status(self, ref: PoolRef) -> dict[str, Any]:
        if why := self._disks.unfit.get(self._node):
            return {"ok": False, "reason": why, "hint": "chmod a+x /box"}
        details = {"mount": "/box", "file system": self._disks.fstypes.get((self._node, ref.id), "box")}
        if then := self._disks.marked_on.get(self._node):
            details["marked on"] = then
        return {"ok": True, "details": details}

    def _mark(self, ref: PoolRef, expected: list[str]) -> None:
        key = f"{ref.id}@{ref.node}" if registry.info(ref.driver).node_local else ref.id
        if expected and not any(name in self._disks.images.get(key, {}) for name in expected):
            raise PoolUnavailable(f"none of the {len(expected)} images of pool {ref.name} is there: this is not its directory")
        self._disks.marks[key] = ref.id

    def _forget(self, ref: PoolRef) -> None:
        key = f"{ref.id}@{ref.node}" if registry.info(ref.driver).node_local else ref.id
        self._disks.marks.pop(key, None)

    def _check(self, ref: PoolRef) -> Any:
        try:
            self._place(ref)
        except PoolUnavailable as error:
            return {"ok": False, "reason": error.message}
        return self._status(ref)

    def _space(self, ref: PoolRef) -> Any:
        return {"total": self._disks.capacity, "free": max(0, self._disks.free(ref, self._place(ref)))}

    def _health(self, ref: PoolRef) -> Any:
        if ref.id in self._disks.lost:
            raise PoolUnavailable(f"pool {ref.name}: nobody answers")
        return {"status": "ok", **self._disks.health}

    def _create(self, ref: PoolRef, spec: dict[str, Any]) -> str:
        images = self._place(ref)
        logical_id = f"{spec['name']}.{spec['volume']}.raw"
        if logical_id in images:
            if images[logical_id]["size"] != spec["size"]:
                raise Conflict(f"{logical_id} exists with another size")
            return logical_id
        if spec["size"] > self._disks.free(ref, images):
            raise PoolFull(f"pool {ref.name} has no room for {spec['size']} bytes")
        images[logical_id] = {"size": spec["size"], "volume": spec["volume"]}
        return logical_id

    def _delete(self, ref: PoolRef, logical_id: str) -> None:
        image = self._place(ref).get(logical_id)
        if image is not None:
            # What was in it is gone, and a new image of the same volume begins empty.
            self._disks.world.images.pop(self._disks.image(ref.node, image["volume"]), None)
            del self._place(ref)[logical_id]

    def _grow(self, ref: PoolRef, logical_id: str, size: int) -> int:
        image = self._find(ref, logical_id)
        if size < image["size"]:
            raise ShrinkRefused(f"{logical_id} is larger")
        if size - image["size"] > self._disks.free(ref, self._place(ref)):
            raise PoolFull(f"pool {ref.name} has no room for {size} bytes")
        image["size"] = size
        return size

    def _find(self, ref: PoolRef, logical_id: str) -> dict[str, Any]:
        image = self._place(ref).get(logical_id)
        if image is None:
            raise NotFound(f"there is no image {logical_id}")
        return image

    def _rename(self, ref: PoolRef, logical_id: str, volume: str, name: str) -> str:
        images = self._place(ref)
        old = next((k for k, image in images.items() if image["volume"] == volume), None)
        if old is None:
            raise NotFound(f"there is no image of {volume}")
        new = f"{name}.{volume}.raw"
        images[new] = images.pop(old)
        return new

    def _stat(self, ref: PoolRef, logical_id: str) -> Any:
        image = self._place(ref).get(logical_id)
        if image is not None and image.get("problem"):
            raise Conflict(f"{logical_id} is {image['problem']}, not an image; nothing is read or written through it")
        return None if image is None else {"logical_id": logical_id, "size": image["size"], "volume": image["volume"]}

    def _images(self, ref: PoolRef) -> Any:
        return [{"name": name, "size": image["size"]} for name, image in sorted(self._place(ref).items())]

    def _volumes(self, ref: PoolRef) -> Any:
        found = self._place(ref).items()
        return [{"logical_id": k, "size": i["size"], "volume": i["volume"], "modified": 0.0} for k, i in found if "problem" not in i]

    def _adopt(self, ref: PoolRef, source: str, volume: str) -> Any:
        return {"logical_id": source, "size": self._find(ref, source)["size"], "volume": volume}

    def _writers(self, ref: PoolRef, logical_id: str) -> Any:
        image = self._find(ref, logical_id)
        if not self._disks.world.locking:
            return []
        local = registry.info(ref.driver).node_local
        return [
            {"who": f"{guest.spec.name} on {guest.node} (pid {guest.pid})", "node": guest.node}
            for guest in self._disks.world.guests.values()
            if guest.active and image["volume"] in guest.disks and (not local or guest.node == ref.node)
        ]

    def _probe_writers(self, ref: PoolRef, action: str) -> bool:
        held = self._disks.marks.get(f"probe {ref.id}") is not None
        if action == "hold":
            self._disks.marks[f"probe {ref.id}"] = self._node
            return True
        if action == "drop":
            self._disks.marks.pop(f"probe {ref.id}", None)
            return True
        return held and self._disks.world.locking

    def _sync(self, ref: PoolRef, logical_id: str, primary: str, secondary: str) -> None:
        volume = self._find(ref, logical_id)["volume"]
        self._disks.copy(volume, primary, secondary)

    def _connection(self, ref: PoolRef, logical_id: str, volume: str, size: int, node: str = "") -> Any:
        self._find(ref, logical_id)
        return {"driver": ref.driver, "volume": volume, "size": size, "data": {"logical_id": logical_id}}

    async def connector(self, pool: str, driver: str, method: str, deadline: float, **args: Any) -> Any:
        """See ``StorageAccess``."""
        if why := self._disks.stalled.get(self._node, {}).get(pool):
            raise PoolUnavailable(f"pool {pool} is stalled: {why}")
        await self._point(f"connector {method}", "before")
        if method == "attach" and pool in self._disks.lost:
            raise PoolUnavailable("the pool is not mounted")
        if method == "attach":
            volume = args["connection"]["volume"]
            if args["access"] == "kernelspace":
                self._disks.devices.add((self._node, volume))
                warning = self._disks.risky.get(self._node, "")
                return {"volume": volume, "path": f"/dev/box/guests/{volume}", "way": "box", "warning": warning}
            return {"volume": volume, "path": f"/box/{volume}", "blockdev": {"driver": "file", "filename": f"/box/{volume}"}}
        if method == "detach":
            self._detach(args["connection"]["volume"])
        if method == "map":
            return self._map(args["connection"]["volume"], args["read_only"])
        if method == "unmap":
            self._disks.mapped.pop((self._node, args["connection"]["volume"]), None)
        if method == "unmap_others":
            return []
        return args["connection"]["size"] if method == "resized" else None

    def _detach(self, volume: str) -> None:
        world = self._disks.world
        world.violations += [
            f"{volume} is unmapped on {self._node} while {guest.spec.name} ({guest.state}) has it"
            for guest in world.guests.values()
            if guest.node == self._node and volume in guest.disks and by_device(guest.disks[volume]) and guest.state != "shutdown"
        ]
        self._disks.devices.discard((self._node, volume))

    def _map(self, volume: str, read_only: bool) -> Any:
        world = self._disks.world
        world.violations += [
            f"{volume} is mapped on {self._node} while {guest.spec.name} writes it on {guest.node}"
            for guest in world.guests.values()
            if guest.active and volume in guest.disks and not read_only
        ]
        world.violations += [
            f"{volume} is mapped on {self._node} and {node}" for node, other in self._disks.mapped if other == volume and node != self._node
        ]
        self._disks.mapped[self._node, volume] = "ro" if read_only else "rw"
        return {"volume": volume, "path": f"/dev/box/{volume}"}

    # --- copies of stopped disks: as agent.copying, without processes ---

    def copy_handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "node.remains": self._remains,
            "copy.serve": self._serve,
            "copy.unserve": self._unserve,
            "copy.push": self._push,
            "copy.unpush": self._nothing,
            "image.look": self._look_at_image,
            "image.import": self._import_image,
            "image.push": self._import_image,
            "image.unimport": self._nothing,
            "seed.write": self._write_seed,
            "export.look": self._look_at_export,
            "export.check": self._check_export,
            "export.write": self._write_export,
            "export.place": self._place_export,
            "export.discard": self._discard_export,
            "export.read": self._read_export,
        }

    async def _serve(self, args: dict[str, Any], report: Report) -> Any:
        await self._point("serve", "before")
        self._find(PoolRef(**args["ref"]), args["logical_id"])
        self._disks.served[args["volume"]] = (self._node, args["peer"])
        await self._point("serve", "after")
        return 10809

    async def _unserve(self, args: dict[str, Any], report: Report) -> Any:
        self._disks.served.pop(args["volume"], None)

    async def _push(self, args: dict[str, Any], report: Report) -> Any:
        await self._point("push", "before")
        self._find(PoolRef(**args["ref"]), args["logical_id"])
        await asyncio.sleep(0.5)
        if self._disks.served.get(args["volume"]) != (args["server"], self._node):
            raise HostError(f"the copy failed: {args['server']} does not serve {args['volume']} to {self._node}")
        self._disks.copy(args["volume"], self._node, args["server"])
        await self._point("push", "after")

    async def _remains(self, args: dict[str, Any], report: Report) -> Any:
        return self._disks.remains.get(self._node, {})

    async def _nothing(self, args: dict[str, Any], report: Report) -> Any:
        return None

    async def _look_at_image(self, args: dict[str, Any], report: Report) -> Any:
        found = self._disks.files.get((self._node, args["path"]))
        if found is None:
            raise NotFound(f"there is no image {args['path']} on {self._node}")
        return found

    async def _write_seed(self, args: dict[str, Any], report: Report) -> Any:
        await self._point("seed", "before")
        self._find(PoolRef(**args["ref"]), args["logical_id"])["content"] = dict(args["files"])
        await self._point("seed", "after")

    async def _import_image(self, args: dict[str, Any], report: Report) -> Any:
        """Both ways, here and to a peer that serves."""
        await self._point("import", "before")
        volume, server = args["volume"], args.get("server", "")
        if not server:
            self._find(PoolRef(**args["ref"]), args["logical_id"])
        report(Progress(percent=50.0, text="copying the disk"))
        await asyncio.sleep(0.5)
        if server and self._disks.served.get(volume) != (server, self._node):
            raise HostError(f"the copy failed: {server} does not serve {volume} to {self._node}")
        for images in self._disks.images.values():
            for image in images.values():
                if image["volume"] == volume:
                    image["content"] = args["path"]
        await self._point("import", "after")

    # --- exports: as agent.exporting ---

    async def _look_at_export(self, args: dict[str, Any], report: Report) -> Any:
        found = self._disks.exports.get((self._node, args["path"]))
        if found is None:
            raise NotFound(f"there is no file {args['path']} on {self._node}")
        return found["manifest"]

    async def _check_export(self, args: dict[str, Any], report: Report) -> Any:
        if (self._node, args["path"]) in self._disks.exports and not args["overwrite"]:
            raise AlreadyExists(f"{args['path']} exists")

    async def _write_export(self, args: dict[str, Any], report: Report) -> Any:
        await self._point("export", "before")
        contents = []
        for disk in args["disks"]:
            image = self._find(PoolRef(**disk["ref"]), disk["logical_id"])
            writers = [g for g in self._disks.world.guests.values() if g.active and disk["volume"] in g.disks]
            self._disks.world.violations += [f"{g.spec.name} writes {disk['volume']} while it is exported" for g in writers]
            contents.append((image.get("content"), self._disks.world.images.get(self._disks.image(self._node, disk["volume"]), 0)))
            report(Progress(percent=50.0, text="exporting"))
            await asyncio.sleep(0.5)
        key = (self._node, f"{args['path']}.{args['manifest']['id']}")
        self._disks.exports[key] = {"manifest": args["manifest"], "contents": contents}
        await self._point("export", "after")
        return {"size": 1}

    async def _place_export(self, args: dict[str, Any], report: Report) -> Any:
        exports, name = self._disks.exports, (self._node, args["path"])
        partial = (self._node, f"{args['path']}.{args['id']}")
        if partial in exports:
            if name in exports and not args["overwrite"]:
                raise AlreadyExists(f"{args['path']} exists")
            exports[name] = exports.pop(partial)
        elif name not in exports or exports[name]["manifest"]["id"] != args["id"]:
            raise NotFound("the finished export is not there any more")

    async def _discard_export(self, args: dict[str, Any], report: Report) -> Any:
        self._disks.exports.pop((self._node, f"{args['path']}.{args['id']}"), None)

    async def _read_export(self, args: dict[str, Any], report: Report) -> Any:
        await self._point("export read", "before")
        image = self._find(PoolRef(**args["ref"]), args["logical_id"])
        await asyncio.sleep(0.5)
        found = self._disks.exports[self._node, args["path"]]
        image["content"] = found["contents"][args["index"]]
        await self._point("export read", "after")

    def stalled(self) -> dict[str, str]:
        """See ``StorageAccess``."""
        return dict(self._disks.stalled.get(self._node, {}))

    def stalled_for(self) -> dict[str, float]:
        """See ``StorageAccess``."""
        return dict.fromkeys(self._disks.stalled.get(self._node, {}), 60.0)

    async def close(self) -> None:
        """See ``StorageAccess``."""
