"""Pools whose storage is not there when they are added; starts that meet."""

from __future__ import annotations

import pytest

from atoll.lab.box import Box, simulate
from atoll.model.errors import PoolNotReachable, PoolUnavailable, WrongState
from atoll.model.objects import Hold, Instance, JobState, Pool
from atoll.model.units import GIB


def test_a_pool_that_is_not_mounted_is_refused_and_nothing_is_held() -> None:
    async def story() -> None:
        box = await Box.make()

        async def not_mounted(node: str, method: str, phase: str) -> None:
            if method in ("prepare", "forget") and node == "node2":
                raise PoolUnavailable("the share is not mounted on node2")

        box.disks.fault = not_mounted
        with pytest.raises(PoolUnavailable, match="not mounted"):
            await box.add_pool()
        assert not box.master.state.store.all(Hold)
        assert not box.master.state.store.all(Pool)
        assert not box.disks.marks
        box.disks.fault = None
        await box.add_pool()
        await box.close()

    simulate(story)


def test_a_pool_that_guests_may_not_enter_is_refused() -> None:
    async def story() -> None:
        box = await Box.make()
        box.disks.unfit["node2"] = "guests run as user atoll-guest, which may not enter /box/shared"
        with pytest.raises(PoolUnavailable, match=r"on node2: .* may not enter") as refused:
            await box.add_pool()
        assert refused.value.hint == "on node2: chmod a+x /box"
        assert not box.master.state.store.all(Pool)
        assert not box.disks.marks
        box.disks.unfit.clear()
        await box.add_pool()
        await box.close()

    simulate(story)


def test_a_group_whose_guests_may_not_enter_a_pool_is_not_connected() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.do("group.add", name="other")
        await box.do("pool.add", name="shared", driver="sharedfile", options={"path": "/box/shared", "mount": "none"}, groups=["other"])
        box.disks.unfit["node3"] = "may not enter"
        # The storage has its mark: a node of the other group has made it.
        box.disks.marks[box.master.state.store.find(Pool, "shared").id] = "made"
        with pytest.raises(PoolUnavailable, match="on node3"):
            await box.do("pool.connect", "shared", group="default")
        assert len(box.master.state.store.find(Pool, "shared").groups) == 1
        await box.close()

    simulate(story)


def test_a_pool_that_no_node_reaches_cannot_be_checked() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.do("group.add", name="empty")
        await box.do("pool.add", name="shared", driver="sharedfile", options={"path": "/box/shared", "mount": "none"}, groups=["empty"])
        with pytest.raises(PoolNotReachable, match="its groups have none") as refused:
            await box.do("pool.check", "shared")
        assert "atoll pool connect shared GROUP" in refused.value.hint
        await box.close()

    simulate(story)


def test_of_two_starts_one_is_told_that_it_runs() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await box.do("instance.add", name="web", disks=[{"size": GIB}], memory=GIB, start=False)
        first, second = await box.submit("instance.start", "web"), await box.submit("instance.start", "web")
        assert first.job
        assert second.job
        assert (await box.end_of(first.job)).state is JobState.DONE
        late = await box.end_of(second.job)
        assert late.state is JobState.UNDONE
        assert late.error
        assert late.error["code"] == WrongState.code
        assert len(box.world.running(box.master.state.store.find(Instance, "web").id)) == 1
        assert not box.world.violations
        await box.close()

    simulate(story)
