"""Orders that write an instance into one file of this node, and disks out of such a file. The work is done by a process that can be
killed: files may lie on shares that hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

from atoll.agent.copying import CopyOrders
from atoll.agent.service import Handler
from atoll.model.errors import DeadlineExceeded, HostError, from_wire
from atoll.model.messages import Progress
from atoll.rpc.contract import Report
from atoll.storage import archive

#: Seconds for what touches names and headers, for what copies disks, and for a killed process to go.
_QUICK, _LONG, _GRACE = 40.0, 82000.0, 10.0


class ExportOrders:
    """Handlers of ``export.*``."""

    def __init__(self, copies: CopyOrders) -> None:
        self._copies = copies

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "export.look": self.look,
            "export.check": self.check,
            "export.write": self.write,
            "export.place": self.place,
            "export.discard": self.discard,
            "export.read": self.read,
        }

    async def look(self, args: dict[str, Any], report: Report) -> Any:
        """What an export says of itself. Errors: NotFound, InvalidInput."""
        return await _work({"what": "look", "path": args["path"]}, _QUICK, report)

    async def check(self, args: dict[str, Any], report: Report) -> Any:
        """Refuse a place that cannot be written. Errors: NotFound, AlreadyExists, InvalidInput."""
        return await _work({"what": "check", "path": args["path"], "overwrite": args["overwrite"]}, _QUICK, report)

    async def write(self, args: dict[str, Any], report: Report) -> Any:
        """Write the export under its temporary name; durable when this returns."""
        images = [(await self._copies.image(disk)).path for disk in args["disks"]]
        partial = archive.partial_of(args["path"], args["manifest"]["id"])
        order = {"what": "write", "partial": partial, "manifest": args["manifest"], "images": images}
        return await _work(order, _LONG, report, "exporting")

    async def place(self, args: dict[str, Any], report: Report) -> Any:
        """Give it its name. Errors: AlreadyExists."""
        order = {"what": "place", "path": args["path"], "ident": args["id"], "overwrite": args["overwrite"]}
        return await _work(order, _QUICK, report)

    async def discard(self, args: dict[str, Any], report: Report) -> Any:
        """Remove what was not finished."""
        return await _work({"what": "discard", "path": args["path"], "ident": args["id"]}, _QUICK, report)

    async def read(self, args: dict[str, Any], report: Report) -> Any:
        """Fill a new volume from an export; durable when this returns. Errors: InvalidInput (it is damaged)."""
        target = await self._copies.image(args)
        order = {"what": "read", "path": args["path"], "id": args["id"], "index": args["index"], "target": target.path}
        return await _work(order, _LONG, report, "importing")


async def _work(order: dict[str, Any], deadline: float, report: Report, verb: str = "") -> Any:
    """Let a process carry it out; it is gone when this returns, also when the caller is cancelled.

    Errors: the order's; HostError, DeadlineExceeded.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "atoll.storage.archive",
        str(os.getpid()),
        limit=4 << 20,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    words = asyncio.create_task(process.stderr.read())
    last: dict[str, Any] = {}
    try:
        async with asyncio.timeout(deadline):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            async for line in process.stdout:
                last = json.loads(line)
                if "percent" in last:
                    report(Progress(percent=last["percent"], text=f"{verb} {last['text']}"))
            said = (await words).decode(errors="replace").strip()
            await process.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"the export could not be carried out within {deadline:g} s") from None
    finally:
        words.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await process.wait()
    if "error" in last:
        raise from_wire(last["error"])
    if "result" not in last:
        raise HostError(f"the process of the export ended with code {process.returncode}: {said[-500:]}")
    return last["result"]
