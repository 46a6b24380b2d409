"""Orders that fill a new disk from an image file of this node."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from atoll.agent.copying import CopyOrders
from atoll.agent.service import Handler
from atoll.model.errors import DeadlineExceeded
from atoll.rpc.contract import Report
from atoll.storage import copy, sources

#: Seconds to open an image and read its header: it may lie on a share that hangs.
_LOOK = 30.0
#: For the copying itself: a terabyte over a network takes hours.
_LONG = 82000.0


def _look(path: str, chosen: str | None) -> sources.Source:
    with sources.opened(path) as fd:
        return sources.look(fd, path, chosen)


class ImageOrders:
    """Handlers of ``image.*``."""

    def __init__(self, copies: CopyOrders, tls_dir: Path) -> None:
        self._copies, self._tls_dir = copies, tls_dir

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"image.look": self.look, "image.import": self.fill, "image.push": self.push, "image.unimport": self.unimport}

    async def look(self, args: dict[str, Any], report: Report) -> Any:
        """The image's format and the size of its disk. Errors: NotFound, InvalidInput."""
        return (await self._looked_at(args)).model_dump(mode="json")

    async def _looked_at(self, args: dict[str, Any]) -> sources.Source:
        try:
            return await asyncio.wait_for(asyncio.to_thread(_look, args["path"], args["format"]), _LOOK)
        except TimeoutError:
            raise DeadlineExceeded(f"the image {args['path']} could not be read within {_LOOK:g} s") from None

    async def fill(self, args: dict[str, Any], report: Report) -> Any:
        """Copy the image into a volume that this node reaches; it is durable there when this returns."""
        await self._looked_at(args)
        target = await self._copies.image(args)
        with sources.opened(args["path"]) as fd:
            sources.look(fd, args["path"], args["format"])
            await copy.convert(sources.as_qemu(fd, args["format"]), target, report, _LONG, inherit=(fd,))
        await self._copies.close(args)

    async def push(self, args: dict[str, Any], report: Report) -> Any:
        """Copy the image into the volume that the peer serves."""
        await self._looked_at(args)
        run_dir = self._copies.directory(f"{args['volume']}.import")
        with sources.opened(args["path"]) as fd:
            sources.look(fd, args["path"], args["format"])
            source = sources.as_qemu(fd, args["format"])
            where = (args["host"], args["port"], args["server"])
            await copy.push(source, *where, self._tls_dir, report, run_dir, _LONG, inherit=(fd,))

    async def unimport(self, args: dict[str, Any], report: Report) -> Any:
        """Nothing stays of an import that was broken off but the volume: its process ends with the order."""
