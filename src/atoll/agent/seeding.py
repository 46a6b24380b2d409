"""The order that writes a NoCloud seed: an ISO 9660 file system labelled ``cidata``, made in memory.

What is in it may be secret: it is on the volume, and nowhere else on this node.
"""

from __future__ import annotations

import io
import os
from typing import Any

from atoll.agent.copying import CopyOrders
from atoll.agent.service import Handler
from atoll.model.errors import InvalidInput
from atoll.rpc.contract import Report
from atoll.storage import copy, sources

LABEL = "cidata"
_DEADLINE = 100.0


def iso(files: dict[str, str]) -> bytes:
    """The file system. Names are as they are, by Rock Ridge and Joliet; its size is a multiple of 2048 bytes."""
    from pycdlib import PyCdlib

    image = PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    kept = []
    for number, (name, text) in enumerate(files.items()):
        if "/" in name:
            raise InvalidInput(f"{name!r} is not the name of a file of a seed")
        data = io.BytesIO(text.encode())
        kept.append(data)
        image.add_fp(data, len(data.getvalue()), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    out = io.BytesIO()
    image.write_fp(out)
    image.close()
    return out.getvalue()


class SeedOrders:
    """The handler of ``seed.write``."""

    def __init__(self, copies: CopyOrders) -> None:
        self._copies = copies

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"seed.write": self.write}

    async def write(self, args: dict[str, Any], report: Report) -> Any:
        """Write the seed into a new volume; it is durable there when this returns."""
        target = await self._copies.image(args)
        # No file of this node's, not even for a moment.
        fd = os.memfd_create("seed", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(iso(args["files"]))
            await copy.convert(sources.as_qemu(fd, "raw"), target, report, _DEADLINE, inherit=(fd,))
        finally:
            os.close(fd)
        await self._copies.close(args)
