"""Storage that says it is in trouble is given no new volumes, and the error says which check, since when, and what to type."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import check

from atoll.lab.box import Box, simulate
from atoll.model.errors import PoolUnhealthy
from atoll.model.objects import JobState, Pool, Volume
from atoll.model.units import GIB
from atoll.operations import views

NEARFULL = {
    "status": "warning",
    "checks": [{"code": "POOL_NEARFULL", "severity": "warning", "summary": "1 pool(s) nearfull", "details": ["pool 'vms' is nearfull"]}],
    "refusals": [{"code": "POOL_NEARFULL", "reason": "Ceph pool vms is nearly full", "hint": "ceph osd df"}],
}
SETTLING = {
    "status": "warning",
    "refusals": [{"code": "PG_AVAILABILITY", "reason": "8 groups do not work", "hint": "ceph health detail", "grace": 10.0}],
}


async def made() -> Box:
    box = await Box.make()
    await box.do("pool.add", name="vms", driver="rbd", options={"pool": "vms"})
    assert (shown(box)["state"], shown(box)["problem"]) == ("unknown", "it has not been asked yet")
    await asyncio.sleep(10)
    return box


def shown(box: Box) -> Any:
    return views.rows(box.master.state, "pool")[0][0]["health"]


def test_no_new_volumes_while_it_is_nearly_full_and_again_afterwards() -> None:
    async def story() -> None:
        box = await made()
        old = await box.do("volume.create", name="old", pool="vms", size=GIB)
        await box.do("instance.add", name="web", disks=[{"size": GIB}], memory=GIB, template="vms", start=False)
        assert shown(box)["state"] == "ok"
        box.disks.health = NEARFULL
        await asyncio.sleep(10)
        assert (shown(box)["state"], shown(box)["refuses_volumes"]) == ("warning", "Ceph pool vms is nearly full (POOL_NEARFULL)")
        with pytest.raises(PoolUnhealthy, match=r"pool vms takes no new volumes, .* since .*: Ceph pool .* \(POOL_NEARFULL\)"):
            await box.submit("volume.create", name="new", pool="vms", size=GIB)
        with pytest.raises(PoolUnhealthy) as error:
            await box.submit("volume.grow", "old", size=2 * GIB)
        assert error.value.hint == "ceph osd df; then look again: atoll storage status"
        assert error.value.details["check"] == "POOL_NEARFULL"
        for operation, target, request in (
            ("instance.add", "", {"name": "new", "disks": [{"size": GIB}], "memory": GIB, "template": "vms"}),
            ("instance.add-disk", "web", {"disk": {"size": GIB}, "template": "vms"}),
            ("instance.grow-disk", "web", {"index": 0, "size": 2 * GIB}),
        ):
            with pytest.raises(PoolUnhealthy):
                await box.submit(operation, target, **request)
        found = [
            (f.severity, f.what, f.why, (f.since or 0) < 20) for f in await box.master.verify() if f.about == "vms" and "takes no" in f.what
        ]
        assert found == [("error", "pool takes no new volumes", "Ceph pool vms is nearly full (POOL_NEARFULL)", True)]
        # What was made already can go: that is what helps.
        await box.do("volume.delete", old["volume"])
        box.disks.health = {}
        await asyncio.sleep(10)
        await box.do("volume.create", name="new", pool="vms", size=GIB)
        await box.do("volume.grow", "new", size=2 * GIB)
        check(box)
        await box.close()

    simulate(story)


def test_a_job_that_began_before_is_undone_with_the_reason() -> None:
    async def story() -> None:
        box = await made()
        await box.do("volume.create", name="old", pool="vms", size=GIB)
        # Another job has the volume; when this one's turn comes, the storage is in trouble.
        gate = asyncio.Event()

        async def wait(node: str, method: str, phase: str) -> None:
            if (method, phase) == ("grow", "before"):
                await gate.wait()

        box.disks.fault = wait
        first = await box.submit("volume.grow", "old", size=2 * GIB)
        second = await box.submit("volume.grow", "old", size=3 * GIB)
        box.disks.health = NEARFULL
        await asyncio.sleep(10)
        gate.set()
        assert first.job is not None
        assert second.job is not None
        assert (await box.end_of(first.job)).state is JobState.DONE
        ended = await box.end_of(second.job)
        assert (ended.state, ended.error and ended.error["code"]) == (JobState.UNDONE, "pool_unhealthy")
        assert box.master.state.store.find(Volume, "old").size == 2 * GIB
        await box.close()

    simulate(story)


def test_what_is_short_is_borne_and_what_lasts_is_not() -> None:
    async def story() -> None:
        box = await made()
        box.disks.health = SETTLING
        await asyncio.sleep(7)
        assert shown(box)["sample"]["refusals"]
        await box.do("volume.create", name="early", pool="vms", size=GIB)
        await asyncio.sleep(15)
        with pytest.raises(PoolUnhealthy, match="8 groups do not work"):
            await box.submit("volume.create", name="late", pool="vms", size=GIB)
        await box.close()

    simulate(story)


def test_it_is_asked_while_calls_to_it_hang_and_silence_says_so() -> None:
    async def story() -> None:
        box = await made()
        pool = box.master.state.store.find(Pool, "vms")
        box.disks.stalled = {node: {pool.id: "no answer to stat"} for node in box.agents}
        box.disks.health = {"status": "error", "osds": 3, "osds_up": 0}
        await asyncio.sleep(10)
        assert (shown(box)["state"], shown(box)["sample"]["osds_up"]) == ("error", 0)
        box.disks.lost.add(pool.id)
        await asyncio.sleep(10)
        found = shown(box)
        assert found["state"] == "unknown"
        assert "nobody answers" in found["problem"]
        assert found["sample"]["osds"] == 3, "the last that is known stays"
        box.disks.lost.clear()
        box.disks.stalled.clear()
        box.disks.health = {}
        await asyncio.sleep(10)
        assert shown(box)["state"] == "ok"
        await box.do("pool.remove", "vms")
        await asyncio.sleep(10)
        assert not box.master.state.pools_health
        await box.close()

    simulate(story)
