"""Orders that come twice, late, or not at all; answers that are lost; links that are cut; masters that were replaced; clocks that jump."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from simstories import STORIES
from simsupport import Story, Striker, Ticking, background, bounce_master, check, dump, everything, finish, jobs, running, sample, settle
from test_failures import LAST, Failing

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, GuestError, NotLeader, StaleGeneration, StaleTerm, StepUndone, Unreachable
from atoll.model.messages import Call
from atoll.model.objects import Claim, Instance, Node
from atoll.rpc.agents import quiet

pytestmark = pytest.mark.timeout(300)
Link = Callable[[str, str, Call], Awaitable[None]]


def play(story: Story, link: Callable[[Box], Link], *, after: Callable[[Box], Awaitable[None]] | None = None) -> list[str]:
    """Run the story over a bad link, let it end, and check everything. Gives the states of all its jobs."""

    async def run() -> list[str]:
        box = await story.make()
        before = dump(box)
        async with Ticking(box):
            first = len(jobs(box))
            box.link_fault = link(box)
            number = await story.submit(box, "the key")
            job = await box.end_of(number)
            await asyncio.sleep(400 if box.cut else 0)
            job = await finish(box, number)
            box.link_fault = None
            for other in jobs(box):
                await finish(box, other.number)
            await settle(box)
            if after is not None:
                await after(box)
        if not story.broken or job.state == "done":
            check(box, free=story.frees, marks=story.name == "pool-remove")
        if job.state == "undone" and not story.partial and not story.frees:
            # An instance whose claim an agent's word had freed may have been started again on another node.
            assert _lasting(story.undone(dump(box))) == _lasting(story.undone(before)), "undone, but something has changed"
        await box.close()
        return [str(job.state) for job in jobs(box)[first:]]

    return simulate(run, limit=20_000)


def _lasting(found: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in found.items() if not key.startswith("claim:")}
    return {key: {k: v for k, v in value.items() if k != "home"} for key, value in kept.items()}


# --- duplicates ---


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_order_comes_twice_and_late_again(story: Story) -> None:
    sent: list[tuple[str, Call]] = []
    copies: set[tuple[str, int, str, bool, str]] = set()

    def link(box: Box) -> Link:
        async def fault(phase: str, node: str, call: Call) -> None:
            name = (node, call.job, call.step, call.undo, phase)
            if call.job and name not in copies:
                copies.add(name)
                sent.append((node, call))
                # Once beside the order, and once when it has been answered.
                background(again(box, node, call))
            await asyncio.sleep(0)

        return fault

    async def again(box: Box, node: str, call: Call) -> None:
        try:
            await box.agents[node].service.handle(call, quiet)
        except AtollError:
            return

    async def late(box: Box) -> None:
        before, guests, images = everything(box), set(box.world.guests), str(box.disks.images)
        for node in box.agents:  # every agent has heard that the job has ended
            if box.master.state.store.get(Node, box.nodes[node]) is not None:
                await box.master.agents.ask(box.nodes[node], "guest.list")
        for node, call in sent:
            if node in box.agents:
                with pytest.raises((StepUndone, StaleGeneration, StaleTerm)):
                    await box.agents[node].service.handle(call, quiet)
        await asyncio.sleep(5)
        assert (set(box.world.guests), str(box.disks.images)) == (guests, images)
        assert everything(box) == before

    states = play(story, link, after=late)
    assert states[0] == "done", states
    assert sent or story.records


@pytest.mark.parametrize("name", sorted(LAST))
def test_an_order_that_was_undone_comes_again(name: str) -> None:
    """The network brings a copy of each order behind its undo, while its job is still being undone."""
    story = next(s for s in STORIES if s.name == name)

    async def run() -> None:
        box = await story.make()
        before = dump(box)
        sent: dict[tuple[str, int, str], Call] = {}
        refused = 0

        async def fault(phase: str, node: str, call: Call) -> None:
            nonlocal refused
            key = (node, call.job, call.step)
            if call.job and not call.undo:
                sent.setdefault(key, call)
            elif call.undo and phase == "reply" and key in sent:
                with pytest.raises(StepUndone):
                    await box.agents[node].service.handle(sent[key], quiet)
                refused += 1

        box.link_fault = fault
        async with Ticking(box):
            Failing(box, LAST[name], GuestError)
            job = await box.end_of(await story.submit(box))
            assert job.state == "undone", (job.state, job.reason)
            assert refused
            box.link_fault = None
            await settle(box)
        check(box)
        assert _lasting(dump(box)) == _lasting(before)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_first_answer_to_every_order_is_lost(story: Story) -> None:
    def link(box: Box) -> Link:
        lost: set[tuple[str, int, str, bool]] = set()

        async def fault(phase: str, node: str, call: Call) -> None:
            name = (node, call.job, call.step, call.undo)
            if phase == "reply" and call.job and name not in lost:
                lost.add(name)
                raise Unreachable("the answer is lost")

        return fault

    assert play(story, link)[0] == "done"


# --- cut links ---


def orders(story: Story) -> list[tuple[str, str, str]]:
    """(node, step, method) of every order of an undisturbed run."""

    async def run() -> list[tuple[str, str, str]]:
        box = await story.make()
        found: dict[tuple[str, str, str], None] = {}

        async def fault(phase: str, node: str, call: Call) -> None:
            if call.job:
                found[node, call.step, call.method] = None

        box.link_fault = fault
        await box.end_of(await story.submit(box))
        await box.close()
        return list(found)

    return simulate(run)


def cut_case(story: Story, order: tuple[str, str, str], phase: str, seconds: float) -> list[str]:
    def link(box: Box) -> Link:
        done = []

        async def heal(node: str) -> None:
            await asyncio.sleep(seconds)
            box.cut.discard(node)

        async def fault(now: str, node: str, call: Call) -> None:
            if not done and now == phase and (node, call.step, call.method) == order:
                done.append(node)
                box.cut.add(node)
                background(heal(node))

        return fault

    return play(story, link)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_link_is_cut_at_every_order(story: Story) -> None:
    bad = []
    cases = [(order, phase, seconds) for order in orders(story) for phase in ("request", "reply") for seconds in (4.0, 400.0)]
    for order, phase, seconds in sample(cases, story.name):
        try:
            states = cut_case(story, order, phase, seconds)
            if seconds < 5 and story.ends == ("done",):
                assert states[0] == "done", states
        except Exception as problem:  # noqa: BLE001 - all cases are told, not only the first
            bad.append(f"cut for {seconds:g} s at the {phase} of {order}: {type(problem).__name__}: {problem}")
    assert not bad, f"{len(bad)} cases:\n" + "\n".join(bad[:20])


# --- the start order that hangs in the network past a failover ---


class Held:
    """Holds the first order of a method to a node in the network, until it is let go."""

    def __init__(self, box: Box, node: str, method: str) -> None:
        self.box, self.node, self.method = box, node, method
        self.call: Call | None = None
        box.link_fault = self.fault

    async def fault(self, phase: str, node: str, call: Call) -> None:
        if self.call is None and phase == "request" and (node, call.method) == (self.node, self.method):
            self.call = call
            self.box.cut.add(node)
            raise Unreachable("it hangs in the network")

    async def deliver(self) -> Any:
        """Now it comes after all."""
        assert self.call is not None
        return await self.box.agents[self.node].service.handle(self.call, quiet)


async def move_away_from(box: Box, number: int, node: str) -> None:
    """A person says that the node is dead, though only its link is; then the instance is started elsewhere."""
    job = await box.end_of(number)
    if job.state == "needs-attention":
        await box.master.resume_job(number, node_is_dead=node)
        job = await box.end_of(number)
    if "is being written" in job.reason:
        # The storage knows better: the target's paused guest has the disks. Once the node is back, the copy is ended there.
        assert box.world.locking
        box.cut.discard(node)
        await asyncio.sleep(15)
        job = await finish(box, number)
    assert job.state in ("undone", "done"), job.reason
    store = box.master.state.store
    web1 = store.find(Instance, "web1")
    claim = box.master.state.claim(web1.id)
    if claim.holder is None and web1.desired == "stopped":
        await box.do("instance.start", "web1")
    elif claim.holder == box.nodes[node]:
        await box.do("instance.failover", "web1", node_is_dead=True)
    await settle(box, 10)
    claim = store.require(Claim, web1.id)
    assert claim.holder is not None
    assert node in box.agents
    assert claim.holder != box.nodes[node] or node not in box.cut


@pytest.mark.parametrize("when", ["while it is cut off", "as soon as it is back", "once it is readmitted"])
@pytest.mark.parametrize("method", ["guest.start", "guest.resume"])
@pytest.mark.parametrize("locking", [True, False], ids=["locks", "no locks"])
def test_start_that_arrives_after_the_claim_has_moved(locking: bool, method: str, when: str) -> None:
    """A's start order hangs, the claim moves to B by a person's word, the order arrives at A: it has no effect."""

    async def run() -> None:
        box = await Box.make(locking=locking)
        await box.add_pool()
        await running(box, node="node1")
        if method == "guest.start":
            await box.do("instance.stop", "web1", timeout=0)
            held = Held(box, "node1", method)
            number = (await box.submit("instance.start", "web1", node="node1")).job
            node = "node1"
        else:
            node = "node2"
            held = Held(box, node, method)
            number = (await box.submit("instance.migrate", "web1", node=node)).job
        assert number is not None
        async with Ticking(box):
            await move_away_from(box, number, node)
            web1 = box.master.state.store.find(Instance, "web1").id
            here = box.world.running(web1)
            assert len(here) == 1
            assert here != [node] or node not in box.cut
            if when == "as soon as it is back":
                box.cut.discard(node)
            elif when == "once it is readmitted":
                box.cut.discard(node)
                await asyncio.sleep(15)
            with pytest.raises((StaleGeneration, StepUndone, Unreachable)):
                await held.deliver()
            assert box.world.running(web1) == here
            assert not box.world.violations
            box.cut.discard(node)
            await settle(box)
            assert box.world.running(web1) == here
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("locking", [True, False], ids=["locks", "no locks"])
def test_slow_agent_does_not_start_what_it_began_before_it_was_cut_off(locking: bool) -> None:
    """A's agent has the order, and its storage hangs while it attaches; meanwhile the claim moves to B."""

    async def run() -> None:
        box = await Box.make(locking=locking)
        await box.add_pool()
        await running(box, start=False)
        going = asyncio.Event()

        async def hang(node: str, method: str, phase: str) -> None:
            if node == "node1" and method == "connector attach" and not going.is_set():
                box.cut.add("node1")
                await going.wait()

        box.disks.fault = hang
        number = (await box.submit("instance.start", "web1", node="node1")).job
        assert number is not None
        async with Ticking(box):
            await move_away_from(box, number, "node1")
            web1 = box.master.state.store.find(Instance, "web1").id
            here = box.world.running(web1)
            going.set()
            await asyncio.sleep(5)
            assert box.world.running(web1) == here
            box.cut.clear()
            await settle(box)
            assert box.world.running(web1) == here
        check(box)
        await box.close()

    simulate(run)


