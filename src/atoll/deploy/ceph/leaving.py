"""What is asked of the whole Ceph cluster while OSDs and monitors leave it for good: no last copy goes, and the majority stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from atoll.deploy.ceph.admin import Command, ask, command, look, until
from atoll.deploy.ceph.cluster import checks
from atoll.model.errors import DeadlineExceeded, HostError, StorageRefused, Unreachable
from atoll.model.messages import Progress

Report = Callable[[Progress], None]
#: States of placement groups that may need what is on OSDs that are away: nothing may be given up for good then.
NEEDY = frozenset({"down", "incomplete", "unknown", "stale", "recovery_unfound", "backfill_unfound"})
#: Seconds for Ceph to see that daemons are gone, and for placement groups to find each other then.
NOTICE, PEERING = 45.0, 45.0
#: Seconds without any data having moved after which moving it has failed; and between looks.
STUCK, PAUSE = 600.0, 1.0
#: How full Ceph lets OSDs become before it complains.
NEARFULL = 0.85


async def spare(args: dict[str, Any], report: Report) -> Any:
    """What stands against these daemons' leaving for good, in words. ``dead``: they are said to be gone already. Nothing is changed."""
    osds = set(args["osds"])
    found = await _still_there(osds, set(args["mons"]), report) if args["dead"] else []
    if not found:
        found = await _needed(report)
    if not args["dead"] and osds and not found:
        found = await _no_room(osds)
    for name in args["mons"]:
        try:
            await ask(Command("mon ok-to-rm", {"id": name}))
        except StorageRefused as error:
            if name in await _monitors():
                found.append(error.message)
    return {"stops": found}


async def _still_there(osds: set[int], mons: set[str], report: Report) -> list[str]:
    """Daemons that are said to be gone and are not."""
    found = []
    report(Progress(text="waiting until Ceph misses its daemons"))
    if osds:
        try:
            await until("osd dump", lambda a: not any(osd["up"] for osd in a["osds"] if osd["osd"] in osds), "they count as down", NOTICE)
        except DeadlineExceeded:
            up = sorted(osd["osd"] for osd in (await look("osd dump"))["osds"] if osd["up"] and osd["osd"] in osds)
            found.append(f"{', '.join(f'osd.{number}' for number in up)} still answers Ceph")
    if mons:
        try:
            await until("quorum_status", lambda a: not mons & set(a["quorum_names"]), "they left the quorum", NOTICE)
        except DeadlineExceeded:
            found.append(f"the monitor {', '.join(sorted(mons))} still answers Ceph")
    return found


async def _needed(report: Report) -> list[str]:
    """Placement groups that cannot be read: their last copy may be what is away."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PEERING
    while True:
        states = (await look("status"))["pgmap"].get("pgs_by_state", [])
        found = [
            f"{state['count']} placement groups are {state['state_name']}: what is away may have the last copy of their data"
            for state in states
            if NEEDY & set(state["state_name"].split("+"))
        ]
        if not found or loop.time() > end:
            return found
        report(Progress(text=found[0]))
        await asyncio.sleep(PAUSE)


async def _no_room(osds: set[int]) -> list[str]:
    rows = (await _manager("osd df"))["nodes"]
    moves = sum(row.get("kb_used_data", row["kb_used"]) for row in rows if row["id"] in osds)
    room = sum(max(0, int(row["kb"] * NEARFULL) - row["kb_used"]) for row in rows if row["id"] not in osds and row.get("status") == "up")
    if moves <= room:
        return []
    return [f"{moves >> 10} MiB would have to move, and the others have room for {room >> 10} MiB until they count as nearly full"]


async def _manager(prefix: str, **words: Any) -> Any:
    return json.loads((await ask(Command(prefix, words, manager=True)))[0])


async def _monitors() -> set[str]:
    return {mon["name"] for mon in (await look("quorum_status"))["monmap"]["mons"]}


async def out(args: dict[str, Any], report: Report) -> Any:
    """Ceph shall keep nothing on these OSDs any more; it moves what they have."""
    await ask(command("osd out", ids=[str(number) for number in args["osds"]]))


async def back(args: dict[str, Any], report: Report) -> Any:
    """Ceph keeps data on these OSDs again, also on new ones."""
    names = [f"osd.{number}" for number in args["osds"]]
    await ask(
        Command("osd unset-group", {"flags": "noin", "who": names}),
        command("osd in", ids=[str(number) for number in args["osds"]]),
    )


async def emptied(args: dict[str, Any], report: Report) -> Any:
    """Until all data lies elsewhere in all its copies. Errors: HostError when nothing has moved for ten minutes."""
    loop = asyncio.get_running_loop()
    first = least = 0
    since, why = loop.time(), "no answer yet"
    while True:
        try:
            said = await look("status")
            pgs = said["pgmap"]
            good = sum(s["count"] for s in pgs["pgs_by_state"] if s["state_name"].startswith("active+clean"))
            objects = pgs.get("misplaced_objects", 0) + pgs.get("degraded_objects", 0)
            left = objects + pgs["num_pgs"] - good
            if not left and await _safe(args["osds"]):
                return {"health": said["health"]["status"]}
            first = max(first, left)
            if not least or left < least:
                least, since = left, loop.time()
            speed = pgs.get("recovering_bytes_per_sec", 0)
            why = f"{objects} copies of objects have to move yet; {good} of {pgs['num_pgs']} placement groups are clean"
            report(Progress(percent=100 * (1 - left / first) if first else None, text=f"{why}{f'; {speed >> 20} MiB/s' if speed else ''}"))
        except (Unreachable, DeadlineExceeded) as error:
            why = error.message
        if loop.time() > since + STUCK:
            raise HostError(
                f"nothing has moved for {STUCK / 60:.0f} minutes: {why}; Ceph says: {await _complaints()}",
                hint="atoll storage status STORAGE",
            )
        await asyncio.sleep(PAUSE)


async def _complaints() -> str:
    try:
        found = await look("health", detail="detail")
    except (Unreachable, DeadlineExceeded) as error:
        return error.message
    return "; ".join(checks(found)) or found["status"]


async def _safe(osds: list[int]) -> bool:
    """Whether Ceph lets these go without anything being lost, whatever fails next."""
    try:
        await ask(Command("osd safe-to-destroy", {"ids": [str(number) for number in osds]}, manager=True))
    except (StorageRefused, Unreachable, DeadlineExceeded, HostError):
        # It moves on, or the manager that would know is away: asked again.
        return False
    return True


async def unneeded(args: dict[str, Any], report: Report) -> Any:
    """That no placement group misses its last copy, for OSDs whose data has nowhere to go yet. Errors: StorageRefused."""
    if found := await _needed(report):
        raise StorageRefused("; ".join(found))


async def drop_mon(args: dict[str, Any], report: Report) -> Any:
    """The others go on without this monitor; not known is success. Errors: StorageRefused when they would be too few."""
    name = args["id"]
    if name in await _monitors():
        await ask(Command("mon ok-to-rm", {"id": name}), command("mon rm", name=name))
    wanted = set(args["left"])
    await until(
        "quorum_status",
        lambda a: name not in a["quorum_names"] and wanted <= set(a["quorum_names"]),
        f"{', '.join(sorted(wanted))} agree without {name}",
        120.0,
    )
