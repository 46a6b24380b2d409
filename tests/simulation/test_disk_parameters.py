"""Disk parameters: the cluster's, overridden by a group's; what they change, when, and what is told of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, InvalidInput, NotFound
from atoll.model.objects import Group, Instance, Node
from atoll.model.units import GIB
from atoll.operations import views
from atoll.operations.index import Index
from atoll.operations.instance_views import instance as row_of

KERNEL, USER = {"rbd": {"access": "kernelspace"}}, {"rbd": {"access": "userspace"}}


async def make() -> Box:
    box = await Box.make()
    await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
    return box


async def add(box: Box, name: str = "web1", **request: Any) -> None:
    await box.do("instance.add", name=name, disks=[{"size": GIB, "pool": "ceph"}], memory=GIB, node="node1", **request)
    await asyncio.sleep(2)


def access(box: Box, name: str = "web1") -> tuple[str | None, str | None, str | None]:
    """Now, by what, and next."""
    state = box.master.state
    disk = row_of(state.store.find(Instance, name), Index(state))["disks"][0]
    return disk["access"], disk["access_way"], disk["access_next"]


def test_a_change_holds_from_the_next_start_on_and_the_answer_says_who_runs_as_before() -> None:
    async def run() -> None:
        box = await make()
        await add(box)
        await add(box, "web2", start=False)
        assert access(box) == ("userspace", None, "userspace")
        assert access(box, "web2") == (None, None, "userspace")
        told = await box.do("cluster.modify", driver_options=KERNEL)
        assert "next start or migration" in told["takes_effect"]
        assert told["until_then_as_before"] == ["web1 (userspace)"]
        assert "warning" not in told
        assert access(box) == ("userspace", None, "kernelspace")
        assert access(box, "web2") == (None, None, "kernelspace")
        await box.do("instance.migrate", "web1", node="node2")
        await asyncio.sleep(2)
        assert access(box) == ("kernelspace", "box", "kernelspace")
        assert {node for node, _ in box.disks.devices} == {"node2"}
        told = await box.do("cluster.modify", driver_options={"rbd": {"access": ""}})
        assert told["until_then_as_before"] == ["web1 (kernelspace)"]
        await box.do("instance.stop", "web1", timeout=1.0)
        await box.do("instance.start", "web1", node="node2")
        await asyncio.sleep(2)
        assert access(box) == ("userspace", None, "userspace")
        assert not box.disks.devices
        told = await box.do("cluster.modify", driver_options={"sharedfile": {"mount": "none"}})
        assert set(told) == {"cluster"}
        await box.close()

    simulate(run)


def test_a_group_overrides_the_cluster_and_counts_where_the_guest_will_be() -> None:
    async def run() -> None:
        box = await make()
        await add(box)
        await box.do("group.add", name="rack2", driver_options=KERNEL)
        await box.do("group.assign-nodes", "rack2", nodes=["node3"])
        await box.do("pool.connect", "ceph", group="rack2")
        await asyncio.sleep(10)
        assert views.group(box.master.state.store.find(Group, "rack2"), Index(box.master.state))["disk_parameters"] == KERNEL
        await box.do("instance.stop", "web1", timeout=1.0)
        await box.do("instance.add", name="web3", disks=[{"size": GIB, "pool": "ceph"}], memory=GIB, node="node3")
        await asyncio.sleep(2)
        assert access(box, "web3")[0] == "kernelspace"
        await box.do("instance.start", "web1", node="node1")
        await asyncio.sleep(2)
        assert access(box)[0] == "userspace"
        told = await box.do("cluster.modify", driver_options=KERNEL)
        assert told["until_then_as_before"] == ["web1 (userspace)"]
        told = await box.do("group.modify", "default", driver_options=USER)
        assert "until_then_as_before" not in told
        assert access(box) == ("userspace", None, "userspace")
        assert views.cluster(box.master.state)["disk_parameters"] == KERNEL
        await box.do("group.modify", "default", driver_options={"rbd": {"access": ""}})
        assert access(box)[2] == "kernelspace"
        assert views.group(box.master.state.store.find(Group, "default"), Index(box.master.state))["disk_parameters"] == {}
        await box.close()

    simulate(run)


@pytest.mark.parametrize(
    ("operation", "target", "given", "error", "words"),
    [
        ("cluster.modify", "", {"rbd": {"access": "both"}}, InvalidInput, "one of userspace, kernelspace, not 'both'"),
        ("group.modify", "default", {"rbd": {"access": "kernel"}}, InvalidInput, "one of userspace, kernelspace"),
        ("group.add", "", {"rbd": {"access": "x"}}, InvalidInput, "one of userspace, kernelspace"),
        ("group.modify", "default", {"rbd": {"pool": "vms"}}, NotFound, "no disk parameter 'pool'"),
        ("group.add", "", {"sharedfile": {"access": "userspace"}}, NotFound, "no disk parameter 'access'"),
        ("cluster.modify", "", {"sharedfile": {"access": "kernelspace"}}, NotFound, "no option 'access'"),
        ("cluster.modify", "", {"rbd": {"isolation": "some"}}, InvalidInput, "one of none, volume, not 'some'"),
        ("group.modify", "default", {"nbd": {"access": "kernelspace"}}, NotFound, "no storage driver 'nbd'"),
    ],
)
def test_what_a_driver_does_not_take_is_refused_before_there_is_a_job(
    operation: str, target: str, given: dict[str, Any], error: type[AtollError], words: str
) -> None:
    async def run() -> None:
        box = await Box.make()
        more = {"name": "new"} if operation == "group.add" else {}
        with pytest.raises(error, match=words):
            await box.submit(operation, target, driver_options=given, **more)
        await box.close()

    simulate(run)


def test_defaults_of_pools_and_disk_parameters_are_kept_apart() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.do("cluster.modify", driver_options={"rbd": {"access": "kernelspace", "pool": "box", "features": "5"}})
        cluster = box.master.state.cluster
        assert (cluster.driver_options, cluster.disk_parameters) == ({"rbd": {"pool": "box", "features": "5"}}, KERNEL)
        await box.do("pool.add", name="ceph", driver="rbd")
        await add(box)
        assert access(box)[0] == "kernelspace"
        await box.close()

    simulate(run)


def test_nodes_that_keep_the_data_themselves_are_warned_of() -> None:
    async def run() -> None:
        box = await make()
        store = box.master.state.store
        record = store.find(Node, "node2")
        await store.write(put=[record.model_copy(update={"storage_roles": ("mon", "osd"), "storage": "joined"})])
        told = await box.do("cluster.modify", driver_options=KERNEL)
        assert "themselves: node2. A node" in told["warning"]
        told = await box.do("cluster.modify", driver_options=USER)
        assert "warning" not in told
        await box.close()

    simulate(run)


def test_what_a_driver_warns_of_is_told_at_the_start_and_found_by_verify() -> None:
    async def run() -> None:
        box = await make()
        box.disks.risky["node1"] = "this node keeps the data itself"
        await box.do("cluster.modify", driver_options=KERNEL)
        await add(box)
        found = [finding for finding in await box.master.verify() if finding.about == "web1 on node1"]
        assert [(finding.severity, finding.why) for finding in found] == [("warning", "this node keeps the data itself")]
        await box.do("instance.migrate", "web1", node="node2")
        await asyncio.sleep(2)
        assert [finding for finding in await box.master.verify() if finding.about.startswith("web1")] == []
        await box.close()

    simulate(run)
