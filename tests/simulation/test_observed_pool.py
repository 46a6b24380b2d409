"""A pool that is only looked at: what it shows, what is refused, and that no order that might write ever leaves for it."""

from __future__ import annotations

from typing import Any

import pytest
from simsupport import check, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, NotSupported, PoolObserved, PoolUnavailable
from atoll.model.objects import Pool
from atoll.model.units import GIB
from atoll.operations import views
from atoll.operations.index import Index
from atoll.storage.contract import LOOKS


def row(box: Box, name: str) -> dict[str, Any]:
    return views.KINDS["pool"][1](views.find(box.master.state, "pool", name), Index(box.master.state))


def test_it_is_seen_everything_else_is_refused_and_it_is_forgotten_without_a_trace() -> None:
    async def story() -> None:
        box = await Box.make()
        asked: set[str] = set()

        async def note(node: str, method: str, phase: str) -> None:
            asked.add(method)

        box.disks.fault = note
        await box.do("pool.add", name="theirs", driver="rbd", options={"pool": "box"}, observe=True)
        shown = row(box, "theirs")
        assert (shown["state"], shown["writers"]) == ("observed", "none")
        assert await box.master.pool_images("theirs") == []
        refused: list[tuple[str, str, dict[str, Any]]] = [
            ("volume.create", "", {"name": "x", "pool": "theirs", "size": GIB}),
            ("volume.create", "", {"name": "x", "pool": "theirs", "adopt": "old"}),
            ("instance.add", "", {"name": "web1", "template": "rbd", "disks": [{"size": GIB}], "memory": GIB}),
            ("pool.connect", "theirs", {"group": "default"}),
            ("pool.mark", "theirs", {}),
            ("pool.modify", "theirs", {"state": "ready"}),
        ]
        for operation, target, request in refused:
            with pytest.raises(PoolObserved, match="nothing is ever written to it") as caught:
                await box.submit(operation, target, **request)
            assert "atoll pool add theirs -t rbd" in caught.value.hint, operation
        # Questions, and what looks by itself.
        assert (await box.do("pool.check", "theirs"))["ok"]
        await settle(box)
        assert await box.master.verify() == []
        assert asked <= LOOKS, asked - LOOKS
        await box.do("pool.remove", "theirs")
        assert box.master.state.store.all(Pool) == []
        assert asked <= LOOKS, asked - LOOKS
        check(box)
        await box.close()

    simulate(story)


def test_what_cannot_be_observed_says_why() -> None:
    async def story() -> None:
        box = await Box.make()
        with pytest.raises(NotSupported, match="it has to mark first") as caught:
            await box.submit("pool.add", name="x", driver="sharedfile", options={"path": "/box"}, observe=True)
        assert caught.value.hint == "drivers that can: rbd"
        await box.add_pool()
        with pytest.raises(NotSupported, match="other people's images"):
            await box.master.pool_images("shared")
        await box.close()

    simulate(story)


def test_storage_that_is_not_there_is_not_observed() -> None:
    async def story() -> None:
        box = await Box.make()

        async def gone(node: str, method: str, phase: str) -> None:
            if method == "check" and phase == "before":
                raise PoolUnavailable("there is no Ceph pool box")

        box.disks.fault = gone
        with pytest.raises(AtollError, match="there is no Ceph pool box"):
            await box.do("pool.add", name="theirs", driver="rbd", options={"pool": "box"}, observe=True)
        assert box.master.state.store.all(Pool) == []
        await settle(box)
        check(box)
        await box.close()

    simulate(story)
