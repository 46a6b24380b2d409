"""Every finding of ``cluster verify`` that no other test makes happen: it is there when its cause is, and gone with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import running, settle

from atoll.api.leader import Finding
from atoll.lab.box import NODE_MEMORY, Box, simulate
from atoll.model.objects import Claim, Disk, Group, Hold, Instance, Job, JobState, Migration, Node, Pool, Stored, Volume, VolumeState
from atoll.model.units import GIB


async def quiet() -> Box:
    box = await Box.make()
    await box.add_pool()
    await running(box)
    await box.do("volume.create", name="data", pool="shared", size=GIB)
    await asyncio.sleep(30)
    assert await box.master.verify() == []
    return box


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    assert found[0].commands
    assert all("  " not in command for command in found[0].commands)
    return found[0]


async def spoil(box: Box, *put: Stored, delete: tuple[Stored, ...] = ()) -> list[Finding]:
    await box.master.state.store.write(put=list(put), delete=list(delete))
    return await box.master.verify()


def test_a_hold_that_has_outlived_its_job_is_found_and_the_next_master_drops_it() -> None:
    async def story() -> None:
        box = await quiet()
        ended = max(job.number for job in box.master.state.store.all(Job) if job.state is JobState.DONE)
        found = await spoil(box, *(Hold(id=f"volume:vol-{n}", job=n, reason="x", commands=()) for n in (ended, 10**6)))
        mine = [f for f in found if f.what == "a hold has outlived its job"]
        words = {f.about: f.why.split(";")[0] for f in mine}
        assert words == {f"volume:vol-{ended}": f"job {ended} is done", "volume:vol-1000000": "job 1000000 is forgotten"}
        await box.crash_master()
        await box.boot_master()
        await asyncio.sleep(10)
        assert await box.master.verify() == []
        assert not box.master.state.store.all(Hold)
        await box.close()

    simulate(story)


def test_records_that_fit_nothing() -> None:
    async def story() -> None:
        box = await quiet()
        store = box.master.state.store
        web, data = store.find(Instance, "web1"), store.find(Volume, "data")
        first = store.require(Volume, web.disks[0].volume)
        claim = store.require(Claim, web.id)
        nobody = "i-" + "9" * 17

        async def expect(
            what: str, about: str, why: str, *put: Stored, delete: tuple[Stored, ...] = (), back: tuple[Stored, ...] = ()
        ) -> None:
            # At once, without a moment for the loops to act on it.
            found = [f for f in await spoil(box, *put, delete=delete) if f.what == what]
            assert only(found).about == about
            assert why in found[0].why
            new = [item for item in put if item.id not in {kept.id for kept in back}]
            await store.write(put=list(back), delete=[store.require(type(item), item.id) for item in new])

        await expect("a claim of nothing", nobody, "no such instance", Claim(id=nobody))
        moved = claim.model_copy(update={"migration": Migration(target=box.nodes["node2"], job=10**6)})
        await expect("a migration that nobody works on", "web1", "job 1000000", moved, back=(claim,))
        await expect("a claim on no node", "web1", "node-gone", claim.model_copy(update={"holder": "node-gone"}), back=(claim,))
        more = web.model_copy(update={"disks": (*web.disks, Disk(volume="vol-" + "9" * 17, slot=5))})
        await expect("a disk without a volume", "web1", "disk 2", more, back=(web,))
        theirs = web.model_copy(update={"disks": (*web.disks, Disk(volume=data.id, slot=5))})
        await expect("a disk of two minds", "web1", "nobody", theirs, back=(web,))
        await expect("an instance of no group", "web1", "group-x", web.model_copy(update={"group": "group-x"}), back=(web,))
        fits = "a volume that fits nothing"
        await expect(fits, "data", "no record", data.model_copy(update={"instance": nobody, "state": VolumeState.IN_USE}), back=(data,))
        claimed = data.model_copy(update={"instance": web.id, "state": VolumeState.IN_USE})
        await expect(fits, "data", "does not have it", claimed, back=(data,))
        await expect(fits, "data", "in-use", data.model_copy(update={"state": VolumeState.IN_USE}), back=(data,))
        await expect(fits, "data", "pool-x", data.model_copy(update={"pool": "pool-x"}), back=(data,))
        await expect(fits, "data", "node-x", data.model_copy(update={"node": "node-x"}), back=(data,))
        await expect("volume names are not unique", "data", first.id, first.model_copy(update={"name": "data"}), back=(first,))
        assert await box.master.verify() == []
        await box.close()

    simulate(story)


def test_what_was_left_behind_on_nodes() -> None:
    async def story() -> None:
        box = await quiet()
        store = box.master.state.store
        web, data = store.find(Instance, "web1"), store.find(Volume, "data")
        worker, file = {"pid": 73, "state": "D", "key": "x"}, "/box/shared/x.raw (deleted)"
        by_hand, loop = f"{web.id}.by-hand", "a loop device has an image open"
        cases: list[tuple[dict[str, Any], str, str, str]] = [
            ({"exports": {data.id: 71}}, "an export was left behind", "data on node2", "on node2: kill 71"),
            ({"watchdogs": {web.id: 72}}, "a watchdog was left behind", "web1 on node2", "on node2: kill 72"),
            ({"workers": [worker]}, "a storage worker was left behind", "x on node2", "on node2: dmesg | tail"),
            ({"attached": {web.id: ["v"]}}, "attached without its guest", "web1 on node2", "atoll instance info web1"),
            ({"attached": {by_hand: ["v"]}}, "disks are activated by hand", "web1 on node2", "atoll instance deactivate-disks web1"),
            ({"loops": {"loop7": file}}, loop, "loop7 on node2", "on node2: losetup -d /dev/loop7"),
        ]
        for seen, what, about, command in cases:
            box.disks.remains["node2"] = seen
            finding = only(await box.master.verify())
            assert (finding.what, finding.about, finding.commands[0]) == (what, about, command)
        box.disks.remains["node2"] = {"attached": {"i-" + "9" * 17: ["v"]}}
        assert only(await box.master.verify()).what == "attached for nobody"
        # What belongs there is none: the guest's own disks where it runs, other people's loop devices.
        box.disks.remains = {"node1": {"attached": {web.id: ["v"]}}, "node2": {"loops": {"loop1": "/srv/other.img"}}}
        assert await box.master.verify() == []
        await box.close()

    simulate(story)


def test_an_export_that_a_job_needs_is_not_left_behind() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool("local", "file")
        await box.do("instance.add", name="web1", disks=[{"size": GIB}], memory=GIB, node="node1", template="local", start=False)
        volume = box.master.state.store.find(Instance, "web1").disks[0].volume
        number = (await box.submit("instance.move", "web1", node="node2")).job
        assert number is not None
        for _ in range(1000):
            if box.disks.served:
                break
            await asyncio.sleep(0.05)
        assert box.disks.served
        box.disks.remains["node2"] = {"exports": {volume: 71}}
        assert not [f for f in await box.master.verify() if "left behind" in f.what]
        await box.end_of(number)
        assert [f.what for f in await box.master.verify()] == ["an export was left behind"]
        await box.close()

    simulate(story)


@pytest.mark.parametrize(
    ("free", "what", "severity"),
    [
        (0.02, "pool is nearly full", "error"),
        (0.08, "pool has little room", "warning"),
        (0.5, "pool promises more than it has", "info"),
    ],
)
def test_a_pools_room(free: float, what: str, severity: str) -> None:
    async def story() -> None:
        box = await quiet()
        pool = box.master.state.store.find(Pool, "shared")
        # The images take next to nothing of what they may: they are sparse.
        box.disks.capacity = 3 * GIB
        box.disks.taken[pool.id] = round(3 * GIB * (1 - free)) - 4 * GIB
        await asyncio.sleep(30)
        finding = only(await box.master.verify())
        assert (finding.what, finding.severity, finding.about) == (what, severity, "shared")
        assert "3 volumes may take 4G" in finding.why
        await box.close()

    simulate(story)


def test_guests_that_would_not_fit_elsewhere() -> None:
    async def story() -> None:
        box = await quiet()
        for number in range(3):
            memory = NODE_MEMORY - 4 * GIB
            where = {"node": f"node{number + 1}", "template": "shared"}
            await box.do("instance.add", name=f"big{number}", disks=[{"size": GIB}], memory=memory, **where)
        await asyncio.sleep(5)
        found = [f for f in await box.master.verify() if f.what == "no room if the node fails"]
        assert [(f.about, f.severity) for f in found] == [("node1", "warning"), ("node2", "warning"), ("node3", "warning")]
        assert "1 of its 2 instances, such as big0" in found[0].why
        await box.do("instance.stop", "big2", timeout=1.0)
        await box.do("instance.stop", "big1", timeout=1.0)
        await asyncio.sleep(5)
        assert await box.master.verify() == []
        await box.close()

    simulate(story)


def test_a_pool_that_differs_between_nodes_or_was_copied_below_its_mount() -> None:
    async def story() -> None:
        box = await quiet()
        pool = box.master.state.store.find(Pool, "shared")
        box.disks.fstypes["node3", pool.id] = "ext4"
        finding = only(await box.master.verify())
        assert (finding.what, finding.severity) == ("pool differs between nodes", "error")
        assert finding.why.startswith("box on node1, node2; ext4 on node3")
        box.disks.fstypes.clear()
        box.disks.marked_on["node2"] = "nfs4"
        finding = only(await box.master.verify())
        assert (finding.what, finding.about) == ("pool is on another file system", "shared on node2")
        box.disks.marked_on.clear()
        # One that was made before this was refused.
        options = {**pool.options, "path": "/var/lib/atoll/images/pool"}
        await box.master.state.store.write(put=[pool.model_copy(update={"options": options})])
        assert only(await box.master.verify()).what == "pool can be read by operators"
        await box.close()

    simulate(story)


def test_a_pool_that_guests_may_not_enter_any_more() -> None:
    async def story() -> None:
        box = await quiet()
        box.disks.unfit["node2"] = "guests may not enter"
        finding = only(await box.master.verify())
        assert (finding.what, finding.about) == ("pool cannot be used on a node", "shared on node2")
        assert finding.commands == ("atoll pool check shared", "on node2: chmod a+x /box")
        await box.close()

    simulate(story)


def test_a_node_that_is_not_ready() -> None:
    async def story() -> None:
        box = await quiet()
        node = box.master.state.store.find(Node, "node2")
        # Its heartbeats do not arrive, or it would be welcomed at once.
        found = await spoil(box, node.model_copy(update={"ready": False}))
        assert [(f.what, f.about) for f in found] == [("node is not ready", "node2")]
        await settle(box)
        assert await box.master.verify() == []
        assert box.master.state.store.all(Group)
        await box.close()

    simulate(story)


def test_every_node_looks_at_itself_and_nodes_are_compared() -> None:
    async def story() -> None:
        box = await quiet()
        pool = box.master.state.store.find(Pool, "shared")
        facts = box.master.facts(box.nodes["node2"])
        assert (facts["node"], [ref["id"] for ref in facts["pools"]], len(facts["peers"])) == ("node2", [pool.id], 3)

        def answer(kind: str) -> Any:
            async def look(args: dict[str, Any], report: Any) -> dict[str, Any]:
                found = [{"level": "ok", "about": "kernel", "what": "6.1", "why": "", "commands": []}]
                return {"findings": found, "pools": {pool.id: {"mount": "/box", "file system": kind}}}

            return look

        async def logs(args: dict[str, Any], report: Any) -> dict[str, str]:
            return {"agent.log": "x"}

        for name, kind in (("node1", "nfs4"), ("node2", "ext4")):
            box.agents[name].service._handlers["node.look"] = answer(kind)
        box.agents["node1"].service._handlers["node.logs"] = logs
        await box.crash_agent("node3")
        found = [(f["node"], f["level"], f["about"]) for f in await box.master.doctor()]
        assert found == [("all", "error", "pool shared"), ("node3", "error", "agent"), ("node1", "ok", "kernel"), ("node2", "ok", "kernel")]
        assert await box.master.logs(box.nodes["node1"]) == {"agent.log": "x"}
        await box.close()

    simulate(story)
