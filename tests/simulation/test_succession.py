"""The master is lost at every transaction of an operation, for good; a new one begins with a copy that lacks the last changes.

Whatever the copy lacks: no two writers, no running guest is killed, everything that is found and that no record owns is reported.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass

import pytest
from simsupport import STORIES, Story, Ticking, check, settle

from atoll.lab.box import Box, simulate
from atoll.master.recall import recall
from atoll.master.revive import JUMP
from atoll.master.succession import rebuild, settled, take_term
from atoll.model.errors import AtollError, NeedsProof, StoreError
from atoll.model.objects import Claim, Hold, Instance, Job, JobState, Node, Volume
from atoll.model.units import GIB
from atoll.store.contract import Entry, Transaction
from atoll.store.memory import Durable, MemoryStore

pytestmark = pytest.mark.timeout(600)
LAGS = (0, 1, 2, 4, 8, 100)
#: Cases of each story that are tried every time; ``ATOLL_EVERY_MOMENT=1`` tries all of them, in about ten minutes.
SAMPLE = 5
CHOSEN = [s for s in STORIES if s.name not in ("pool-add", "pool-add-local", "pool-remove", "pool-check")]


@dataclass
class History:
    """The store as it was after each transaction."""

    box: Box
    kill_at: int = -1
    phase: str = ""

    def __post_init__(self) -> None:
        assert self.box.store is not None
        self.store, self.real, self.count, self.lost = self.box.store, self.box.store.transact, 0, False
        self.copies: list[dict[str, Entry]] = [dict(self.box.durable.entries)]
        self.store.transact = self.transact  # type: ignore[method-assign]

    async def transact(self, transaction: Transaction) -> int:
        self.count += 1
        last = self.count - 1 == self.kill_at
        if last and self.phase == "before":
            self.lose()
        revision = await self.real(transaction)
        self.copies.append(dict(self.box.durable.entries))
        if last:
            self.lose()
        return revision

    def lose(self) -> None:
        """The master's machine is gone, with its disk."""
        self.store.crash()
        self.lost = True
        raise StoreError("the master dies here")


async def succeed(box: Box, copy: dict[str, Entry], *, dead: tuple[str, ...] = (), me: str = "node2") -> list[str]:
    """What ``atoll cluster master-failover`` does on a candidate, with this copy."""
    entries = {key: entry.value for key, entry in copy.items()}
    nodes = {n.id: n for n in (Node.model_validate_json(value) for key, value in entries.items() if key.startswith("nodes/"))}
    facts = await recall(box.transport, nodes.values(), 2.0)
    own = nodes[box.nodes[me]]
    term = max(fact.term for fact in facts.values()) + JUMP
    await take_term(box.transport, nodes, own.id, facts, term)
    facts = await settled(box.transport, nodes, own.id, facts)
    durable = Durable()
    gone = {box.nodes[name] for name in dead}
    revived = await rebuild(MemoryStore(durable=durable), entries, term, own, facts, gone, "cluster.master-failover", box.clock)
    box.durable = durable
    await box.boot_master()
    return revived.lines


def held(box: Box) -> set[str]:
    return {hold.id for hold in box.master.state.store.all(Hold)}


async def look(box: Box, alive: dict[str, set[str]]) -> None:
    """What must hold after the succession. ``alive``: instance -> nodes on which it ran then."""
    store = box.master.state.store
    assert not box.world.violations, box.world.violations
    for instance, before in alive.items():
        now = box.world.running(instance)
        assert now or f"instance:{instance}" in held(box), f"{instance} ran on {before}, and runs nowhere"
        known = store.get(Instance, instance)
        if known is not None and f"instance:{instance}" not in held(box):
            claim = store.require(Claim, instance)
            assert [box.nodes[n] for n in now] == [claim.holder], (now, claim)
            assert known.desired == "running"
    findings = [(f.what, f.about) for f in await box.master.verify()]
    owned = {volume.id for volume in store.all(Volume)}
    for images in box.disks.images.values():
        for name, image in images.items():
            if image["volume"] not in owned:
                assert any(name in about for _, about in findings), f"nobody tells of {name}: {findings}"
    for (node, ident), guest in box.world.guests.items():
        if store.get(Instance, ident) is None and node in box.agents:
            assert any(ident in about or guest.spec.name in about for _, about in findings), f"nobody tells of {ident}: {findings}"
    assert not [job for job in store.all(Job) if job.state.active]
    assert not [c for c in store.all(Claim) if c.migration is not None and f"instance:{c.id}" not in held(box)]


