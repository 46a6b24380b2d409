"""Ceph in a simulated cluster: what each node has of it, and what the monitors know. No I/O, so that virtual time stays exact."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from atoll.agent.service import Handler
from atoll.deploy.contract import Facts
from atoll.model.errors import Conflict, HostError, StorageRefused, Unreachable
from atoll.model.messages import Progress
from atoll.rpc.contract import Report
from atoll.runtime.clock import Clock

DISK_SIZE = 8 << 30
EFFECTS = [
    "config",
    "unconfig",
    "client",
    "unclient",
    "mon",
    "unmon",
    "mgr",
    "unmgr",
    "osd",
    "unosd",
    "admit",
    "pool",
    "health",
    "settled",
    "quorum",
    "leavemon",
    "reclient",
    "away",
    "hold",
    "release",
    "stop",
    "start",
    "dismiss",
    "out",
    "in",
    "emptied",
    "unneeded",
    "dropmon",
]
QUESTIONS = ("preflight", "status", "stops", "spare")
#: Virtual seconds for data to move elsewhere.
MOVING = 5.0
#: Called before and after each effect with (node, step, phase); may raise or wait.
CephFault = Callable[[str, str, str], Awaitable[None]]


@dataclass
class BoxNode:
    """What lies and runs on one node. ``running``: names of daemons, such as ``osd.0``."""

    fsid: str = ""
    admin: bool = False
    #: Storage cluster's name -> its fsid, and with what it came.
    clients: dict[str, tuple[str, str]] = field(default_factory=dict)
    mon: str = ""
    mgr: str = ""
    #: Disk -> the uuid of the OSD on it.
    osds: dict[str, str] = field(default_factory=dict)
    #: uuid -> number, as its directory tells.
    numbers: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    #: What else is wrong with it, for preflights.
    problems: list[str] = field(default_factory=list)


@dataclass
class BoxCeph:
    """All of Ceph. ``numbers``: what the monitors know of OSDs; it is gone with the last monitor."""

    clock: Clock
    nodes: dict[str, BoxNode] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    pools: set[str] = field(default_factory=set)
    noout: set[str] = field(default_factory=set)
    #: The monitors (nodes) that count for the majority, whether they run or not.
    monmap: set[str] = field(default_factory=set)
    #: The numbers of OSDs on which nothing is kept.
    out: set[int] = field(default_factory=set)
    #: Why Ceph would say that a last copy is on what is away; empty: it is not.
    needed: list[str] = field(default_factory=list)
    #: Every key that a step was given; none may be found in a journal.
    keys: set[str] = field(default_factory=set)
    #: Why Ceph would say that I/O stops without a node; empty: it would not.
    stops: list[str] = field(default_factory=list)
    #: Node -> seconds by which its clock is ahead.
    skew: dict[str, float] = field(default_factory=dict)
    fault: CephFault | None = None

    def node(self, name: str) -> BoxNode:
        """What a node has."""
        return self.nodes.setdefault(name, BoxNode())

    def monitors(self) -> list[str]:
        """The nodes whose monitors run."""
        return [name for name, node in self.nodes.items() if node.mon and f"mon.{node.mon}" in node.running]


class BoxCephSteps:
    """One node's half."""

    def __init__(self, ceph: BoxCeph, name: str) -> None:
        self._ceph, self._name = ceph, name

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {f"ceph.{step}": self._with_faults(step) for step in (*EFFECTS, *QUESTIONS)}

    def _with_faults(self, step: str) -> Handler:
        do: Handler = {"quorum": self._quorum_of, "in": self._back}.get(step) or getattr(self, f"_{step}")
        if step in QUESTIONS:
            return do

        async def run(args: dict[str, Any], report: Report) -> Any:
            await self._point(step, "before")
            result = await do(args, report)
            await self._point(step, "after")
            return result

        return run

    async def _point(self, step: str, phase: str) -> None:
        if self._ceph.fault is not None:
            await self._ceph.fault(self._name, step, phase)

    @property
    def _here(self) -> BoxNode:
        return self._ceph.node(self._name)

    def _check(self, fsid: str) -> BoxNode:
        if self._here.fsid != fsid:
            raise Conflict("another Ceph cluster is here")
        return self._here

    def _quorum(self) -> None:
        if not self._ceph.monitors():
            raise Unreachable("Ceph's monitors give no answer")

    async def _preflight(self, args: dict[str, Any], report: Report) -> Any:
        here = self._here
        problems = [*here.problems]
        if here.fsid and here.fsid != args["fsid"]:
            problems.append("/etc/ceph/ceph.conf exists")
        if here.fsid and here.fsid == args["fsid"] and here.running and not args.get("there"):
            problems.append("it has daemons already")
        problems += [f"disk {disk} has data of another OSD" for disk in args["disks"] if disk in here.osds]
        now = self._ceph.clock.now() + self._ceph.skew.get(self._name, 0.0)
        facts = Facts(problems=problems, version="16", hostname=self._name, clock=now)
        facts.disks = dict.fromkeys(args["disks"], DISK_SIZE)
        return facts.model_dump(mode="json")

    async def _config(self, args: dict[str, Any], report: Report) -> Any:
        if self._here.fsid not in ("", args["fsid"]):
            raise Conflict("another Ceph cluster is here")
        self._here.fsid = args["fsid"]
        if "admin" in args:
            self._here.admin = bool(args["admin"])
            self._ceph.keys.add(args["admin"])

    async def _unconfig(self, args: dict[str, Any], report: Report) -> Any:
        if self._here.fsid == args["fsid"]:
            self._here.fsid, self._here.admin = "", False

    async def _client(self, args: dict[str, Any], report: Report) -> Any:
        self._here.clients.setdefault(args["name"], (args["fsid"], args["mark"]))
        self._ceph.keys |= set(args["users"].values())

    async def _unclient(self, args: dict[str, Any], report: Report) -> Any:
        if self._here.clients.get(args["name"]) == (args["fsid"], args["mark"]):
            del self._here.clients[args["name"]]

    async def _mon(self, args: dict[str, Any], report: Report) -> Any:
        here = self._check(args["fsid"])
        here.mon = args["id"]
        here.running.add(f"mon.{here.mon}")
        self._ceph.monmap.add(here.mon)
        self._ceph.keys.add(args["key"])

    async def _unmon(self, args: dict[str, Any], report: Report) -> Any:
        here = self._here
        if here.fsid == args["fsid"] and here.mon:
            here.running.discard(f"mon.{here.mon}")
            self._ceph.monmap.discard(here.mon)
            here.mon = ""
            if not any(node.mon for node in self._ceph.nodes.values()):
                self._ceph.numbers.clear()
                self._ceph.users.clear()
                self._ceph.pools.clear()
                self._ceph.noout.clear()

    async def _leavemon(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        await self._unmon(args, report)

    async def _quorum_of(self, args: dict[str, Any], report: Report) -> Any:
        if not set(args["mons"]) <= set(self._ceph.monitors()):
            raise Unreachable("the monitors do not agree")

    async def _reclient(self, args: dict[str, Any], report: Report) -> Any:
        assert self._here.clients[args["name"]][0] == args["fsid"]

    async def _mgr(self, args: dict[str, Any], report: Report) -> Any:
        here = self._check(args["fsid"])
        if self._ceph.users.get(f"mgr.{args['id']}") != args["key"]:
            raise HostError("the manager has another key than the monitors know")
        here.mgr = args["id"]
        here.running.add(f"mgr.{here.mgr}")

    async def _unmgr(self, args: dict[str, Any], report: Report) -> Any:
        if self._here.fsid == args["fsid"]:
            self._here.running.discard(f"mgr.{self._here.mgr}")
            self._here.mgr = ""

    async def _osd(self, args: dict[str, Any], report: Report) -> Any:
        here = self._check(args["fsid"])
        if here.osds.get(args["disk"], args["uuid"]) != args["uuid"]:
            raise Conflict(f"{args['disk']} has data of another OSD")
        if self._ceph.numbers.get(args["uuid"]) != args["number"]:
            raise HostError("the OSD has another number than the monitors know")
        here.osds[args["disk"]] = args["uuid"]
        here.numbers[args["uuid"]] = args["number"]
        here.running.add(f"osd.{args['number']}")
        self._ceph.keys.add(args["key"])

    async def _unosd(self, args: dict[str, Any], report: Report) -> Any:
        here = self._here
        if here.osds.get(args["disk"]) == args["uuid"]:
            here.running.discard(f"osd.{here.numbers.pop(args['uuid'])}")
            del here.osds[args["disk"]]

    async def _admit(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        if not set(args["mons"]) <= set(self._ceph.monitors()):
            raise Unreachable("the monitors do not agree")
        for user in args["users"]:
            self._ceph.users[user["entity"]] = user["key"]
            self._ceph.keys.add(user["key"])
        found = {}
        for osd in args["osds"]:
            free = next(n for n in range(10_000) if n not in self._ceph.numbers.values())
            found[osd["uuid"]] = self._ceph.numbers.setdefault(osd["uuid"], free)
            if args.get("empty"):
                self._ceph.out.add(found[osd["uuid"]])
            self._ceph.keys.add(osd["key"])
        return {"osds": found}

    async def _dismiss(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        for uuid in args.get("osds", ()):
            number = self._ceph.numbers.get(uuid)
            if number is not None:
                assert number in self._ceph.out, f"osd.{number} is purged with what is on it"
                self._ceph.out.discard(number)
            self._ceph.numbers.pop(uuid, None)
        self._ceph.noout -= set(args["hosts"])
        for name in args.get("mgrs", ()):
            self._ceph.users.pop(f"mgr.{name}", None)

    async def _pool(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.pools.add(args["pool"])

    async def _health(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        return {"health": "HEALTH_OK", "checks": []}

    async def _settled(self, args: dict[str, Any], report: Report) -> Any:
        return await self._health(args, report)

    async def _status(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        return {"health": "HEALTH_OK", "checks": [], "quorum": sorted(self._ceph.monitors())}

    async def _stops(self, args: dict[str, Any], report: Report) -> Any:
        there = [name for name, node in self._ceph.nodes.items() if node.mon]
        left = set(self._ceph.monitors()) - set(args["mons"])
        few = ["not enough monitors would be left"] if args["mons"] and len(left) * 2 <= len(there) else []
        return {"stops": [*self._ceph.stops, *few]}

    async def _hold(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.noout.add(args["host"])

    async def _release(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.noout.discard(args["host"])

    async def _away(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()

    async def _stop(self, args: dict[str, Any], report: Report) -> Any:
        self._here.running -= set(args["daemons"])

    async def _start(self, args: dict[str, Any], report: Report) -> Any:
        self._check(args["fsid"])
        self._here.running |= set(args["daemons"])

    async def _spare(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        run = {daemon for node in self._ceph.nodes.values() for daemon in node.running}
        found = [f"osd.{number} still answers Ceph" for number in args["osds"] if args["dead"] and f"osd.{number}" in run]
        left = set(self._ceph.monitors()) - set(args["mons"])
        few = ["too few monitors would be left"] if args["mons"] and len(left) * 2 <= len(self._ceph.monmap - set(args["mons"])) else []
        return {"stops": [*found, *few, *self._ceph.needed]}

    async def _out(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.out |= set(args["osds"])

    async def _back(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.out -= set(args["osds"])

    async def _emptied(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        assert set(args["osds"]) <= self._ceph.out
        report(Progress(percent=50.0, text="12 copies of objects have to move yet"))
        await asyncio.sleep(MOVING)
        return {"health": "HEALTH_OK"}

    async def _unneeded(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        if self._ceph.needed:
            raise StorageRefused("; ".join(self._ceph.needed))

    async def _dropmon(self, args: dict[str, Any], report: Report) -> Any:
        self._quorum()
        self._ceph.monmap.discard(args["id"])
        for node in self._ceph.nodes.values():
            # Its process ends by itself.
            node.running.discard(f"mon.{args['id']}")
        if not set(args["left"]) <= set(self._ceph.monitors()):
            raise Unreachable("the monitors do not agree")
