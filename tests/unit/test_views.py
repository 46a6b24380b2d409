"""What people see, for every state that things can be in."""

from __future__ import annotations

import time
from typing import Any

import pytest
from rest_fakes import GROUP, NODES, SHARED, FakeLeader, cluster_objects, fake_leader, ident

from atoll.model.errors import NotFound
from atoll.model.messages import GuestStatus, Space
from atoll.model.objects import (
    Claim,
    Cluster,
    DeathProof,
    Disk,
    Hold,
    Instance,
    Job,
    JobState,
    Locks,
    Migration,
    Node,
    Pool,
    Stored,
    Volume,
    VolumeState,
)
from atoll.operations import views
from atoll.operations.index import Index

WEB = ident("i", 1)


async def row(leader: FakeLeader, noun: str, name: str, **index: Any) -> views.Row:
    found = views.find(leader.state, noun, name)
    return views.KINDS[noun][1](found, Index(leader.state, **index))


def report(leader: FakeLeader, node: int, state: str | None, reason: str = "") -> None:
    """Let a node report web1 in that state, or not at all."""
    ident_ = NODES[node - 1].id
    guests = [GuestStatus.model_validate({"instance": WEB, "state": state, "reason": reason, "generation": 3})] if state else []
    leader.health.reports[ident_] = leader.health.reports[ident_].model_copy(update={"guests": guests})


async def put(leader: FakeLeader, *items: Stored) -> None:
    await leader.state.store.write(put=items)


def running_job(operation: str = "instance.start") -> Job:
    return Job(id="0000000007", operation=operation, state=JobState.RUNNING, locks=Locks(exclusive=(f"instance:{WEB}",)))


@pytest.mark.parametrize(
    ("guest", "reason", "shown", "why"),
    [
        ("running", "", "running", ""),
        ("paused", "no space", "paused", "no space"),
        ("hung", "QMP is silent", "hung", "QMP is silent"),
        ("incoming", "", "migrating", ""),
        ("shutdown", "", "stopped", "by the guest"),
        ("gone", "", "error", "should run on node1, but does not"),
        (None, "", "error", "should run on node1, but does not"),
    ],
)
async def test_a_claimed_instance_is_what_its_node_reports(guest: str | None, reason: str, shown: str, why: str) -> None:
    leader = await fake_leader()
    report(leader, 1, guest, reason)
    found = await row(leader, "instance", "web1")
    assert (found["state"], found["reason"], found["node"]) == (shown, why, "node1")


async def test_an_instance_whose_node_does_not_answer_is_unreachable_whatever_it_said_last() -> None:
    leader = await fake_leader()
    leader.health.dead.add(NODES[0].id)
    found = await row(leader, "instance", "web1")
    assert (found["state"], found["reason"]) == ("unreachable", "its node node1 does not answer")
    await put(leader, DeathProof(id=NODES[0].id, method="human", who="ada", at=1.0))
    assert (await row(leader, "instance", "web1"))["reason"] == "its node node1 is dead"


async def test_a_running_job_explains_what_is_between_states() -> None:
    leader = await fake_leader()
    report(leader, 1, None)
    await put(leader, running_job())
    found = await row(leader, "instance", "web1")
    assert (found["state"], found["reason"], found["job"]) == ("starting", "job 7", 7)
    report(leader, 1, "running")
    web = leader.state.store.require(Instance, WEB)
    await put(leader, web.model_copy(update={"desired": "stopped"}))
    assert (await row(leader, "instance", "web1"))["state"] == "stopping"


async def test_an_instance_that_should_be_stopped_but_runs_says_so() -> None:
    leader = await fake_leader()
    web = leader.state.store.require(Instance, WEB)
    await put(leader, web.model_copy(update={"desired": "stopped"}))
    found = await row(leader, "instance", "web1")
    assert (found["state"], found["reason"]) == ("running", "should be stopped")


async def test_without_a_claim_it_is_stopped_starting_or_missing() -> None:
    leader = await fake_leader()
    assert (await row(leader, "instance", "db1"))["state"] == "stopped"
    await put(leader, Claim(id=WEB, generation=4))
    assert (await row(leader, "instance", "web1"))["state"] == "error"
    await put(leader, running_job())
    assert (await row(leader, "instance", "web1"))["state"] == "starting"


async def test_a_migration_shows_both_ends() -> None:
    leader = await fake_leader()
    await put(leader, Claim(id=WEB, holder=NODES[0].id, generation=3, migration=Migration(target=NODES[1].id, job=7)))
    found = await row(leader, "instance", "web1")
    assert (found["state"], found["reason"]) == ("migrating", "to node2, job 7")
    assert found["claim"] == {"holder": "node1", "generation": 3, "migration": {"target": "node2", "job": 7}}


