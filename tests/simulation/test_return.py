"""Nodes that return after they were called dead, and guests where they should not be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import Ticking, background, bounce_agents, bounce_master, check, jobs, running, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, DeadlineExceeded, PoolUnavailable, StaleGeneration
from atoll.model.messages import Call, GuestSpec
from atoll.model.objects import DeathProof, Instance, JobState
from atoll.rpc.agents import quiet


async def make(*, locking: bool = True) -> tuple[Box, str]:
    box = await Box.make(locking=locking)
    await box.add_pool()
    await running(box)
    return box, box.master.state.store.find(Instance, "web1").id


async def start_again(box: Box, node: str, instance: str, generation: int) -> Any:
    """An old order to start it, as it may still be on its way; of a job so young that its number alone refuses nothing."""
    spec = {"instance": instance, "name": "web1", "generation": generation, "memory": 1 << 30}
    args = {"spec": GuestSpec(**spec).model_dump(mode="json"), "disks": []}
    call = Call(term=box.master.state.store.term, job=10**6, step="late", method="guest.start", args=args)
    return await box.agents[node].service.handle(call, quiet)


@pytest.mark.parametrize("crash", ["", "master", "agent"])
def test_node_returns_after_a_failover(crash: str) -> None:
    async def run() -> None:
        box, web1 = await make()
        async with Ticking(box):
            generation = box.master.state.claim(web1).generation
            await box.power_cut("node1")
            await asyncio.sleep(10)
            await box.do("instance.failover", "web1", node="node2", node_is_dead=True)
            assert box.master.state.proved_dead(box.nodes["node1"])
            await box.boot_agent("node1")
            if crash == "master":
                background(bounce_master(box, 0.5))
            elif crash == "agent":
                background(bounce_agents(box, ["node1"], 0.5))
            await settle(box)
            assert not box.master.state.store.all(DeathProof)
            assert box.world.running(web1) == ["node2"]
            assert box.agents["node1"].memory.refused(web1) > generation
            for old in range(1, generation + 2):
                with pytest.raises(StaleGeneration):
                    await start_again(box, "node1", web1, old)
            # It takes part again.
            await box.do("instance.migrate", "web1", node="node1")
            assert box.world.running(web1) == ["node1"]
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("refusal", ["", "not allowed", "no answer"])
def test_storage_lets_a_node_in_again_when_its_stale_guest_is_gone(refusal: str) -> None:
    """Not a moment earlier; and a pool that cannot do it keeps no node away."""

    async def run() -> None:
        box = await Box.make(locking=False)
        await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
        await box.do("instance.add", name="web1", disks=[{"size": 1 << 30, "pool": "ceph"}], memory=1 << 30, node="node2")
        web1 = box.master.state.store.find(Instance, "web1").id
        asked: list[list[str]] = []

        async def look(node: str, method: str, phase: str) -> None:
            if method == "readmit" and phase == "before":
                asked.append(box.world.running(web1))
                if refusal == "not allowed":
                    raise PoolUnavailable("Ceph does not let user client.atoll do that")
                if refusal == "no answer":
                    raise DeadlineExceeded("no answer")

        box.disks.fault = look
        box.cut.add("node2")
        await asyncio.sleep(30)
        await box.do("instance.failover", "web1", node="node3", node_is_dead=True)
        assert sorted(box.world.running(web1)) == ["node2", "node3"], "it was only cut off"
        assert asked == []
        box.cut.discard("node2")
        await settle(box)
        assert not box.master.state.store.all(DeathProof)
        assert asked
        assert all(running == ["node3"] for running in asked)
        (job,) = [job for job in jobs(box) if job.operation == "node.readmit" and job.state is JobState.DONE]
        assert set(job.result.get("still_shut_out", {})) == ({"ceph"} if refusal else set())
        box.world.violations.clear()  # the person's word was wrong; the storage of this world cannot shut out
        await box.close()

    simulate(run)


def test_stale_guest_is_killed_where_it_is_stale_and_nowhere_else() -> None:
    """Only the link was cut, and the person was wrong; the storage could not tell. When the link is back, the old copy is killed."""

    async def run() -> None:
        box, web1 = await make(locking=False)
        box.cut.add("node1")
        await asyncio.sleep(10)
        await box.do("instance.failover", "web1", node="node2", node_is_dead=True)
        new = box.world.guests["node2", web1].pid
        assert box.world.running(web1) == ["node1", "node2"]
        # Two guests: what the question to the person named as the risk. It ends as soon as the node answers.
        box.world.violations.clear()
        box.cut.clear()
        await asyncio.sleep(5)
        assert box.world.running(web1) == ["node2"]
        assert box.world.guests["node2", web1].pid == new
        await settle(box)
        check(box)
        assert not box.master.state.store.all(DeathProof)
        assert box.agents["node1"].memory.refused(web1) >= 2
        await box.close()

    simulate(run)


def test_storage_that_tells_who_writes_refuses_the_lie() -> None:
    async def run() -> None:
        box, web1 = await make(locking=True)
        async with Ticking(box):
            box.cut.add("node1")
            await asyncio.sleep(10)
            with pytest.raises(AtollError, match="is being written by web1 on node1"):
                await box.do("instance.failover", "web1", node="node2", node_is_dead=True)
            assert box.world.running(web1) == ["node1"]
            box.cut.clear()
            await settle(box)
            assert len(box.world.running(web1)) == 1
        check(box)
        await box.close()

    simulate(run)


def test_node_called_dead_that_kept_its_claim_goes_on() -> None:
    """Nobody took the claim away: the guest is the node's, and is left alone when it returns."""

    async def run() -> None:
        box, web1 = await make()
        async with Ticking(box):
            pid = box.world.guests["node1", web1].pid
            box.cut.add("node1")
            await asyncio.sleep(10)
            await box.do("node.declare-dead", "node1")
            box.cut.clear()
            await settle(box)
            assert not box.master.state.store.all(DeathProof)
            assert box.world.guests["node1", web1].pid == pid
        check(box)
        await box.close()

    simulate(run)


