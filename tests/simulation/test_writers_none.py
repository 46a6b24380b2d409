"""Storage that cannot tell who writes: while the holder's agent is silent, nothing starts the guest elsewhere without the agent's own
word, or a proof of death that a person gives and that is refused for a node that answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from simsupport import Ticking, check, everything, running, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, NeedsProof, NodeAnswers, NodeUnavailable
from atoll.model.objects import DeathProof, Instance, Pool, Writers

Silence = Callable[[Box], Awaitable[None]]


async def cut_off(box: Box) -> None:
    box.cut.add("node1")


async def agent_dead(box: Box) -> None:
    await box.crash_agent("node1")


async def power_cut(box: Box) -> None:
    await box.power_cut("node1")


async def agent_stopped(box: Box) -> None:
    """As SIGSTOP: it takes orders and never answers."""
    box.mute.add("node1")

    async def hang(phase: str, node: str, call: Any) -> None:
        if node == "node1":
            await asyncio.sleep(call.deadline + 1)

    box.link_fault = hang


async def make(silence: Silence | None, seconds: float = 10.0) -> tuple[Box, str]:
    box = await Box.make(locking=False)
    await box.add_pool()
    assert box.master.state.store.find(Pool, "shared").writers is Writers.NONE
    await running(box)
    if silence is not None:
        await silence(box)
    await asyncio.sleep(seconds)
    return box, box.master.state.store.find(Instance, "web1").id


def elsewhere(box: Box, instance: str) -> list[str]:
    return [node for node in box.world.running(instance) if node != "node1"]


COMMANDS: list[tuple[str, str, dict[str, Any]]] = [
    ("instance.start", "web1", {}),
    ("instance.start", "web1", {"node": "node2"}),
    ("instance.failover", "web1", {}),
    ("instance.failover", "web1", {"node": "node3"}),
    ("instance.migrate", "web1", {}),
    ("instance.migrate", "web1", {"node": "node2"}),
    ("instance.move", "web1", {"node": "node2"}),
    ("instance.reboot", "web1", {"type": "full"}),
    ("instance.stop", "web1", {}),
    ("instance.remove", "web1", {}),
    ("instance.recreate", "web1", {}),
    ("instance.rename", "web1", {"new_name": "www"}),
    ("instance.activate-disks", "web1", {"node": "node2"}),
    ("instance.deactivate-disks", "web1", {"node": "node2"}),
    ("instance.add-disk", "web1", {"disk": {"size": 1 << 30}}),
    ("instance.detach-disk", "web1", {"index": 1}),
    ("node.migrate", "node1", {}),
    ("node.failover", "node1", {}),
    ("node.failover", "node1", {"target": "node2"}),
    ("node.evacuate", "node1", {}),
    ("node.remove", "node1", {}),
]
#: Commands whose answer must name the risk: they are how a guest is brought to another node.
RISKY = ("instance.start", "instance.failover", "node.failover")


@pytest.mark.parametrize("silence", [cut_off, agent_dead, power_cut, agent_stopped])
def test_no_command_starts_it_elsewhere(silence: Silence) -> None:
    async def run() -> None:
        box, web1 = await make(silence)
        async with Ticking(box):
            for operation, target, request in COMMANDS:
                with pytest.raises(AtollError) as caught:
                    await box.do(operation, target, **request)
                if operation in RISKY:
                    text = caught.value.message
                    assert "node1" in text, text
                    assert "two guests will write the same disks" in text, text
                    assert "pool shared" in text, text
                    assert "cannot even tell who writes" in text, text
                    assert isinstance(caught.value, NeedsProof) or operation == "node.failover"
                    assert "--node-is-dead" in caught.value.hint or operation == "node.failover"
                assert elsewhere(box, web1) == [], operation
            # Nor does anything by itself, however long it takes: no timeout ever moves a claim.
            await asyncio.sleep(1000)
            assert elsewhere(box, web1) == []
            assert box.master.state.claim(web1).holder == box.nodes["node1"]
            assert not box.master.state.store.all(DeathProof)
            assert not box.world.violations
        await box.close()

    simulate(run, limit=20_000)


@pytest.mark.parametrize(
    ("operation", "target"),
    [("instance.start", "web1"), ("instance.failover", "web1"), ("node.failover", "node1"), ("node.declare-dead", "node1")],
)
@pytest.mark.parametrize("late", [False, True], ids=["its heartbeats arrive", "only its agent answers"])
def test_a_node_that_answers_is_not_dead(operation: str, target: str, late: bool) -> None:
    async def run() -> None:
        box, web1 = await make(None, 1.0)
        if late:
            box.mute.add("node1")
            await asyncio.sleep(20)
            assert not box.master.health.alive(box.nodes["node1"])
        request = {} if operation == "node.declare-dead" else {"node_is_dead": True}
        async with Ticking(box):
            with pytest.raises(AtollError) as caught:
                await box.do(operation, target, **request)
            assert isinstance(caught.value, NodeAnswers) or (operation == "node.failover" and "it is not dead" in caught.value.message)
            await asyncio.sleep(5)
        assert box.world.running(web1) == ["node1"]
        assert not box.master.state.store.all(DeathProof)
        assert not box.world.violations
        box.mute.clear()
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("late", [False, True], ids=["its heartbeats arrive", "only its agent answers"])
def test_resuming_a_job_does_not_call_an_answering_node_dead(late: bool) -> None:
    async def run() -> None:
        box, _ = await make(None, 1.0)
        await box.do("instance.stop", "web1", timeout=0)

        async def cut(phase: str, node: str, call: Any) -> None:
            if call.method == "guest.start":
                box.cut.add(node)

        box.link_fault = cut
        number = (await box.submit("instance.start", "web1", node="node1")).job
        assert number is not None
        assert (await box.end_of(number)).state == "needs-attention"
        box.link_fault = None
        box.cut.clear()
        if late:
            box.mute.add("node1")
        await asyncio.sleep(10)
        with pytest.raises(NodeAnswers):
            await box.master.resume_job(number, node_is_dead="node1")
        assert not box.master.state.store.all(DeathProof)
        await box.close()

    simulate(run)


def test_proof_lets_it_start_elsewhere_and_stands_for_that_node_only() -> None:
    async def run() -> None:
        box, web1 = await make(power_cut)
        await running(box, "web2", node="node2", disks=[{"size": 1 << 30}])
        async with Ticking(box):
            await box.do("instance.failover", "web1", node="node3", node_is_dead=True)
            assert box.world.running(web1) == ["node3"]
            assert [proof.id for proof in box.master.state.store.all(DeathProof)] == [box.nodes["node1"]]
            box.cut.add("node2")
            await asyncio.sleep(10)
            with pytest.raises(NeedsProof):
                await box.do("instance.failover", "web2", node="node3")
            box.cut.clear()
            await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_the_agents_own_word_is_enough() -> None:
    """The guest died, its node answers: by the agent's acknowledgement it starts elsewhere, and the node refuses what it promised."""

    async def run() -> None:
        box, web1 = await make(None, 1.0)
        generation = box.master.state.claim(web1).generation
        box.world.kill_guest(web1, "node1")
        await box.settle_reports()
        await box.do("instance.start", "web1", node="node2")
        assert box.world.running(web1) == ["node2"]
        assert box.agents["node1"].memory.refused(web1) == generation
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_refusals_leave_nothing_behind() -> None:
    async def run() -> None:
        box, _ = await make(cut_off)
        before = everything(box)
        for operation, target, request in COMMANDS:
            if operation.startswith("instance.") and operation != "instance.move":
                with pytest.raises(AtollError):
                    await box.submit(operation, target, **request)
        with pytest.raises(NodeUnavailable):
            await box.submit("node.evacuate", "node1")
        assert everything(box) == before
        await box.close()

    simulate(run)