async def test_the_disks_of_an_instance() -> None:
    leader = await fake_leader()
    found = await row(leader, "instance", "web1")
    assert found["disks"] == [
        {
            "index": 0,
            "volume": ident("vol", 1),
            "name": "web1-0",
            "pool": "images",
            "driver": "sharedfile",
            "size": 10 << 30,
            "access": None,
            "access_way": None,
            "access_next": "userspace",
            "mode": "rw",
            "slot": 0,
            "node": None,
        }
    ]
    assert found["disk_size"] == 10 << 30
    assert (found["generation"], found["tags"], found["hold"]) == (3, ["env:prod"], None)


async def test_a_hold_is_shown_with_its_commands() -> None:
    leader = await fake_leader()
    await put(leader, Hold(id=f"instance:{WEB}", job=9, reason="node1 is silent", commands=("atoll job resume 9",)))
    found = await row(leader, "instance", "web1")
    assert found["hold"] == {"job": 9, "reason": "node1 is silent", "commands": ["atoll job resume 9"]}


async def test_node_states_worst_first() -> None:
    leader = await fake_leader()
    node = NODES[0]

    async def state() -> str:
        return str((await row(leader, "node", "node1"))["state"])

    assert await state() == "ok"
    await put(leader, node.model_copy(update={"ready": False}))
    assert await state() == "joining"
    await put(leader, node.model_copy(update={"drained": True}))
    assert await state() == "drained"
    leader.health.dead.add(node.id)
    assert await state() == "unreachable"
    await put(leader, node.model_copy(update={"offline": True}))
    assert await state() == "offline"
    await put(leader, DeathProof(id=node.id, method="human", who="ada", at=1.0))
    assert await state() == "dead-proved"


async def test_a_nodes_disk_space_is_that_of_its_local_pools_only() -> None:
    leader = await fake_leader()
    assert (await row(leader, "node", "node1"))["disk_free"] is None
    spaces = {
        (SHARED.id, ""): Space(total=1000, free=900),
        (SHARED.id, NODES[2].id): Space(total=1000, free=900),
        (ident("pool", 2), NODES[0].id): Space(total=100, free=30),
        (ident("pool", 2), NODES[1].id): Space(total=50, free=20),
    }
    found = await row(leader, "node", "node1", spaces=spaces)
    assert (found["disk_total"], found["disk_free"]) == (100, 30)
    local = await row(leader, "pool", "local", spaces=spaces)
    assert (local["total"], local["free"]) == (150, 50)
    assert local["space_on"] == {"node1": {"total": 100, "free": 30}, "node2": {"total": 50, "free": 20}}
    assert (await row(leader, "node", "node3", spaces=spaces))["disk_total"] is None
    del spaces[SHARED.id, NODES[2].id]
    shared = await row(leader, "pool", "images", spaces=spaces)
    assert (shared["total"], shared["free"], shared["space_on"]) == (1000, 900, {})


async def test_guests_and_claims_of_a_node_are_counted() -> None:
    leader = await fake_leader()
    found = await row(leader, "node", "node1")
    assert (found["guests"], found["claims"], found["secondaries"]) == (1, 1, 0)
    web = leader.state.store.require(Instance, WEB)
    await put(leader, web.model_copy(update={"secondary": NODES[2].id}))
    assert (await row(leader, "node", "node3"))["secondaries"] == 1
    await put(leader, Claim(id=WEB, holder=NODES[0].id, generation=3, migration=Migration(target=NODES[1].id, job=7)))
    assert (await row(leader, "node", "node2"))["claims"] == 1


async def test_a_node_that_never_reported_has_unknown_memory() -> None:
    leader = await fake_leader()
    del leader.health.reports[NODES[2].id]
    found = await row(leader, "node", "node3")
    assert (found["state"], found["memory_total"], found["last_seen"], found["guests"]) == ("unreachable", None, None, 0)


async def test_a_pool_counts_its_volumes_and_tells_where_it_is_stalled() -> None:
    leader = await fake_leader()
    stalled = {"stalled_pools": {SHARED.id: "NFS does not answer"}}
    leader.health.reports[NODES[1].id] = leader.health.reports[NODES[1].id].model_copy(update=stalled)
    found = await row(leader, "pool", "images")
    assert (found["volumes"], found["promised"], found["writers"]) == (2, 11 << 30, "advisory")
    assert found["stalled"] == {"node2": "NFS does not answer"}
    assert found["capabilities"]["mirrored"] is True
    assert found["capabilities"]["node_local"] is False
    assert (await row(leader, "pool", "local"))["capabilities"]["node_local"] is True