def test_copy_on_a_node_without_the_claim_is_killed() -> None:
    async def run() -> None:
        box, web1 = await make()
        spec = box.world.guests["node1", web1].spec
        box.world.make(spec, "node3", incoming=True)
        await settle(box)
        assert list(box.world.guests) == [("node1", web1)]
        assert [job.state for job in jobs(box) if job.operation == "node.kill-stale"] == ["done"]
        check(box)
        await box.close()

    simulate(run)


def test_strangers_are_told_and_left_alone() -> None:
    async def run() -> None:
        box, _ = await make()
        stranger = GuestSpec(instance="i-0123456789abcdef0", name="other", generation=1, memory=1 << 30)
        box.world.make(stranger, "node3", incoming=False)
        await settle(box)
        assert box.world.running(stranger.instance) == ["node3"]
        found = [f for f in await box.master.verify() if f.what.startswith("stranger")]
        assert len(found) == 1
        assert found[0].about == "other on node3"
        await box.close()

    simulate(run)


def test_guest_that_powers_itself_off_stays_off() -> None:
    async def run() -> None:
        box, web1 = await make()
        box.world.end_guest(web1, "node1")
        await settle(box)
        assert box.world.running(web1) == []
        instance = box.master.state.store.require(Instance, web1)
        assert (instance.desired, instance.stopped_by) == ("stopped", "by the guest")
        assert box.master.state.claim(web1).holder is None
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("times", [1, 5])
def test_guest_that_dies_is_started_again_at_its_place(times: int) -> None:
    async def run() -> None:
        box, web1 = await make()
        async with Ticking(box):
            for _ in range(times):
                box.world.kill_guest(web1, "node1")
                await settle(box, 60)
                assert box.world.running(web1) == ["node1"]
        check(box)
        await box.close()

    simulate(run)


def test_guest_that_cannot_start_is_tried_again_ever_more_rarely() -> None:
    async def run() -> None:
        box, web1 = await make()
        pool = box.master.state.volumes_of(box.master.state.store.require(Instance, web1))[0][1].pool
        box.disks.lost.add(pool)
        box.world.kill_guest(web1, "node1")
        await asyncio.sleep(600)
        tries = [job for job in jobs(box) if job.operation == "instance.restart-missing"]
        assert 5 < len(tries) < 25, len(tries)
        assert all(job.state == "undone" for job in tries)
        box.disks.lost.clear()
        async with Ticking(box):
            await settle(box, 120)
            assert len(box.world.running(web1)) == 1
        check(box)
        await box.close()

    simulate(run)


def test_trouble_of_one_instance_keeps_no_other_waiting() -> None:
    """A disk of one instance is held by a job that needs attention; a guest of another dies and comes back."""

    async def run() -> None:
        box, web1 = await make()
        await running(box, "web2", node="node2", disks=[{"size": 1 << 30}])
        store = box.master.state.store
        first, second = sorted([web1, store.find(Instance, "web2").id])
        from atoll.model.objects import Hold

        disk = store.require(Instance, first).disks[0].volume
        await store.write(put=[Hold(id=f"volume:{disk}", job=1, reason="a test", commands=("atoll job info 1",))])
        for ident in (first, second):
            for node, guest in list(box.world.guests):
                if guest == ident:
                    box.world.kill_guest(guest, node)
        await asyncio.sleep(60)
        assert box.world.running(first) == []
        assert len(box.world.running(second)) == 1
        await box.close()

    simulate(run)
