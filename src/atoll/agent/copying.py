"""Orders that copy a stopped node-local disk to another node, over TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atoll.agent.disks import QUICK
from atoll.agent.service import Handler
from atoll.model.errors import HostError
from atoll.model.messages import Connection, PoolRef
from atoll.rpc.contract import Report
from atoll.storage import copy, registry
from atoll.storage.contract import StorageAccess


class CopyOrders:
    """Handlers of ``copy.*``: the target serves one image for one peer, the source pushes into it."""

    def __init__(self, storage: StorageAccess, tls_dir: Path, run_dir: Path, address: str) -> None:
        self._storage, self._tls_dir, self._run_dir, self._address = storage, tls_dir, run_dir, address

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"copy.serve": self.serve, "copy.unserve": self.unserve, "copy.push": self.push, "copy.unpush": self.unpush}

    def directory(self, volume: str) -> Path:
        """Where the run-time files of a copy are."""
        return self._run_dir / "copies" / volume

    async def image(self, args: dict[str, Any]) -> copy.Image:
        """The image here, by way of the pool's own halves. Errors: HostError (it is not there), and theirs."""
        ref = PoolRef(**args["ref"])
        stat = await self._storage.pool(ref, "stat", QUICK, logical_id=args["logical_id"])
        if stat is None:
            raise HostError(f"there is no image {args['logical_id']} to copy", hint="atoll cluster verify")
        name = {"logical_id": args["logical_id"], "volume": args["volume"]}
        connection = Connection(**await self._storage.pool(ref, "connection", QUICK, **name, size=stat["size"], node=ref.node))
        access = registry.info(connection.driver).plain_access
        found = await self._storage.connector(
            ref.id, connection.driver, "attach", QUICK, connection=connection.model_dump(mode="json"), access=access
        )
        direct = bool(((found.get("blockdev") or {}).get("cache") or {}).get("direct"))
        sparse = stat["allocated"] < stat["size"]
        if found["path"] is None:
            return copy.Image("", direct, sparse, found["blockdev"], found["secrets"])
        return copy.Image(str(found["path"]), direct, sparse)

    async def close(self, args: dict[str, Any]) -> None:
        """The image has been opened, or is no longer needed: nothing of it stays on this node."""
        ref = PoolRef(**args["ref"])
        connection = Connection(driver=ref.driver, volume=args["volume"], size=0, data={"pool": args["ref"]})
        await self._storage.connector(ref.id, ref.driver, "detach", QUICK, connection=connection.model_dump(mode="json"))

    async def serve(self, args: dict[str, Any], report: Report) -> Any:
        """Serve the image to the peer; the port."""
        run_dir = self.directory(args["volume"])
        await copy.unserve(run_dir)
        port, _ = await copy.serve(await self.image(args), self._address, self._tls_dir, args["peer"], run_dir)
        await self.close(args)
        return port

    async def unserve(self, args: dict[str, Any], report: Report) -> Any:
        """End that. Not served = success."""
        await copy.unserve(self.directory(args["volume"]))

    async def push(self, args: dict[str, Any], report: Report) -> Any:
        """Copy the image into the peer's; it is durable there when this returns."""
        await copy.push(
            await self.image(args), args["host"], args["port"], args["server"], self._tls_dir, report, self.directory(args["volume"])
        )

    async def unpush(self, args: dict[str, Any], report: Report) -> Any:
        """Nothing stays of a push that was broken off: its process ends with the order."""
