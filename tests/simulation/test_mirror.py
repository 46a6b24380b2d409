"""Internally mirrored disks (a fake driver): a secondary node, syncing, and failover only to the secondary."""

from __future__ import annotations

import asyncio

import pytest

from atoll.lab.box import Box, simulate
from atoll.model.errors import InvalidInput, NodeUnavailable, NotMobile
from atoll.model.objects import Instance, Job, Volume
from atoll.model.units import GIB


def test_mirrored_instance_moves_only_between_its_two_nodes() -> None:
    async def story() -> None:
        box = await Box.make(nodes=3)
        await box.add_pool("mirror", "fakemirror")
        await box.do("instance.add", name="db", template="mirror", disks=[{"size": GIB}], memory=GIB, node="node1", secondary="node2")
        store = box.master.state.store

        def disk() -> Volume:
            return store.find(Volume, "db-disk0")

        assert (disk().node, disk().secondary) == (box.nodes["node1"], box.nodes["node2"])
        with pytest.raises(NodeUnavailable, match="node-local"):
            await box.do("instance.migrate", "db", node="node3")
        await box.do("instance.migrate", "db")
        assert (disk().node, disk().secondary) == (box.nodes["node2"], box.nodes["node1"])
        assert store.find(Instance, "db").secondary == box.nodes["node1"]
        steps = [step.key for job in store.all(Job) for step in await store.journal(job)]
        assert any("sync copy" in key for key in steps)
        await box.power_cut("node2")
        await asyncio.sleep(10)
        with pytest.raises((NodeUnavailable, NotMobile)):
            await box.do("instance.failover", "db", node="node3", node_is_dead=True)
        await box.do("instance.failover", "db", node_is_dead=True)
        assert disk().node == box.nodes["node1"]
        assert not box.world.violations
        await box.close()

    simulate(story)


def test_external_storage_has_no_secondary() -> None:
    async def story() -> None:
        box = await Box.make(nodes=3)
        await box.add_pool()
        with pytest.raises(InvalidInput, match="no secondary"):
            await box.do("instance.add", name="a", disks=[{"size": GIB}], memory=GIB, node="node1", secondary="node2")
        await box.close()

    simulate(story)