# --- two masters ---


@pytest.mark.parametrize("story", [s for s in STORIES if not s.internal], ids=lambda story: story.name)
def test_replaced_master_has_no_effect(story: Story) -> None:
    """Another master takes over at each order, and the old one goes on: its writes and orders are refused, and the new one ends the job."""

    async def run(turn: int) -> bool:
        box = await story.make()
        old = box.master
        count = 0

        async def fault(phase: str, node: str, call: Call) -> None:
            nonlocal count
            if not call.job or box.leader is not old:
                return
            count += 1
            if count == turn + 1:
                box.leader = None
                box.store = None
                await box.boot_master()

        box.link_fault = fault
        async with Ticking(box):
            number = await story.submit(box, "the key")
            job = await box.end_of(number)
            if box.leader is old:
                await box.close()
                return False
            job = await finish(box, number)
            assert job.state in story.ends, (job.state, job.error, job.reason)
            assert box.master is not old
            with pytest.raises((NotLeader, StaleTerm)):
                await old.state.store.write(put=[old.state.cluster.model_copy(update={"name": "mine"})])
            for node in box.agents:
                with pytest.raises(StaleTerm):
                    await old.agents.ask(box.nodes[node], "guest.list")
            await settle(box)
        check(box, free=story.frees)
        await old.stop()
        await box.close()
        return True

    turn = 0
    while simulate(lambda turn=turn: run(turn)):  # type: ignore[misc]
        turn += 2


# --- clocks ---


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 10 * 365 * 86400.0])
@pytest.mark.parametrize("story", [s for s in STORIES if not s.internal], ids=lambda story: story.name)
def test_clock_jumps_change_nothing(story: Story, jump: float) -> None:
    """The wall clock jumps in the middle, and the master is killed then, so that it begins again by its records alone."""

    async def run() -> None:
        box = await story.make()

        class Leaping(Striker):
            async def point(self, name: str) -> None:
                await super().point(name)
                if len(self.seen) == 6:
                    box.clock.offset += jump
                    background(bounce_master(box))

        with Leaping(box):
            async with Ticking(box):
                number = await story.submit(box, "the key")
                job = await box.end_of(number)
                assert job.state in story.ends, (job.state, job.error)
                await settle(box)
        check(box, free=story.frees)
        await box.close()

    simulate(run)
