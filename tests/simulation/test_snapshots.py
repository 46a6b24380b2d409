"""Snapshots: what they hold, what outlives what, what is refused, and what ``cluster verify`` says of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simstories import cloning, cloning_guest, with_snapshot
from simsupport import check, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AlreadyExists, AtollError, InUse, InvalidInput, NotFound, NotSupported, ShrinkRefused, WrongState
from atoll.model.objects import Snapshot, SnapshotState, Volume
from atoll.model.units import GIB
from atoll.operations import views
from atoll.operations.index import Index


def row(box: Box, noun: str, name: str) -> dict[str, Any]:
    return views.KINDS[noun][1](views.find(box.master.state, noun, name), Index(box.master.state))


def records(box: Box, volume: str) -> int:
    return box.world.images.get(box.master.state.store.find(Volume, volume).id, 0)


def test_a_volume_from_a_snapshot_of_a_running_guest_has_what_it_had_written() -> None:
    async def story() -> None:
        box = await Box.make()
        await cloning_guest(box)
        for _ in range(10):
            box.world.tick()
        await box.do("snapshot.create", volume="data", name="then", tags=["why=test"])
        written = records(box, "data")
        assert written >= 10
        for _ in range(10):
            box.world.tick()
        await box.do("volume.create", name="copy", snapshot="then", size=2 * GIB)
        assert records(box, "copy") == written < records(box, "data")
        assert (row(box, "volume", "copy")["snapshot"], row(box, "volume", "copy")["size"]) == ("then", 2 * GIB)
        await box.do("instance.remove", "web1", timeout=1.0)
        shown = row(box, "snapshot", "then")
        assert (shown["volume"], shown["volume_deleted"], shown["state"], shown["tags"]) == ("data", True, "completed", ["why=test"])
        await box.do("volume.create", name="again", snapshot="then")
        assert records(box, "again") == written
        await box.do("snapshot.delete", "then")
        assert row(box, "volume", "copy")["snapshot"].startswith("snap-"), "it says what it was made from still"
        await box.do("volume.delete", "copy")
        await settle(box)
        check(box)
        assert await box.master.verify() == []
        await box.close()

    simulate(story)


def test_what_is_refused() -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await with_snapshot(box)
        await box.do("volume.create", name="plain", pool="shared", size=GIB)
        refused: list[tuple[type[AtollError], str, str, dict[str, Any]]] = [
            (NotSupported, "makes no snapshots", "snapshot.create", {"volume": "plain"}),
            (NotFound, "nothing", "snapshot.create", {"volume": "nothing"}),
            (AlreadyExists, "then", "snapshot.create", {"volume": "data", "name": "then"}),
            (InvalidInput, "needs a pool", "volume.create", {"name": "x", "size": GIB}),
            (InvalidInput, "is in pool ceph", "volume.create", {"name": "x", "pool": "shared", "snapshot": "then"}),
            (InvalidInput, "from a snapshot, or", "volume.create", {"name": "x", "snapshot": "then", "adopt": "y"}),
            (ShrinkRefused, "cannot have 512M", "volume.create", {"name": "x", "snapshot": "then", "size": GIB // 2}),
            (NotFound, "nothing", "volume.create", {"name": "x", "snapshot": "nothing"}),
        ]
        for error, words, operation, request in refused:
            with pytest.raises(error, match=words):
                await box.submit(operation, "", **request)
        with pytest.raises(NotSupported, match="read from nothing but themselves"):
            await box.submit("volume.flatten", "plain")
        await box.do("volume.delete", "data")
        with pytest.raises(InUse, match="has 1 snapshots, such as then"):
            await box.submit("pool.remove", "ceph")
        await box.do("snapshot.delete", "then")
        await box.do("pool.remove", "ceph")
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


def test_a_disk_that_got_an_owner_meanwhile_is_left_alone() -> None:
    """A snapshot waits for the volume; when its turn has come, another instance has it, whose lock the job does not have."""

    async def story() -> None:
        box = await Box.make()
        await cloning(box)
        await box.add_pool()
        await box.do("instance.add", name="web2", disks=[{"size": GIB, "pool": "shared"}], memory=GIB, start=False)
        attach = (await box.submit("instance.attach-disk", "web2", volume="data")).job
        number = (await box.submit("snapshot.create", "", volume="data")).job
        assert attach is not None
        assert number is not None
        assert (await box.end_of(attach)).state == "done"
        job = await box.end_of(number)
        assert job.error is not None
        assert "belongs to instance web2 now" in job.error["message"]
        await box.do("snapshot.create", volume="data")
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


def test_what_verify_finds_of_snapshots() -> None:
    async def story() -> None:
        box = await Box.make()
        await with_snapshot(box)
        await asyncio.sleep(30)
        assert await box.master.verify() == []
        store = box.master.state.store
        snapshot = store.find(Snapshot, "then")
        shown = box.disks.snapshots[snapshot.pool]
        kept = shown.pop(snapshot.id)
        shown["snap-" + "f" * 17] = kept
        found = {f.what: f for f in await box.master.verify()}
        assert found.keys() == {"snapshot is missing", "orphan snapshot"}
        assert found["snapshot is missing"].about == "then in ceph"
        assert found["snapshot is missing"].commands == ("atoll snapshot delete then",)
        del shown["snap-" + "f" * 17]
        await box.do("snapshot.delete", "then")
        half = snapshot.model_copy(update={"state": SnapshotState.DELETING})
        await store.write(put=[half])
        assert [f.what for f in await box.master.verify()] == ["snapshot is deleting, and no job works on it"]
        await box.do("snapshot.delete", "then")
        assert await box.master.verify() == []
        await store.write(put=[snapshot.model_copy(update={"state": SnapshotState.PENDING})])
        with pytest.raises(WrongState, match="is being made"):
            await box.submit("snapshot.delete", "then")
        await box.close()

    simulate(story)
