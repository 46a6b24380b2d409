"""The daily story in one process with virtual time."""

from __future__ import annotations

import asyncio

from atoll.lab.box import Box, simulate
from atoll.model.objects import Claim, Instance, Volume
from atoll.model.units import GIB


def test_daily_story() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await box.do("instance.add", name="web1", disks=[{"size": 10 * GIB}], memory=1 * GIB)
        store = box.master.state.store
        web1 = store.find(Instance, "web1")
        first = store.require(Claim, web1.id).holder
        moved = await box.do("instance.migrate", "web1")
        claim = store.require(Claim, web1.id)
        assert claim.holder != first
        assert claim.migration is None
        assert moved["node"]
        await box.do("instance.grow-disk", "web1", index=0, increment=1 * GIB)
        await box.do("instance.add-disk", "web1", disk={"size": GIB})
        await box.do("instance.detach-disk", "web1", index=1)
        await box.do("instance.stop", "web1")
        assert store.require(Claim, web1.id).holder is None
        await box.do("instance.start", "web1")
        holder = next(n for n, i in box.nodes.items() if i == store.require(Claim, web1.id).holder)
        await box.power_cut(holder)
        await asyncio.sleep(10)
        await box.do("instance.failover", "web1", node_is_dead=True)
        assert not box.world.violations
        await box.do("instance.remove", "web1", timeout=1.0)
        assert not store.all(Instance)
        assert [v.name for v in store.all(Volume)] == ["web1-disk1"]
        await box.close()

    simulate(story)


def test_a_guest_that_takes_long_to_power_off_is_no_trouble() -> None:
    """An order is repeated each half minute until it has been carried out; what is said meanwhile must not sound like a fault."""

    async def run() -> None:
        box = await Box.make()
        await box.add_pool("shared", "sharedfile")
        await box.do("instance.add", name="web1", disks=[{"size": GIB}], node="node1")
        (guest,) = box.world.guests.values()
        guest.spec = guest.spec.model_copy(update={"boot": guest.spec.boot.model_copy(update={"append": "acpi=off"})})
        number = (await box.submit("instance.stop", "web1", timeout=75.0)).job
        assert number is not None
        said: list[str] = []
        while box.master.engine.job(number).state.active:
            text = box.master.engine.progress(number).text
            if text not in said[-1:]:
                said.append(text)
            await asyncio.sleep(0.1)
        assert (await box.end_of(number)).state == "done"
        assert [text for text in said if "still at work" in text] == [f"guest.stop is still at work after {n} s" for n in (30, 60)]
        assert not [text for text in said if "again" in text]
        await box.close()

    simulate(run)
