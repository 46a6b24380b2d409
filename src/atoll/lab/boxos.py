"""OS definitions of a simulated node: as agent.osscripts, without processes. A script dies with its agent."""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.agent.service import Handler
from atoll.lab.boxstorage import SharedDisks
from atoll.model.errors import HostError, NotFound
from atoll.model.messages import Progress
from atoll.rpc.contract import Report

#: Virtual seconds that a script takes, in parts between which everything is looked at.
PARTS, PART = 4, 0.25


class BoxOs:
    """Handlers of ``os.*`` for one node. Every node has the definition ``noop``; that of ``broken`` fails."""

    def __init__(self, disks: SharedDisks, node: str) -> None:
        self._disks, self._node = disks, node
        self._killed: set[str] = set()

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"os.list": self.list_all, "os.check": self.check, "os.run": self.run, "os.unrun": self.unrun}

    async def list_all(self, args: dict[str, Any], report: Report) -> Any:
        return [
            {
                "name": name,
                "path": f"/srv/ganeti/os/{name}",
                "versions": [20],
                "variants": [],
                "parameters": {"suite": "which one"},
                "scripts": ["create", "rename"],
                "problems": [],
            }
            for name in sorted(self._disks.definitions.get(self._node, {"broken", "noop"}))
        ]

    async def check(self, args: dict[str, Any], report: Report) -> Any:
        if args["os"] not in self._disks.definitions.get(self._node, {"broken", "noop"}):
            raise NotFound(f"there is no OS definition {args['os']} on this node", hint="atoll os diagnose")
        return {"version": 20}

    async def run(self, args: dict[str, Any], report: Report) -> Any:
        await self._disks.strike(self._node, "os.run", "before")
        spec, disks = args["spec"], self._disks
        instance = spec["instance"]
        others = [node for node, other in disks.scripts if other == instance]
        disks.world.violations += [f"two scripts for {spec['name']}: on {node} and {self._node}" for node in others]
        disks.scripts[self._node, instance] = args["action"]
        try:
            for part in range(PARTS):
                await asyncio.sleep(PART)
                if instance in self._killed:
                    self._killed.discard(instance)
                    raise HostError("the script was killed")
                for disk in spec["disks"]:
                    if disks.mapped.get((self._node, disk["volume"])) != disk["mode"]:
                        disks.world.violations.append(f"the script of {spec['name']} on {self._node} writes what is not mapped")
                disks.look()
                report(Progress(percent=100.0 * part / PARTS, text=f"{args['action']}: part {part}"))
            if args["os"] == "broken":
                raise HostError(f"the {args['action']} script of OS broken failed with code 1: it is broken")
            for images in disks.images.values():
                for image in images.values():
                    if image["volume"] in [disk["volume"] for disk in spec["disks"] if disk["mode"] == "rw"]:
                        image["content"] = f"{args['action']} {args['os']} {spec['name']}"
        finally:
            del disks.scripts[self._node, instance]
        await self._disks.strike(self._node, "os.run", "after")
        return {"log": "/var/log/atoll/os/noop.log"}

    async def unrun(self, args: dict[str, Any], report: Report) -> Any:
        if args.get("kill") and (self._node, args["instance"]) in self._disks.scripts:
            self._killed.add(args["instance"])
            await asyncio.sleep(2 * PART)
        if (self._node, args["instance"]) in self._disks.scripts:
            raise HostError("an earlier script still runs")
