"""What a monitor's node asks of the whole Ceph cluster: who may come, the pool, health."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Callable
from typing import Any

from atoll.deploy.ceph.admin import Command, ask, command, look, until
from atoll.deploy.ceph.conf import keyring
from atoll.model.errors import DeadlineExceeded, StorageRefused, Unreachable
from atoll.model.messages import Progress

Report = Callable[[Progress], None]
#: Seconds for a cluster whose data is all right to say HEALTH_OK: some checks look now and then only.
QUIET = 20.0
#: Seconds for a manager that has only begun to hear from all OSDs.
LEARNING = 45.0


async def admit(args: dict[str, Any], report: Report) -> Any:
    """When the monitors agree: users with their keys, and a number for each OSD. Errors: DeadlineExceeded."""
    wanted = set(args["mons"])

    def tell(answer: Any) -> None:
        report(Progress(text=f"monitors that agree: {', '.join(answer['quorum_names'])} of {', '.join(sorted(wanted))}"))

    await until("quorum_status", lambda a: wanted <= set(a["quorum_names"]), f"{', '.join(sorted(wanted))} agree", 120.0, tell)
    commands = [command("auth import", input=keyring(user["entity"], user["key"], user["caps"])) for user in args["users"]]
    commands += [command("osd new", input=json.dumps({"cephx_secret": osd["key"]}), uuid=osd["uuid"]) for osd in args["osds"]]
    answers = await ask(*commands, deadline=60.0)
    numbers = [json.loads(answer)["osdid"] for answer in answers[len(args["users"]) :]]
    if args.get("empty") and numbers:
        # Nothing is put on them until the job cannot be undone any more: its undo erases their disks.
        await ask(Command("osd set-group", {"flags": "noin", "who": [f"osd.{number}" for number in numbers]}))
    return {"osds": {osd["uuid"]: number for osd, number in zip(args["osds"], numbers, strict=True)}}


async def make_pool(args: dict[str, Any], report: Report) -> Any:
    """A pool for RBD with a rule of its own; there already is success. Errors: DeadlineExceeded (the OSDs do not come up)."""

    def up(answer: Any) -> bool:
        report(Progress(text=f"OSDs that are up: {answer['num_up_osds']} of {args['osds']}"))
        return bool(answer["num_up_osds"] >= args["osds"])

    await until("osd stat", up, f"all {args['osds']} OSDs are up", 240.0)
    pool, rule = args["pool"], f"atoll-{args['domain']}"
    make = {"pool": pool, "pg_num": args["pg_num"], "pgp_num": args["pg_num"], "pool_type": "replicated", "rule": rule}
    sure: dict[str, Any] = {"yes_i_really_mean_it": True} if args["size"] == 1 else {}
    await ask(
        command("osd crush rule create-replicated", name=rule, root="default", type=args["domain"]),
        command("osd pool create", **make),
        command("osd pool set", pool=pool, var="size", val=str(args["size"]), **sure),
        command("osd pool set", pool=pool, var="min_size", val=str(args["min_size"])),
        command("osd pool application enable", pool=pool, app="rbd"),
        pool=pool,
        deadline=120.0,
    )


async def wait_health(args: dict[str, Any], report: Report) -> Any:
    """When all data is where it shall be: Ceph's health, and the checks that it is not content with. Errors: DeadlineExceeded."""

    def clean(answer: Any) -> bool:
        pgs, osds = answer["pgmap"], answer["osdmap"]
        good = sum(state["count"] for state in pgs["pgs_by_state"] if state["state_name"].startswith("active+clean"))
        report(Progress(text=f"placement groups that are clean: {good} of {pgs['num_pgs']}"))
        ready = answer["mgrmap"]["available"] and osds["num_up_osds"] >= args["osds"]
        return bool(ready and pgs["num_pgs"] and good == pgs["num_pgs"])

    await until("status", clean, "all placement groups are active and clean", 300.0)
    loop = asyncio.get_running_loop()
    end = loop.time() + QUIET
    while True:
        found = await look("health", detail="detail")
        if found["status"] == "HEALTH_OK" or loop.time() > end:
            return {"health": found["status"], "checks": checks(found)}
        report(Progress(text=f"{found['status']}: {'; '.join(checks(found)) or 'no reason given'}"))
        await asyncio.sleep(0.5)


def checks(health: dict[str, Any]) -> list[str]:
    """What Ceph is not content with, in its words."""
    return [f"{name}: {check['summary']['message']}" for name, check in sorted(health.get("checks", {}).items())]


