"""Disks made from image files, in simulated clusters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import IMAGE, check, dump, everything, image_on, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import InvalidInput, InvalidSize, NodeUnavailable, NotFound
from atoll.model.objects import Volume
from atoll.model.units import GIB


async def cluster(driver: str = "sharedfile") -> Box:
    box = await Box.make()
    await box.add_pool("shared", driver)
    await image_on("node2")(box)
    return box


def volume_of(box: Box, name: str) -> Volume:
    return box.master.state.store.find(Volume, name)


def contents(box: Box) -> dict[str, Any]:
    return {image["volume"]: image.get("content") for images in box.disks.images.values() for image in images.values()}


@pytest.mark.parametrize("driver", ["sharedfile", "file"])
def test_an_image_fills_disk_0_and_the_size_is_its_own(driver: str) -> None:
    async def run() -> None:
        box = await cluster(driver)
        await box.do("instance.add", name="web1", disks=[{"image": IMAGE}, {"size": GIB}], node="node1")
        disk0, disk1 = volume_of(box, "web1-disk0"), volume_of(box, "web1-disk1")
        assert disk0.size == GIB
        assert contents(box) == {disk0.id: IMAGE["path"], disk1.id: None}
        check(box)
        await box.close()

    simulate(run)


def test_a_larger_disk_keeps_its_size_and_a_smaller_one_is_refused_without_a_trace() -> None:
    async def run() -> None:
        box = await cluster()
        await box.do("volume.create", name="big", pool="shared", size=3 * GIB, image=IMAGE)
        assert volume_of(box, "big").size == 3 * GIB
        before = dump(box)
        with pytest.raises(InvalidSize, match="too small"):
            await box.do("volume.create", name="small", pool="shared", size=GIB - 512, image=IMAGE)
        assert dump(box) == before
        check(box)
        await box.close()

    simulate(run)


def test_refusals_that_need_no_node() -> None:
    async def run() -> None:
        box = await cluster()
        before = everything(box)
        for wrong, error in (
            ({"image": {**IMAGE, "path": "debian.qcow2"}}, InvalidInput),
            ({"image": {**IMAGE, "path": "/srv/../etc/shadow"}}, InvalidInput),
            ({"image": {**IMAGE, "format": "vmdk"}}, InvalidInput),
            ({"image": IMAGE, "adopt": "x"}, InvalidInput),
            ({"image": {**IMAGE, "node": "node9"}}, NotFound),
        ):
            with pytest.raises(error):
                await box.do("volume.create", name="data", pool="shared", **wrong)
        assert everything(box) == before
        await box.crash_agent("node2")
        await asyncio.sleep(20)
        with pytest.raises(NodeUnavailable):
            await box.do("volume.create", name="data", pool="shared", image=IMAGE)
        await box.close()

    simulate(run)


def test_an_image_that_is_not_there_leaves_nothing() -> None:
    async def run() -> None:
        box = await cluster()
        before = dump(box)
        with pytest.raises(NotFound):
            await box.do("instance.add", name="web1", disks=[{"image": {**IMAGE, "path": "/srv/none"}}])
        assert dump(box) == before
        check(box)
        await box.close()

    simulate(run)


def test_a_cancelled_import_is_undone() -> None:
    async def run() -> None:
        box = await cluster("file")
        before = dump(box)
        number = (await box.submit("instance.add", name="web1", disks=[{"image": IMAGE}], node="node1")).job
        assert number is not None
        for _ in range(1000):
            if box.master.engine.progress(number).text == "copying the disk":
                break
            await asyncio.sleep(0.01)
        assert 5 < (box.master.engine.progress(number).percent or 0) < 60
        await box.master.cancel_job(number)
        assert (await box.end_of(number)).state == "undone"
        await settle(box)
        assert dump(box) == before
        check(box)
        await box.close()

    simulate(run)


def test_add_disk_takes_an_image_too() -> None:
    async def run() -> None:
        box = await cluster()
        await box.do("instance.add", name="web1", disks=[{"size": GIB}])
        made = await box.do("instance.add-disk", "web1", disk={"image": IMAGE})
        assert contents(box)[made["volume"]] == IMAGE["path"]
        check(box)
        await box.close()

    simulate(run)