async def lose_master(story: Story, kill_at: int, phase: str) -> tuple[Box, History, int]:
    """A cluster whose master was lost at that transaction of the story, or after its end. Gives the transactions until then."""
    box = await story.make()
    history = History(box, kill_at, phase)
    try:
        number = await story.submit(box, "")
        while not history.lost and not (job := await box.master.engine.wait(number, 1.0)).state.ended:
            if job.state is JobState.NEEDS_ATTENTION:
                break
    except AtollError:
        assert history.lost
    total = history.count
    await box.crash_master()
    await asyncio.sleep(0.3)
    return box, history, total


def count(story: Story) -> int:
    async def run() -> int:
        box, _, total = await lose_master(story, -1, "")
        await box.close()
        return total

    return simulate(run)


def run_case(story: Story, number: int, phase: str, lag: int) -> None:
    async def run() -> None:
        box, history, _ = await lose_master(story, number, phase)
        async with Ticking(box):
            await asyncio.sleep(3.0)  # a migration's watchdog needs that
            begun = {i for (_, i), g in box.world.guests.items() if g.state == "running" and g.node in box.agents}
            alive = {i: set(box.world.running(i)) for i in begun}
            copy = history.copies[max(0, len(history.copies) - 1 - lag)]
            await succeed(box, copy, dead=tuple(name for name in box.nodes if name not in box.agents))
            await settle(box)
            await look(box, alive)
        await box.close()

    try:
        simulate(run)
    except BaseException as error:
        error.add_note(f"{story.name}: the master is lost {phase} transaction {number}; the copy lacks {lag}")
        raise


@pytest.mark.parametrize("story", CHOSEN, ids=lambda s: s.name)
def test_lost_at_any_moment(story: Story) -> None:
    rng = random.Random(story.name)
    total = count(story)
    cases = [(number, phase, lag) for number in range(total + 1) for phase in ("before", "after") for lag in LAGS]
    for case in rng.sample(cases, min(SAMPLE, len(cases))):
        run_case(story, *case)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ATOLL_EVERY_MOMENT"), reason="set ATOLL_EVERY_MOMENT=1: it takes ten minutes")
@pytest.mark.parametrize("story", CHOSEN, ids=lambda s: s.name)
def test_lost_at_every_moment(story: Story) -> None:
    for number in range(count(story) + 1):
        for phase in ("before", "after"):
            for lag in LAGS:
                run_case(story, number, phase, lag)


# --- nodes that cannot be asked ---


async def lose_with(
    box: Box, *, cut: tuple[str, ...] = (), power: tuple[str, ...] = (), lag: int = 0, history: History
) -> dict[str, Entry]:
    """The master is gone; these nodes cannot be asked, or have lost power."""
    await box.crash_master()
    box.cut |= set(cut)
    for name in power:
        await box.power_cut(name)
    await asyncio.sleep(8.0)
    return history.copies[max(0, len(history.copies) - 1 - lag)]


async def begin() -> tuple[Box, History]:
    box = await Box.make()
    await box.add_pool()
    await box.do("instance.add", name="web1", disks=[{"size": GIB}], memory=GIB, node="node3", template="shared", start=False)
    return box, History(box)


def guest(box: Box) -> Instance:
    return box.master.state.store.find(Instance, "web1")


def test_started_unshipped_on_a_node_that_is_silent_it_is_neither_started_elsewhere_nor_killed() -> None:
    async def story() -> None:
        box, history = await begin()
        ident = guest(box).id
        before = history.count
        await box.do("instance.start", "web1", node="node3")
        copy = await lose_with(box, cut=("node3",), lag=history.count - before, history=history)
        async with Ticking(box):
            await succeed(box, copy)
            await settle(box)
            assert guest(box).desired == "stopped"
            # It may be there: nobody may start it elsewhere without a word.
            with pytest.raises(NeedsProof):
                await box.do("instance.start", "web1", node="node1")
            box.cut.clear()
            await settle(box)
            assert box.world.running(ident) == ["node3"]
            assert not box.world.violations
        await box.close()

    simulate(story)