async def status(args: dict[str, Any], report: Report) -> Any:
    """Health, monitors, managers, OSDs, use. Errors: Unreachable (no monitor answers)."""
    said, health, tree, df = (
        json.loads(text)
        for text in await ask(command("status"), command("health", detail="detail"), command("osd tree"), command("df"), deadline=30.0)
    )
    osds = [{"osd": item["name"], "status": item["status"], "host": parent["name"]} for parent in tree["nodes"] if parent["type"] == "host"
            for item in tree["nodes"] if item["id"] in parent.get("children", ())]  # fmt: skip
    return {
        "health": health["status"],
        "checks": checks(health),
        "quorum": said["quorum_names"],
        "monitors": said["monmap"]["num_mons"],
        "manager": said["mgrmap"]["available"],
        "osds": osds,
        "osds_up": said["osdmap"]["num_up_osds"],
        "osds_in": said["osdmap"]["num_in_osds"],
        "placement_groups": {state["state_name"]: state["count"] for state in said["pgmap"]["pgs_by_state"]},
        "total": df["stats"]["total_bytes"],
        "free": df["stats"]["total_avail_bytes"],
    }


async def stops(args: dict[str, Any], report: Report) -> Any:
    """What would stop for clients if these daemons did: Ceph's own words, or why it cannot tell. Nothing is changed."""
    found = []
    for daemons, asked in (
        (args["osds"], Command("osd ok-to-stop", {"ids": [str(number) for number in args["osds"]]}, manager=True)),
        (args["mons"], Command("mon ok-to-stop", {"ids": args["mons"]})),
    ):
        try:
            if daemons:
                await _known(asked)
        except StorageRefused as error:
            found.append(error.message)
        except (Unreachable, DeadlineExceeded) as error:
            found.append(f"Ceph does not tell whether it would: {error.message}")
    return {"stops": found}


async def _known(asked: Command) -> None:
    """Ask, again while a manager that has only begun does not know yet. Errors: StorageRefused, and those of asking."""
    loop = asyncio.get_running_loop()
    end = loop.time() + LEARNING
    while True:
        try:
            await ask(asked, deadline=30.0)
            return
        except StorageRefused as error:
            if error.details.get("errno") != errno.EAGAIN or loop.time() > end:
                raise
        await asyncio.sleep(0.5)


async def hold(args: dict[str, Any], report: Report) -> Any:
    """The node's OSDs count as coming back: their data is not copied elsewhere meanwhile."""
    await ask(Command("osd set-group", {"flags": "noout", "who": [args["host"]]}))


async def release(args: dict[str, Any], report: Report) -> Any:
    """They count as others do again."""
    await ask(Command("osd unset-group", {"flags": "noout", "who": [args["host"]]}))


async def away(args: dict[str, Any], report: Report) -> Any:
    """Until the others have noticed that these daemons are gone: whoever asks then what more may stop gets a true answer."""
    mons, osds = set(args["mons"]), set(args["osds"])
    if mons:
        await until("quorum_status", lambda a: not mons & set(a["quorum_names"]), f"{', '.join(sorted(mons))} left the quorum", 60.0)

    def down(answer: Any) -> bool:
        return not any(osd["up"] for osd in answer["osds"] if osd["osd"] in osds)

    if osds:
        await until("osd dump", down, "its OSDs count as down", 60.0)


async def quorum(args: dict[str, Any], report: Report) -> Any:
    """Until these monitors agree."""
    wanted = set(args["mons"])
    await until("quorum_status", lambda a: wanted <= set(a["quorum_names"]), f"{', '.join(sorted(wanted))} agree", 150.0)


async def settled(args: dict[str, Any], report: Report) -> Any:
    """Until these OSDs are up; Ceph brings data to them while clients go on. Gives what ``health`` gives."""
    wanted = set(args["osds"])
    await until("osd dump", lambda a: wanted <= {osd["osd"] for osd in a["osds"] if osd["up"]}, "its OSDs are up", 240.0)
    found = await look("health", detail="detail")
    return {"health": found["status"], "checks": checks(found)}


async def dismiss(args: dict[str, Any], report: Report) -> Any:
    """OSDs, managers and hosts that the monitors shall forget; not known is success. The daemons must have been stopped.

    Errors: DeadlineExceeded when an OSD still counts as up.
    """
    uuids = set(args["osds"])
    if uuids:

        def down(answer: Any) -> bool:
            return not any(osd["up"] for osd in answer["osds"] if osd["uuid"] in uuids)

        dump = await until("osd dump", down, "its OSDs count as down", 90.0)
        numbers = [osd["osd"] for osd in dump["osds"] if osd["uuid"] in uuids]
        await ask(*(Command("osd purge-actual", {"id": number, "yes_i_really_mean_it": True}) for number in numbers))
    for name in args["mgrs"]:
        await ask(command("auth rm", entity=f"mgr.{name}"))
    for host in args["hosts"]:
        try:
            # It may have been offline: what was said of it then goes, too.
            await ask(Command("osd unset-group", {"flags": "noout", "who": [host]}))
        except StorageRefused as error:
            if error.details.get("errno") not in (errno.EINVAL, errno.ENOENT):
                raise
        try:
            await ask(command("osd crush rm", name=host))
        except StorageRefused as error:
            # It has other OSDs, or was never there.
            if error.details.get("errno") not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
