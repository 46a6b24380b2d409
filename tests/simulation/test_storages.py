"""Storage clusters that Atoll makes: what is refused, what is only marked, what happens when nodes go and come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from simsupport import check, dump, jobs, settle, with_ceph, with_ceph_and_spare, with_disks

from atoll.lab.box import ROOT, Box, simulate
from atoll.model.errors import (
    AlreadyExists,
    AtollError,
    InUse,
    InvalidInput,
    NodeAnswers,
    NodeUnavailable,
    NotFound,
    PreflightFailed,
    StorageWouldStop,
    WrongState,
)
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations.storages import preview

INIT = ("storage.init", "default")


def story(begin: Callable[[Box], Awaitable[None]] | None, work: Callable[[Box], Awaitable[None]], nodes: int = 3) -> None:
    async def run() -> None:
        box = await Box.make(nodes)
        if begin:
            await begin(box)
        await work(box)
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def node(box: Box, name: str) -> Node:
    return box.master.state.store.find(Node, name)


async def refused(box: Box, error: type[AtollError], words: str, operation: str, target: str = "", /, **request: Any) -> AtollError:
    """The request is refused, and leaves everything as it was."""
    before = dump(box)
    with pytest.raises(error, match=words) as found:
        await box.do(operation, target, **request)
    assert dump(box) == before
    assert found.value.hint
    return found.value


def test_three_nodes_become_a_storage_cluster_and_a_second_time_changes_nothing() -> None:
    async def work(box: Box) -> None:
        made = await box.do("storage.init", "default", type="ceph")
        assert (made["health"], made["osds"], made["monitors"]) == ("HEALTH_OK", 6, ["node1", "node2", "node3"])
        assert [node(box, f"node{n}").storage_roles for n in (1, 2, 3)] == [("mon", "mgr", "osd"), ("mon", "mgr", "osd"), ("mon", "osd")]
        before = dump(box)
        assert (await box.do("storage.init", "default", type="ceph"))["unchanged"]
        assert dump(box) == before
        assert preview(box.master.state, "default", "ceph").lines == ["it is there already: nothing changes"]

    story(with_disks, work)


def test_all_problems_of_all_nodes_are_told_at_once() -> None:
    async def work(box: Box) -> None:
        box.ceph.node("node1").problems = ["disk /dev/sdb is in use"]
        box.ceph.node("node3").problems = ["packages are missing", "port 3300 is in use"]
        error = await refused(box, PreflightFailed, "3 things stand against it, and nothing was changed", *INIT, type="ceph")
        for words in ("node1: disk /dev/sdb is in use", "node3: packages are missing", "node3: port 3300 is in use"):
            assert words in error.message
        for name in box.nodes:
            box.ceph.node(name).problems.clear()
        await box.do("storage.init", "default", type="ceph")

    story(with_disks, work)


def test_a_clock_that_differs_and_a_silent_node_stand_against_it() -> None:
    async def work(box: Box) -> None:
        box.ceph.skew["node2"] = 3.0
        await refused(box, PreflightFailed, r"node2: its clock differs from the master's by 3.0\d s or more", *INIT, type="ceph")
        box.ceph.skew["node2"] = -1.0
        await refused(box, PreflightFailed, r"node2: its clock differs", "storage.init", "default", type="ceph")
        box.ceph.skew.clear()
        await box.crash_agent("node3")
        await refused(box, PreflightFailed, "node3: .*does not answer", "storage.init", "default", type="ceph")
        await box.boot_agent("node3")

    story(with_disks, work)


def test_a_group_without_nodes_is_only_marked_and_made_when_it_has_some() -> None:
    async def work(box: Box) -> None:
        await box.do("group.add", name="cold")
        assert (await box.do("storage.init", "cold", type="ceph"))["marked"]
        found = box.master.state.store.find(Group, "cold")
        assert box.master.state.store.require(StorageCluster, found.storage).layout == {}
        await refused(box, WrongState, "only a node that is offline", "group.assign-nodes", "cold", nodes=["node3"])
        await refused(box, AlreadyExists, "group cold is configured for the storage cluster 'ceph' already", *INIT, type="ceph")
        await box.do("node.modify", "node3", offline=True)
        await box.do("group.assign-nodes", "cold", nodes=["node3"])
        assert box.ceph.node("node3").running == set(), "nothing is configured yet"
        await box.do("node.modify", "node3", offline=False)
        made = await box.do("storage.init", "cold", type="ceph")
        assert made["monitors"] == ["node3"]
        assert node(box, "node3").storage == "joined"

    story(with_disks, work)


def test_two_groups_have_storage_clusters_with_different_names() -> None:
    async def work(box: Box) -> None:
        await box.do("group.add", name="cold")
        await box.do("node.modify", "node3", offline=True)
        await box.do("group.assign-nodes", "cold", nodes=["node3"])
        await box.do("node.modify", "node3", offline=False)
        await box.do("group.modify", "cold", storage_options={"ceph": {"name": "slow", "pool": "archive"}})
        await box.do("storage.init", "default", type="ceph")
        await box.do("storage.init", "cold", type="ceph")
        assert {s.name for s in box.master.state.store.all(StorageCluster)} == {"ceph", "slow"}
        assert set(box.ceph.node("node1").clients) == {"ceph", "slow"}, "a client may use both"

    simulate(lambda: _without_check(with_disks, work))


async def _without_check(begin: Callable[[Box], Awaitable[None]], work: Callable[[Box], Awaitable[None]]) -> None:
    """The simulated monitors know one cluster only, so their numbers are not compared with the records here."""
    box = await Box.make(3)
    await begin(box)
    await work(box)
    await box.close()


def test_options_change_only_before() -> None:
    async def work(box: Box) -> None:
        await refused(box, InvalidInput, "no option 'disc'", "cluster.modify", storage_options={"ceph": {"disc": "/dev/sdb"}})
        await refused(box, NotFound, "no kind of storage cluster 'zfs'", "cluster.modify", storage_options={"zfs": {"disk": "/dev/sdb"}})
        await refused(box, InvalidInput, "option size", "group.modify", "default", storage_options={"ceph": {"size": "none"}})
        await box.do("node.modify", "node2", storage_options={"ceph": {"disk": "/dev/nvme0n1"}})
        await box.do("cluster.modify", storage_options={"ceph": {"size": "2", "profile": "small"}})
        await box.do("cluster.modify", storage_options={"ceph": {"profile": ""}})
        assert box.master.state.cluster.storage_options == {"ceph": {"disk": "/dev/sdb:/dev/sdc", "size": "2"}}
        await box.do("storage.init", "default", type="ceph")
        assert box.ceph.node("node2").osds.keys() == {"/dev/nvme0n1"}
        for target, noun in (("", "cluster"), ("default", "group"), ("node1", "node")):
            await refused(box, WrongState, "can no longer change", f"{noun}.modify", target, storage_options={"ceph": {"size": "3"}})

    story(with_disks, work)


def test_without_disks_it_is_refused_before_there_is_a_job() -> None:
    async def work(box: Box) -> None:
        jobs = box.master.engine.submitter.not_before()
        await refused(box, InvalidInput, "no disk is named for any node", "storage.init", "default", type="ceph")
        assert box.master.engine.submitter.not_before() == jobs

    story(None, work)


def test_a_node_whose_part_is_needed_goes_offline_only_when_told_twice() -> None:
    async def work(box: Box) -> None:
        box.ceph.stops = ["not enough monitors would be available"]
        error = await refused(box, StorageWouldStop, "not enough monitors would be available", "node.modify", "node2", offline=True)
        assert "--io-may-stop" in error.hint
        assert box.ceph.node("node2").running
        await box.do("node.modify", "node2", offline=True, io_may_stop=True)
        assert box.ceph.node("node2").running == set()
        assert box.ceph.noout == {"node2"}
        assert box.ceph.node("node2").osds, "its data is kept"
        assert node(box, "node2").storage == "stopped"
        await box.do("node.modify", "node2", offline=False)
        assert box.ceph.noout == set()
        assert node(box, "node2").storage == "joined"

    story(with_ceph, work)


def test_two_nodes_do_not_go_offline_at_the_same_time() -> None:
    """Each alone may go; both together would stop everything."""

    async def work(box: Box) -> None:
        asked = [await box.submit("node.modify", name, offline=True) for name in ("node2", "node3")]
        ended = [await box.end_of(submission.job) for submission in asked if submission.job]
        assert sorted(job.state for job in ended) == ["done", "undone"]
        error = next(job.error for job in ended if job.state == "undone")
        assert error is not None
        assert error["code"] == "storage_would_stop"

    story(with_ceph, work)


def test_a_node_that_is_dead_is_set_offline_without_asking_it() -> None:
    async def work(box: Box) -> None:
        await box.power_cut("node3")
        await asyncio.sleep(20)
        await box.do("node.modify", "node3", offline=True)
        assert node(box, "node3").storage == "stopped"
        assert box.ceph.noout == set(), "Ceph decides whether its data is copied elsewhere"
        await refused(box, NodeUnavailable, "does not answer", "node.modify", "node3", offline=False)
        await box.boot_agent("node3")
        await box.settle_reports()
        await box.do("node.modify", "node3", offline=False)

    story(with_ceph, work)


def test_what_would_lose_a_part_of_it_is_refused() -> None:
    async def work(box: Box) -> None:
        await refused(box, InUse, "has a part in a storage cluster", "node.remove", "node3")
        await box.do("group.add", name="other")
        await refused(box, InUse, "has a part in its group's storage cluster", "group.assign-nodes", "other", nodes=["node3"])

    story(with_ceph, work)


def test_a_node_that_cannot_join_is_told_of_and_joins_by_hand() -> None:
    async def work(box: Box) -> None:
        box.ceph.node("node3").problems = ["disk /dev/sdb is in use"]
        await box.do("group.assign-nodes", "default", nodes=["node3"])
        assert node(box, "node3").storage == ""
        await box.do("node.modify", "node3", offline=False)
        assert node(box, "node3").storage == "wanted"
        await settle(box)
        assert [f.about for f in await box.master.verify() if "no part in the storage cluster" in f.what] == ["node3"]
        tried = [job for job in jobs(box) if job.operation == "node.join-storage"]
        assert [job.state for job in tried] == ["undone"], "once, and then a person looks"
        box.ceph.node("node3").problems.clear()
        made = await box.do("node.join-storage", "node3")
        assert made["roles"] == ["mon", "osd"]
        assert [node(box, f"node{n}").storage_roles for n in (1, 2, 3)] == [("mon", "mgr", "osd"), ("mon", "mgr", "osd"), ("mon", "osd")]
        assert not [f for f in await box.master.verify() if "no part in the storage cluster" in f.what]
        await refused(box, AlreadyExists, "has a part in ceph already", "node.join-storage", "node3")

    async def two(box: Box) -> None:
        await with_disks(box)
        await box.do("group.add", name="away")
        await box.do("node.modify", "node3", offline=True)
        await box.do("group.assign-nodes", "away", nodes=["node3"])
        await box.do("storage.init", "default", type="ceph")

    story(two, work)


def test_who_asks_hears_from_a_node_that_answers() -> None:
    async def work(box: Box) -> None:
        await box.crash_agent("node1")
        await asyncio.sleep(20)
        said = await box.master.storage_status("ceph")
        assert (said["name"], said["health"]) == ("ceph", "HEALTH_OK")
        with pytest.raises(NotFound):
            await box.master.storage_status("none")
        await box.boot_agent("node1")

    story(with_ceph, work)


# --- nodes and disks that leave ---


def with_nodes(count: int, work: Callable[[Box], Awaitable[None]]) -> None:
    story(with_ceph, work, count)


def layout_of(box: Box) -> dict[str, Any]:
    return next(item.layout for item in box.master.state.store.all(StorageCluster))


def test_a_node_that_leaves_hands_over_its_monitor_and_manager() -> None:
    async def work(box: Box) -> None:
        made = await box.do("node.leave-storage", "node2")
        assert made["roles"] == []
        assert layout_of(box)["mons"] == ["node1", "node3", "node4"]
        assert layout_of(box)["mgrs"] == ["node1", "node3"]
        here = box.ceph.node("node2")
        assert (here.running, here.osds, here.mon, here.mgr, here.fsid) == (set(), {}, "", "", "")
        assert here.clients, "it stays a client"
        before = dump(box)
        assert (await box.do("node.leave-storage", "node2"))["unchanged"]
        assert dump(box) == before
        await box.do("node.join-storage", "node2")
        assert node(box, "node2").storage_roles == ("osd",)

    with_nodes(4, work)


def test_a_node_that_has_left_comes_back_by_itself_after_each_time() -> None:
    async def work(box: Box) -> None:
        for _ in range(2):
            await box.do("node.leave-storage", "node4")
            await box.do("node.modify", "node4", offline=True)
            await box.do("node.modify", "node4", offline=False)
            await settle(box)
            assert node(box, "node4").storage == "joined"

    with_nodes(4, work)


def test_a_node_that_is_needed_for_all_copies_does_not_leave() -> None:
    async def work(box: Box) -> None:
        error = await refused(box, InUse, "3 copies need 3 nodes with OSDs, and 2 would be left", "node.leave-storage", "node3")
        assert "atoll node add" in error.hint
        await refused(box, InUse, "these are all disks", "node.remove-storage-disks", "node3", disks=["/dev/sdb", "/dev/sdc"])
        await refused(box, NotFound, "node3 has no OSD on /dev/sdx", "node.remove-storage-disks", "node3", disks=["/dev/sdx"])

    story(with_ceph, work)


def test_nothing_leaves_that_may_have_the_last_copy() -> None:
    async def work(box: Box) -> None:
        await refused(box, NodeAnswers, "node3 answers; it is not dead", "node.leave-storage", "node3", dead=True)
        await box.power_cut("node3")
        await asyncio.sleep(20)
        await refused(box, NodeUnavailable, "node node3 does not answer", "node.leave-storage", "node3")
        error = await refused(box, InUse, "has a part in a storage cluster", "node.remove", "node3")
        assert "--drain" in error.hint
        assert "--dead" in error.hint
        box.ceph.needed = ["2 placement groups are down: what is away may have the last copy of their data"]
        for operation in ("node.leave-storage", "node.remove"):
            await refused(box, StorageWouldStop, "may have the last copy", operation, "node3", dead=True)
        box.ceph.needed = []
        await box.do("node.leave-storage", "node3", dead=True)
        # There were three nodes for three copies: the data stays with two, and nothing is moved.
        assert layout_of(box)["mons"] == ["node1", "node2"]

    story(with_ceph, work)


def test_one_node_at_a_time_and_all_others_take_part() -> None:
    async def work(box: Box) -> None:
        await box.do("node.modify", "node3", offline=True)
        await refused(box, NodeUnavailable, "node3 of the storage cluster ceph must take part", "node.leave-storage", "node2")
        await refused(box, WrongState, "the part of node node3 in ceph is stopped", "node.leave-storage", "node3")
        await box.do("node.modify", "node3", offline=False)
        asked = [await box.submit("node.leave-storage", name) for name in ("node2", "node3")]
        ended = [await box.end_of(submission.job) for submission in asked if submission.job]
        assert sorted(job.state for job in ended) == ["done", "undone"]

    with_nodes(4, work)


def test_what_is_cancelled_while_data_moves_keeps_its_disks() -> None:
    async def work(box: Box) -> None:
        before = dump(box)
        number = (await box.submit("node.leave-storage", "node2")).job
        assert number is not None
        for _ in range(1000):
            if box.ceph.out:
                break
            await asyncio.sleep(0.05)
        assert box.ceph.out, "its data moves"
        await box.master.cancel_job(number)
        assert (await box.end_of(number)).state == "undone"
        assert dump(box) == before
        assert not box.ceph.out

    with_nodes(4, work)


def test_disks_come_later_and_a_second_time_change_nothing() -> None:
    async def work(box: Box) -> None:
        made = await box.do("node.add-storage-disks", "node2", disks=["/dev/sdd", "/dev/sde"])
        assert made["health"] == "HEALTH_OK"
        assert set(box.ceph.node("node2").osds) == {"/dev/sdb", "/dev/sdc", "/dev/sdd", "/dev/sde"}
        before = dump(box)
        assert (await box.do("node.add-storage-disks", "node2", disks=["/dev/sdd"]))["unchanged"]
        assert dump(box) == before
        await refused(box, InvalidInput, "is not a device", "node.add-storage-disks", "node2", disks=["sdf"])
        await box.do("node.remove-storage-disks", "node2", disks=["/dev/sdd", "/dev/sde"])
        assert set(box.ceph.node("node2").osds) == {"/dev/sdb", "/dev/sdc"}

    story(with_ceph, work)


def test_a_failed_disk_is_left_as_it_is() -> None:
    async def work(box: Box) -> None:
        gone = next(osd for osd in layout_of(box)["osds"] if (osd["node"], osd["disk"]) == ("node2", "/dev/sdc"))
        asked = ("node.remove-storage-disks", "node2")
        await refused(box, StorageWouldStop, f"osd.{gone['number']} still answers Ceph", *asked, disks=["/dev/sdc"], dead=True)
        box.ceph.node("node2").running.discard(f"osd.{gone['number']}")
        await box.do(*asked, disks=["/dev/sdc"], dead=True)
        assert len(layout_of(box)["osds"]) == 5

    story(with_ceph, work)


def test_another_node_takes_the_place_of_a_dead_one_and_what_failed_goes_on() -> None:
    async def work(box: Box) -> None:
        await refused(box, WrongState, "cannot take the place of node3", "node.replace-storage", "node3", node="node3")
        box.ceph.needed = ["1 placement groups are incomplete: what is away may have the last copy of their data"]
        with pytest.raises(WrongState, match=r"node3 is given up: its job .* is undone: .*incomplete"):
            await box.do("node.replace-storage", "node3", node="node4")
        assert node(box, "node4").storage == "joined"
        assert node(box, "node3").storage == "joined"
        box.ceph.needed = []
        await box.do("node.replace-storage", "node3", node="node4")
        assert layout_of(box)["mons"] == ["node1", "node2", "node4"]
        before = dump(box)
        assert (await box.do("node.replace-storage", "node3", node="node4"))["unchanged"]
        assert dump(box) == before
        await box.do("node.remove", "node3")

    story(with_ceph_and_spare, work, 4)


def test_a_dry_run_tells_what_comes_and_goes_and_what_it_survives() -> None:
    async def work(box: Box) -> None:
        async def plan(operation: str, target: str, **request: Any) -> dict[str, list[str]]:
            before = dump(box)
            found = (await box.master.submit(operation, target, request, who=ROOT, dry_run=True)).plan
            assert dump(box) == before
            assert found is not None
            return found

        told = await plan("node.leave-storage", "node2")
        assert {"monitor of node2 goes", "monitor of node4 comes", "manager of node2 goes", "manager of node3 comes"} <= set(told["lines"])
        assert any(line.startswith("node2: OSD on /dev/sdb goes: its data moves") for line in told["lines"])
        assert "one node may fail, whichever: guests go on reading and writing" in told["survives"]
        told = await plan("node.add-storage-disks", "node1", disks=["/dev/sdd"])
        assert told["lines"][0] == "node1: OSD on /dev/sdd comes: its disk is erased"
        await box.do("node.leave-storage", "node2")
        await box.power_cut("node3")
        await asyncio.sleep(20)
        told = await plan("node.remove", "node3", dead=True)
        assert "there is room for 2 of 3 copies: the others are missing until there is more" in told["warnings"]
        assert not any("may fail" in line for line in told["survives"])
        told = await plan("node.replace-storage", "node3", node="node2")
        assert "monitor of node2 comes" in told["lines"]

    with_nodes(4, work)
