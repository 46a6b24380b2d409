"""Stories of every operation: those of guests and their disks from ``simsupport``, and those of nodes, groups, pools and the cluster."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from simsupport import MIGRATES, Story, dead_node, only_volume, running, two_running
from simsupport import STORIES as GUEST_STORIES

from atoll.lab.box import Box
from atoll.model.objects import Instance
from atoll.model.units import GIB

#: Operations without a story here, and the test that has their every step.
ELSEWHERE = {
    "cluster.rotate-ca": "test_certificates.py::test_it_goes_on_after_a_crash_at_every_point",
    "instance.settle": "test_succession.py::test_lost_at_any_moment",
}


@dataclass
class CertificateStory(Story):
    """One in a cluster with certificates."""

    async def make(self, *, locking: bool = True) -> Box:
        return await Box.make(locking=locking, certificates=True)


@dataclass
class CopyStory(Story):
    """One about a copy of web1 on node2."""

    async def submit(self, box: Box, key: str = "") -> int:
        instance = box.master.state.store.find(Instance, "web1").id
        return await box.master.submit_internal(self.operation, f"node2/{instance}")


async def spare_group(box: Box) -> None:
    await box.do("group.add", name="rack2")


async def two_groups(box: Box) -> None:
    """node3 is in a group of its own, which cannot reach the pool."""
    await spare_group(box)
    await box.do("group.assign-nodes", "rack2", nodes=["node3"])
    await asyncio.sleep(10)


async def connected(box: Box) -> None:
    await two_groups(box)
    await box.do("pool.connect", "shared", group="rack2")


async def silent_node(box: Box) -> None:
    await running(box)
    await box.power_cut("node3")
    await asyncio.sleep(10)


async def powered_off(box: Box) -> None:
    await running(box)
    box.world.end_guest(box.master.state.store.find(Instance, "web1").id, "node1")


async def back_from_death(box: Box) -> None:
    """node1 was called dead, web1 runs elsewhere, and now node1 has power again, though nobody has heard of it yet."""
    await dead_node(box)
    await box.do("instance.failover", "web1", node_is_dead=True)
    box.mute.add("node1")
    await box.boot_agent("node1")


async def stale_copy(box: Box) -> None:
    """node2 has a paused copy that its claim does not know."""
    await running(box)
    guest = box.world.guests["node1", box.master.state.store.find(Instance, "web1").id]
    box.world.make(guest.spec, "node2", incoming=True)


async def cloning(box: Box) -> None:
    """A volume in a pool whose driver makes snapshots."""
    await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
    await box.do("volume.create", name="data", pool="ceph", size=GIB)


async def cloning_guest(box: Box) -> None:
    """The same, of a guest that runs."""
    await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
    await box.do("instance.add", name="web1", disks=[{"size": GIB, "pool": "ceph", "name": "data"}], memory=GIB, node="node1")


async def by_devices(box: Box) -> None:
    """web1 runs on node1, and its disks are block devices there."""
    await box.do("cluster.modify", driver_options={"rbd": {"access": "kernelspace"}})
    await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
    disks = [{"size": GIB, "pool": "ceph", "name": "root"}, {"size": GIB, "pool": "ceph", "name": "more"}]
    await box.do("instance.add", name="web1", disks=disks, memory=GIB, node="node1")
    box.world.tick(3)
    assert len(box.disks.devices) == 2


async def by_devices_stopped(box: Box) -> None:
    await by_devices(box)
    await box.do("instance.stop", "web1", timeout=1.0)
    assert not box.disks.devices


async def by_devices_until_now(box: Box) -> None:
    """It shall have none any more after it has moved."""
    await by_devices(box)
    await box.do("group.modify", "default", driver_options={"rbd": {"access": "userspace"}})


async def by_devices_with_volume(box: Box) -> None:
    await by_devices(box)
    await box.do("volume.create", name="data", pool="ceph", size=GIB)


async def by_devices_dead(box: Box) -> None:
    await by_devices(box)
    await box.power_cut("node1")
    await asyncio.sleep(10)


async def with_snapshot(box: Box) -> None:
    await cloning(box)
    await box.do("snapshot.create", volume="data", name="then")


async def with_clone(box: Box) -> None:
    """Its volume is deleted, and another one was made from it."""
    await with_snapshot(box)
    await box.do("volume.create", name="copy", snapshot="then")
    await box.do("volume.delete", "data")


TAGS = {"add": ["rack=2"]}
SETTINGS = {"driver_options": {"sharedfile": {"mount": "none"}}}
STORIES: list[Story] = [
    *GUEST_STORIES,
    Story("device-start", "instance.start", "web1", {"node": "node2"}, by_devices_stopped),
    Story("device-stop", "instance.stop", "web1", {"timeout": 1.0}, by_devices),
    Story("device-migrate", "instance.migrate", "web1", {}, by_devices, ends=MIGRATES),
    Story("device-migrate-to-none", "instance.migrate", "web1", {}, by_devices_until_now, ends=MIGRATES),
    Story("device-attach-disk", "instance.attach-disk", "web1", {"volume": "data"}, by_devices_with_volume),
    Story("device-detach-disk", "instance.detach-disk", "web1", {"index": 1}, by_devices),
    Story("device-failover-dead", "instance.failover", "web1", {"node_is_dead": True}, by_devices_dead, frees=True),
    Story("instance-tags", "instance.tags", "web1", TAGS, running, records=True),
    Story("powered-off", "instance.powered-off", "web1", {}, powered_off, internal=True, frees=True),
    Story("volume-tags", "volume.tags", "data", TAGS, only_volume, records=True),
    Story("snapshot-create", "snapshot.create", "", {"volume": "data", "name": "then"}, cloning),
    Story("snapshot-running", "snapshot.create", "", {"volume": "data"}, cloning_guest),
    Story("snapshot-delete", "snapshot.delete", "then", {}, with_snapshot),
    Story("snapshot-delete-cloned", "snapshot.delete", "then", {}, with_clone),
    Story("snapshot-tags", "snapshot.tags", "then", TAGS, with_snapshot, records=True),
    Story("volume-from-snapshot", "volume.create", "", {"name": "copy", "snapshot": "then", "size": 2 * GIB}, with_snapshot),
    Story("volume-flatten", "volume.flatten", "copy", {}, with_clone),
    Story("pool-connect", "pool.connect", "shared", {"group": "rack2"}, two_groups),
    Story("pool-disconnect", "pool.disconnect", "shared", {"group": "rack2"}, connected, records=True),
    Story("pool-modify", "pool.modify", "shared", {"state": "closed"}, records=True),
    Story("pool-tags", "pool.tags", "shared", TAGS, records=True),
    Story("group-add", "group.add", "", {"name": "rack2"}, records=True),
    Story("group-modify", "group.modify", "default", {"cpu_model": "max"}, records=True),
    Story("group-rename", "group.rename", "default", {"new_name": "rack1"}, records=True),
    Story("group-remove", "group.remove", "rack2", {}, spare_group, records=True),
    Story("group-assign", "group.assign-nodes", "rack2", {"nodes": ["node3"]}, spare_group, records=True),
    Story("group-tags", "group.tags", "default", TAGS, records=True),
    Story("cluster-modify", "cluster.modify", "", SETTINGS, records=True),
    Story("cluster-tags", "cluster.tags", "", TAGS, records=True),
    Story("node-modify", "node.modify", "node3", {"drained": True}, running, records=True),
    Story("node-remove", "node.remove", "node3", {}, running, records=True),
    Story("node-tags", "node.tags", "node3", TAGS, records=True),
    Story("node-declare-dead", "node.declare-dead", "node3", {}, silent_node, records=True),
    Story("node-migrate", "node.migrate", "node1", {}, two_running, ends=MIGRATES, partial=True),
    Story("node-welcome", "node.welcome", "node3", internal=True),
    Story("node-readmit", "node.readmit", "node1", {}, back_from_death, internal=True),
    CopyStory("node-kill-stale", "node.kill-stale", "", {}, stale_copy, internal=True),
    CertificateStory("node-renew", "node.renew", "node2", ends=MIGRATES),
    CertificateStory("renew-all", "cluster.renew-certificates", ends=MIGRATES),
]