async def test_a_volume_has_attachments_as_in_ebs() -> None:
    leader = await fake_leader()
    found = await row(leader, "volume", "web1-0")
    assert found["state"] == "in-use"
    assert found["attachments"] == [{"instance": "web1", "instance_id": WEB, "index": 0, "slot": 0, "mode": "rw"}]
    attached = leader.state.store.require(Volume, ident("vol", 1)).model_copy(update={"state": VolumeState.AVAILABLE})
    await put(leader, attached)
    assert (await row(leader, "volume", "web1-0"))["state"] == "in-use"
    spare = await row(leader, "volume", "spare")
    assert (spare["state"], spare["attachments"], spare["instance"]) == ("available", [], None)


async def test_a_volume_of_a_removed_instance_still_has_a_row() -> None:
    leader = await fake_leader()
    volume = Volume(id=ident("vol", 8), name="odd", pool="pool-gone", size=5, state=VolumeState.ERROR, instance="i-gone", node="node-gone")
    await put(leader, volume)
    found = await row(leader, "volume", "odd")
    assert (found["pool"], found["instance"], found["node"], found["driver"]) == ("pool-gone", "i-gone", "node-gone", None)


async def test_cluster_and_group_count() -> None:
    leader = await fake_leader()
    await put(leader, running_job(), Job(id="0000000008", operation="x.y", state=JobState.NEEDS_ATTENTION))
    found = views.cluster(leader.state)
    assert (found["name"], found["nodes"], found["nodes_alive"], found["volumes"]) == ("lagoon", 3, 3, 3)
    assert (found["jobs_active"], found["jobs_needing_attention"]) == (1, 1)
    group = await row(leader, "group", "default")
    assert (group["nodes"], group["instances"], group["pools"]) == (["node1", "node2", "node3"], 2, ["images", "local"])


async def test_jobs_come_newest_first_and_in_pages() -> None:
    leader = await fake_leader()
    await put(leader, *(Job(id=f"{number:010d}", operation="x.y", summary=f"job {number}") for number in range(1, 6)))
    first, after = views.rows(leader.state, "job", limit=2)
    assert ([job["id"] for job in first], after) == ([5, 4], "4")
    rest, after = views.rows(leader.state, "job", after="4")
    assert ([job["id"] for job in rest], after) == ([3, 2, 1], None)
    with pytest.raises(NotFound):
        views.find(leader.state, "job", "seven")


async def test_locks_of_a_job_are_shown_by_name() -> None:
    leader = await fake_leader()
    locks = Locks(shared=(f"node:{NODES[0].id}", "pool:gone"), exclusive=(f"instance:{WEB}",))
    await put(leader, Job(id="0000000001", operation="x.y", locks=locks))
    found = await row(leader, "job", "1")
    assert found["locks"] == {"shared": ["node:node1", "pool:gone"], "exclusive": ["instance:web1"]}


async def test_a_job_is_shown_without_a_look_at_all_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request that waits for its job is answered with it: that must not take longer in a larger cluster."""
    leader = await fake_leader()
    read: list[type[Stored]] = []
    everything = leader.state.store.all
    monkeypatch.setattr(leader.state.store, "all", lambda kind: read.append(kind) or everything(kind))
    await put(leader, running_job())
    assert (await row(leader, "job", "7"))["locks"]["exclusive"] == ["instance:web1"]
    assert not {Volume, Instance} & set(read)


async def test_ten_thousand_instances_take_a_few_seconds_at_most() -> None:
    objects = [item for item in cluster_objects() if isinstance(item, (Cluster, Node, Pool)) or item is GROUP]
    for number in range(1, 10_001):
        volume = Volume(id=ident("vol", number), name=f"v{number}", pool=SHARED.id, size=1 << 30, instance=ident("i", number))
        instance = Instance(
            id=ident("i", number),
            name=f"i{number:05d}",
            group=GROUP.id,
            memory=1 << 27,
            disks=(Disk(volume=volume.id, slot=0),),
            desired="running",
        )
        objects += [volume, instance, Claim(id=instance.id, holder=NODES[number % 3].id, generation=1)]
    leader = await fake_leader(objects)
    began = time.monotonic()
    rows, after = views.rows(leader.state, "instance")
    taken = time.monotonic() - began
    assert (len(rows), after) == (10_000, None)
    # It takes 0.1 s on a calm machine; a view that reads a kind once per row would take minutes.
    assert taken < 5
