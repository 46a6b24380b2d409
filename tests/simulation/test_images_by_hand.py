"""Somebody works in a pool's directory by hand: what verify says, what operations do, and that nothing is touched that is not ours."""

from __future__ import annotations

from typing import Any

import pytest
from simsupport import check, running

from atoll.api.leader import Finding
from atoll.lab.box import Box, simulate
from atoll.model.errors import Conflict, NotFound, PoolUnavailable
from atoll.model.objects import Instance, Pool, Volume
from atoll.model.units import GIB, MIB


async def made() -> tuple[Box, dict[str, dict[str, Any]], Volume]:
    """A cluster, the files of its shared pool, and the first disk of an instance that runs."""
    box = await Box.make()
    await box.add_pool()
    await running(box)
    store = box.master.state.store
    volume = store.require(Volume, store.find(Instance, "web1").disks[0].volume)
    return box, box.disks.images[store.find(Pool, "shared").id], volume


async def only(box: Box, what: str) -> Finding:
    """The finding, which is the only one."""
    found = await box.master.verify()
    assert [f.what for f in found] == [what], found
    return found[0]


def test_an_image_deleted_of_a_stopped_instance() -> None:
    async def story() -> None:
        box, files, volume = await made()
        await box.do("instance.stop", "web1", timeout=1.0)
        kept = files.pop(volume.logical_id)
        found = await only(box, "image is missing")
        assert (found.severity, found.about) == ("error", f"{volume.name} in shared")
        assert "put it back from a backup, or make an empty disk" in found.why
        assert found.commands == ("atoll instance recreate web1",)
        with pytest.raises(NotFound, match="is not on its storage"):
            await box.do("instance.start", "web1")
        files[volume.logical_id] = kept
        assert not await box.master.verify()
        await box.do("instance.start", "web1")
        check(box)
        await box.close()

    simulate(story)


def test_a_running_instance_whose_image_was_deleted_does_not_leave_its_node() -> None:
    async def story() -> None:
        box, files, volume = await made()
        kept = files.pop(volume.logical_id)
        with pytest.raises(NotFound):
            await box.do("instance.migrate", "web1")
        web = box.master.state.store.find(Instance, "web1")
        assert box.world.running(web.id) == ["node1"]
        files[volume.logical_id] = kept
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize("what", ["a symbolic link", "a directory"])
def test_something_else_in_the_place_of_an_image(what: str) -> None:
    async def story() -> None:
        box, files, volume = await made()
        await box.do("instance.stop", "web1", timeout=1.0)
        files[volume.logical_id]["problem"] = what
        found = await only(box, "what is there is no image")
        assert what in found.why
        with pytest.raises(Conflict, match=what):
            await box.do("instance.start", "web1")
        del files[volume.logical_id]["problem"]
        await box.do("instance.start", "web1")
        check(box)
        await box.close()

    simulate(story)


def test_an_image_made_larger_by_hand_is_taken_as_it_is() -> None:
    async def story() -> None:
        box, files, volume = await made()
        files[volume.logical_id]["size"] += MIB
        found = await only(box, "size differs")
        wanted = volume.size + MIB
        assert found.commands == (f"atoll instance grow-disk web1 0 {wanted}B --absolute",)
        await box.do("instance.grow-disk", "web1", index=0, size=wanted)
        assert not await box.master.verify()
        check(box)
        await box.close()

    simulate(story)


def test_an_image_cut_off_is_an_error_and_can_be_made_whole_again() -> None:
    async def story() -> None:
        box, files, _ = await made()
        await box.do("volume.create", name="data", pool="shared", size=GIB)
        data = box.master.state.store.find(Volume, "data")
        files[data.logical_id]["size"] -= MIB
        found = await only(box, "image was cut off")
        assert found.severity == "error"
        assert "what was there is gone" in found.why
        assert found.commands == (f"atoll volume grow data {GIB}B --absolute",)
        await box.do("volume.grow", "data", size=GIB)
        assert not await box.master.verify()
        check(box)
        await box.close()

    simulate(story)


def test_other_peoples_files_are_named_and_left_alone_and_may_become_volumes() -> None:
    async def story() -> None:
        box, files, _ = await made()
        for number in range(7):
            files[f"old disk {number}.raw"] = {"size": GIB, "volume": None}
        found = await only(box, "7 files of other people")
        assert (found.severity, found.about) == ("info", "shared")
        assert "old disk 0.raw" in found.why
        assert found.why.endswith("...: left alone")
        assert found.commands == ("to make a volume of it: atoll volume create --pool shared --adopt 'old disk 0.raw'",)
        await box.do("instance.remove", "web1", timeout=1.0)
        assert sorted(files) == [f"old disk {number}.raw" for number in range(7)]
        for number in range(7):
            await box.do("volume.create", name=f"v{number}", pool="shared", adopt=f"old disk {number}.raw")
        assert not await box.master.verify()
        await box.close()

    simulate(story)


def test_images_with_our_names_that_nobody_owns() -> None:
    async def story() -> None:
        box, files, _ = await made()
        stray = "vol-" + "7" * 17
        files[f"gone.{stray}.raw"] = {"size": GIB, "volume": stray}
        files[f".atoll-tmp-{stray}"] = {"size": 0, "volume": stray}
        found = {f.about: f for f in await box.master.verify()}
        assert {f.what for f in found.values()} == {"orphan image"}
        assert f"--adopt gone.{stray}.raw" in found[f"gone.{stray}.raw in shared"].commands[0]
        assert found[f".atoll-tmp-{stray} in shared"].commands == (f"on node1: rm .atoll-tmp-{stray}",)
        await box.close()

    simulate(story)


def test_a_pool_that_is_not_as_it_should_be_on_one_node_is_told_of_that_node() -> None:
    async def story() -> None:
        box, _, _ = await made()

        async def unmounted(node: str, method: str, phase: str) -> None:
            if node == "node2":
                raise PoolUnavailable("/box/shared is not marked as pool shared: the share is not mounted, or it is another one")

        box.disks.fault = unmounted
        found = await only(box, "pool cannot be used on a node")
        assert found.about == "shared on node2"
        assert "is not marked as pool shared" in found.why
        assert found.commands[0] == "atoll pool check shared"
        await box.close()

    simulate(story)


def test_a_mark_that_was_removed_is_made_again_where_the_images_are() -> None:
    async def story() -> None:
        box, files, _ = await made()
        pool = box.master.state.store.find(Pool, "shared")
        del box.disks.marks[pool.id]
        found = await box.master.verify()
        assert {f.what for f in found} == {"pool cannot be used on a node"}
        with pytest.raises(PoolUnavailable):
            await box.do("volume.create", name="data", pool="shared", size=GIB)
        kept = dict(files)
        files.clear()
        with pytest.raises(PoolUnavailable, match="none of the 2 images"):
            await box.do("pool.mark", "shared", node="node1")
        assert pool.id not in box.disks.marks, "an empty mount point is not marked"
        files.update(kept)
        await box.do("pool.mark", "shared")
        assert not await box.master.verify()
        check(box)
        await box.close()

    simulate(story)
