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
