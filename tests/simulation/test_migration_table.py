"""The table of PROTOCOLS 1 row by row: each part of a migration breaks in each of its phases. Never two writers, nothing lost, and the
guest ends where the table says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from simsupport import Ticking, background, bounce_agents, bounce_master, check, jobs, local, running, settle

from atoll.lab.box import Box, simulate
from atoll.model.objects import Claim, Instance, JobState

pytestmark = pytest.mark.timeout(300)
Break = Callable[["Migration"], Awaitable[None]]
PHASES = ("setup", "active", "pre-switchover", "device", "completed", "resumed")


class Migration:
    """A guest that runs on node1 and goes to node2. ``strike`` comes once, when the migration reaches the phase."""

    def __init__(self, box: Box, phase: str, strike: Break) -> None:
        self.box, self.phase, self.strike = box, phase, strike
        self.struck = False
        self.guest = box.master.state.store.find(Instance, "web1").id
        self.first = box.world.guests["node1", self.guest].pid
        self.arrived = 0
        self.dead: list[str] = []
        #: What the target did while nobody knew whether the source was alive.
        self.early = False
        box.world.fault = self.visit

    async def watch(self) -> None:
        """Strike at the phases that pass by themselves."""
        while not self.struck:
            source = self.box.world.guests.get(("node1", self.guest))
            move = source.move if source else None
            self.note()
            if move is not None and move.status == self.phase:
                await self.hit()
            await asyncio.sleep(0.003)

    def note(self) -> None:
        target = self.box.world.guests.get(("node2", self.guest))
        if target is not None and target.state == "incoming":
            self.arrived = target.pid

    async def visit(self, node: str, method: str, phase: str) -> None:
        self.note()
        # It is so, and nobody has been told yet.
        unheard = {"completed": ("node1", "migrate_continue", "after"), "resumed": ("node2", "resume", "after")}
        if unheard.get(self.phase) == (node, method, phase) and not self.struck:
            await self.hit()

    async def hit(self) -> None:
        self.struck = True
        await self.strike(self)

    def outcome(self) -> str:
        """Where the guest runs, and whether it is the same process: ``source``, ``target``, ``cold start`` on any node, or ``nowhere``."""
        where = self.box.world.running(self.guest)
        if not where:
            return "nowhere"
        assert len(where) == 1, where
        pid = self.box.world.guests[where[0], self.guest].pid
        return {self.first: "source", self.arrived: "target"}.get(pid, "cold start")


# --- what breaks ---


async def kill_source(m: Migration) -> None:
    m.box.world.kill_guest(m.guest, "node1")


async def kill_target(m: Migration) -> None:
    m.box.world.kill_guest(m.guest, "node2")


async def kill_guests(m: Migration) -> None:
    m.box.world.kill_guest(m.guest, "node2")
    m.box.world.kill_guest(m.guest, "node1")


async def kill_source_agent(m: Migration) -> None:
    background(bounce_agents(m.box, ["node1"]))
    await asyncio.sleep(0.001)


async def kill_target_agent(m: Migration) -> None:
    background(bounce_agents(m.box, ["node2"]))
    await asyncio.sleep(0.001)


async def kill_master(m: Migration) -> None:
    background(bounce_master(m.box))
    await asyncio.sleep(0.001)


async def _power(m: Migration, *names: str) -> None:
    async def cut() -> None:
        for name in names:
            await m.box.power_cut(name)

    m.dead += names
    background(cut())
    await asyncio.sleep(0.001)


async def cut_source_power(m: Migration) -> None:
    await _power(m, "node1")


async def cut_target_power(m: Migration) -> None:
    await _power(m, "node2")


async def cut_both_power(m: Migration) -> None:
    await _power(m, "node1", "node2")


async def cut_stream(m: Migration) -> None:
    async def heal() -> None:
        await asyncio.sleep(8)
        m.box.world.unreachable = lambda a, b: False
        m.box.world.notify()

    m.box.world.unreachable = lambda a, b: {a, b} == {"node1", "node2"}
    background(heal())


async def _cut(m: Migration, node: str) -> None:
    async def heal() -> None:
        await asyncio.sleep(60)
        target = m.box.world.guests.get(("node2", m.guest))
        m.early = m.phase != "resumed" and target is not None and target.state == "running"
        await asyncio.sleep(400)
        m.box.cut.discard(node)

    m.box.cut.add(node)
    background(heal())


async def cut_source_off(m: Migration) -> None:
    await _cut(m, "node1")


async def cut_target_off(m: Migration) -> None:
    await _cut(m, "node2")


async def hang_source(m: Migration) -> None:
    async def wake() -> None:
        await asyncio.sleep(90)
        if ("node1", m.guest) in m.box.world.guests:
            m.box.world.hang(m.guest, "node1", False)

    m.box.world.hang(m.guest, "node1")
    background(wake())


BREAKS: dict[str, Break] = {
    name: globals()[name]
    for name in (
        "kill_source", "kill_target", "kill_guests", "kill_source_agent", "kill_target_agent", "kill_master", "cut_source_power",
        "cut_target_power", "cut_both_power", "cut_stream", "cut_source_off", "cut_target_off", "hang_source",
    )
}  # fmt: skip


async def person(box: Box, m: Migration, number: int, repair: bool) -> None:
    """What the messages tell a person to do: say which nodes are dead (or ``repair`` them), resume or undo, fail over."""
    for _ in range(4):
        job = await box.end_of(number)
        if job.state is not JobState.NEEDS_ATTENTION:
            break
        await asyncio.sleep(500 if box.cut else 100)
        for name in list(m.dead):
            if repair:
                m.dead.remove(name)
                await box.boot_agent(name)
                await asyncio.sleep(5)
            elif not box.master.state.proved_dead(box.nodes[name]):
                await box.do("node.declare-dead", name)
        if job.committed:
            await box.master.resume_job(number)
        else:
            await box.master.undo_job(number)
    await settle(box)
    claim = box.master.state.store.require(Claim, m.guest)
    if claim.holder in [box.nodes[name] for name in m.dead]:
        await box.do("instance.failover", "web1", node_is_dead=True)


def play(
    begin: Callable[[Box], Awaitable[None]], operation: str, phase: str, strike: str, *, locking: bool, repair: bool
) -> tuple[str, str]:
    async def run() -> tuple[str, str]:
        box = await Box.make(locking=locking)
        await box.add_pool()
        await begin(box)
        m = Migration(box, phase, BREAKS[strike])
        async with Ticking(box):
            watching = asyncio.ensure_future(m.watch())
            number = (await box.submit(operation, "web1", node="node2")).job
            assert number is not None
            job = await box.end_of(number)
            first = job.state
            assert m.struck
            watching.cancel()
            await person(box, m, number, repair)
            await settle(box)
        assert not m.early, "the target went on while nobody knew what the source does"
        check(box)
        assert all(other.state.ended for other in jobs(box))
        found = m.outcome()
        await box.close()
        return str(first), found

    return simulate(run, limit=20_000)


# --- the table: (state in which the job first rests, where the guest is in the end) ---

SOURCE, TARGET, COLD = "source", "target", "cold start"
DONE, UNDONE, ATTENTION = "done", "undone", "needs-attention"
#: Source alive, not completed: the source owns. Both gone, or the only one: a cold start by both nodes' word.
BEFORE = {
    "kill_source": (UNDONE, COLD),
    "kill_target": (UNDONE, SOURCE),
    "kill_guests": (UNDONE, COLD),
    "kill_source_agent": (DONE, TARGET),
    "kill_target_agent": (DONE, TARGET),
    "kill_master": (DONE, TARGET),
    "cut_source_power": (ATTENTION, COLD),
    "cut_target_power": (ATTENTION, SOURCE),
    "cut_both_power": (ATTENTION, COLD),
    "cut_stream": (DONE, TARGET),
    "cut_source_off": (ATTENTION, SOURCE),
    "cut_target_off": (ATTENTION, TARGET),
    "hang_source": (DONE, TARGET),
}
#: The source was ordered to go on, or is about to be: from here on the job only settles.
PAUSED = {**BEFORE, "kill_source": (DONE, COLD), "kill_guests": (DONE, COLD), "cut_source_off": (ATTENTION, TARGET)}
#: Source completed: the target owns.
AFTER = {
    **PAUSED,
    "kill_source": (DONE, TARGET),
    "kill_target": (DONE, COLD),
    "cut_source_power": (ATTENTION, TARGET),
    "cut_target_power": (ATTENTION, COLD),
}
TABLE = {
    "setup": BEFORE,
    "active": BEFORE,
    "pre-switchover": {**PAUSED, "hang_source": (ATTENTION, SOURCE)},
    "device": {**PAUSED, "hang_source": (ATTENTION, TARGET)},
    "completed": AFTER,
    #: The target runs already, but that was not heard.
    "resumed": {**AFTER, "cut_source_power": (ATTENTION, TARGET), "cut_source_off": (ATTENTION, TARGET)},
}


@pytest.mark.parametrize("strike", BREAKS)
@pytest.mark.parametrize("phase", PHASES)
def test_migration(phase: str, strike: str) -> None:
    for locking in (True, False):
        found = play(running, "instance.migrate", phase, strike, locking=locking, repair=False)
        assert found == TABLE[phase][strike], f"locking: {locking}"


@pytest.mark.parametrize("strike", BREAKS)
@pytest.mark.parametrize("phase", PHASES)
def test_move_of_node_local_disks(phase: str, strike: str) -> None:
    """The same table, once nodes without power are back with their disks: nobody else has those."""
    assert play(local, "instance.move", phase, strike, locking=True, repair=True) == TABLE[phase][strike]