def test_moved_unshipped_to_a_silent_node_it_stays_there() -> None:
    async def story() -> None:
        box, history = await begin()
        ident = guest(box).id
        await box.do("instance.start", "web1", node="node3")
        before = history.count
        await box.do("instance.migrate", "web1", node="node1")
        copy = await lose_with(box, cut=("node1",), lag=history.count - before, history=history)
        async with Ticking(box):
            lines = await succeed(box, copy)
            assert "web1: may run on node1, which does not answer" in lines
            await settle(box)
            assert box.world.running(ident) == ["node1"]
            box.cut.clear()
            await settle(box)
            assert box.world.running(ident) == ["node1"]
            check(box)
        await box.close()

    simulate(story)


def test_two_silent_nodes_want_a_word_and_one_is_enough() -> None:
    async def story() -> None:
        box, history = await begin()
        copy = await lose_with(box, cut=("node1", "node3"), history=history)
        with pytest.raises(NeedsProof, match="node1 and node3 do not answer"):
            await succeed(box, copy)
        await succeed(box, copy, dead=("node1",))
        await box.close()

    simulate(story)


def test_what_ran_on_a_dead_node_is_started_elsewhere_by_the_word_given() -> None:
    async def story() -> None:
        box, history = await begin()
        ident = guest(box).id
        await box.do("instance.start", "web1", node="node3")
        copy = await lose_with(box, power=("node3",), history=history)
        async with Ticking(box):
            await succeed(box, copy, dead=("node3",))
            await settle(box)
            assert box.world.running(ident) == []
            await box.do("node.failover", "node3", node_is_dead=False)
            assert len(box.world.running(ident)) == 1
            await box.boot_agent("node3")
            await settle(box)
            check(box)
        await box.close()

    simulate(story)


def test_what_was_made_and_not_shipped_goes_on_and_is_reported() -> None:
    async def story() -> None:
        box, history = await begin()
        before = history.count
        await box.do("instance.add", name="new", disks=[{"size": GIB}], memory=GIB, node="node1", template="shared")
        ident = box.master.state.store.find(Instance, "new").id
        copy = await lose_with(box, lag=history.count - before, history=history)
        async with Ticking(box):
            lines = await succeed(box, copy)
            assert any(line.startswith("new on node1: newer than the copy") for line in lines)
            await settle(box)
            assert box.world.running(ident) == ["node1"]
            found = {finding.what for finding in await box.master.verify()}
            assert {"stranger: a guest that no instance owns", "orphan image"} <= found
        await box.close()

    simulate(story)


def test_the_old_master_and_another_candidate_with_the_same_term_are_refused() -> None:
    async def story() -> None:
        box, history = await begin()
        old = box.master
        copy = history.copies[-1]
        store, box.leader = box.store, None
        await succeed(box, copy)
        assert store is not None
        with pytest.raises(AtollError) as refused:
            await old.agents.order(box.nodes["node1"], 1, "x", "guest.list", {}, deadline=5.0)
        assert refused.value.code in ("stale_term", "not_leader")
        assert old.state.store.superseded
        await old.stop()
        await box.close()

    simulate(story)


def migration_case(number: int, phase: str, lag: int) -> str:
    """The master is lost in a migration. Gives what its process was at the succession: where it ran on, or had to be let go on."""

    async def story() -> str:
        chosen = next(s for s in STORIES if s.name == "migrate")
        box, history, _ = await lose_master(chosen, number, phase)
        async with Ticking(box):
            await asyncio.sleep(3.0)
            before = {guest.state: guest.pid for guest in box.world.guests.values()}
            await succeed(box, history.copies[max(0, len(history.copies) - 1 - lag)])
            await settle(box)
            (ident,) = {ident for _, ident in box.world.guests}
            (after,) = [guest for guest in box.world.guests.values() if guest.spec.instance == ident]
            assert after.state == "running", (before, after.state)
            assert after.pid in before.values(), "it was started anew"
            assert not box.world.violations
            assert box.master.state.claim(ident).nodes == (box.nodes[after.node],)
        await box.close()
        return "let go on" if before.get("paused") == after.pid else "ran on"

    return simulate(story)


def test_a_migration_that_was_left_behind_is_settled_and_the_guest_never_ends() -> None:
    total = count(next(s for s in STORIES if s.name == "migrate"))
    seen = {migration_case(number, phase, lag) for number in range(total) for phase in ("before", "after") for lag in (0, 1, 3)}
    assert seen == {"let go on", "ran on"}
