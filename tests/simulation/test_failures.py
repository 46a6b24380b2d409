"""Every effect of every operation fails once, and for as long as the job lives, before and after it has happened; undoing is killed
again and again; every operation is cancelled at every point."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simstories import STORIES
from simsupport import KILLS, Story, Striker, Ticking, background, check, dump, finish, jobs, sample, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, GuestError, HostError, PoolFull, PoolUnavailable, WrongState

pytestmark = pytest.mark.timeout(300)
Effect = tuple[str, str, str, str]
ERRORS: dict[str, tuple[type[AtollError], ...]] = {"guest": (GuestError,), "storage": (PoolFull, PoolUnavailable), "ceph": (HostError,)}


class Failing:
    """Listens at every effect on guests and storage; fails at one, ``times`` times."""

    def __init__(self, box: Box, effect: Effect | None = None, error: type[AtollError] = GuestError, times: int = 1) -> None:
        self.box, self.effect, self.error, self.left = box, effect, error, times
        self.seen: dict[Effect, None] = {}
        self.failed = 0
        box.world.fault = self.guest
        box.disks.fault = self.storage
        box.ceph.fault = self.ceph

    async def guest(self, node: str, method: str, phase: str) -> None:
        self.visit(("guest", node, method, phase))

    async def storage(self, node: str, method: str, phase: str) -> None:
        self.visit(("storage", node, method, phase))

    async def ceph(self, node: str, method: str, phase: str) -> None:
        self.visit(("ceph", node, method, phase))

    def visit(self, effect: Effect) -> None:
        self.seen[effect] = None
        if effect == self.effect and self.left > 0:
            self.left -= 1
            self.failed += 1
            raise self.error(f"{effect[2]} fails on {effect[1]} ({effect[3]} its effect)")

    def stop(self) -> None:
        self.left = 0


def effects(story: Story) -> list[Effect]:
    async def run() -> list[Effect]:
        box = await story.make()
        failing = Failing(box)
        job = await box.end_of(await story.submit(box))
        assert job.state == "done"
        found = list(failing.seen)
        await box.close()
        return found

    return simulate(run)


def run_case(story: Story, effect: Effect, error: type[AtollError], times: int) -> str:
    async def run() -> str:
        box = await story.make()
        before = dump(box)
        async with Ticking(box):
            failing = Failing(box, effect, error, times)
            number = await story.submit(box, "the key")
            job = await box.end_of(number)
            assert failing.failed
            failing.stop()
            job = await finish(box, number)
            for other in jobs(box):
                await finish(box, other.number)  # the children of an evacuation
            await settle(box)
        if not story.broken or job.state == "done":
            check(box, free=story.frees, marks=story.name == "pool-remove")
        if job.state == "undone":
            assert job.error
            _same(story, before, dump(box))
        await box.close()
        return str(job.state)

    return simulate(run)


def _same(story: Story, before: dict[str, Any], after: dict[str, Any]) -> None:
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if story.frees or story.partial:
        different = {key for key in different if not key.startswith(("claim:", "instance:", "volume:"))}
    different = {key for key in different if not key.startswith(story.stays)} if story.stays else different
    words = []
    for key in sorted(different):
        old, new = before.get(key) or {}, after.get(key) or {}
        words += [f"{key}.{field}: {old.get(field)} -> {new.get(field)}" for field in {*old, *new} if old.get(field) != new.get(field)]
    assert not words, f"undone, but {'; '.join(words)}"


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_failure(story: Story) -> None:
    bad: list[str] = []
    count = 0
    ends = set()
    cases = [(effect, error, times) for effect in effects(story) for error in ERRORS[effect[0]] for times in (1, 10**6)]
    for effect, error, times in sample(cases, story.name):
        count += 1
        try:
            ends.add(run_case(story, effect, error, times))
        except Exception as problem:  # noqa: BLE001 - all cases are told, not only the first
            bad.append(f"{error.__name__} x{times} at {' '.join(effect)}: {type(problem).__name__}: {problem}")
    assert not bad, f"{len(bad)} of {count} cases:\n" + "\n".join(bad[:20])


# --- cancel ---


def points(story: Story) -> list[str]:
    async def run() -> list[str]:
        box = await story.make()
        with Striker(box) as striker:
            assert (await box.end_of(await story.submit(box))).state == "done"
        await box.close()
        return [name for name in dict.fromkeys(striker.seen) if name.startswith(f"master:{story.operation}:")]

    return simulate(run)


def cancel_case(story: Story, point: str) -> None:
    async def run() -> None:
        box = await story.make()
        before = dump(box)
        answers: list[str] = []

        async def ask() -> None:
            try:
                await box.master.cancel_job(number)
                answers.append("accepted")
            except WrongState as refusal:
                answers.append(refusal.message)

        async def cancel(box: Box, name: str) -> None:
            background(ask())
            await asyncio.sleep(0)

        with Striker(box, point, cancel):
            async with Ticking(box):
                number = await story.submit(box, "the key")
                job = await box.end_of(number)
                await settle(box)
        assert job.state == ("undone" if answers == ["accepted"] else "done"), (job.state, answers, job.error, job.reason)
        if not story.broken or job.state == "done":
            check(box, free=story.frees)
        if job.state == "undone":
            assert job.error
            assert job.error["code"] == "cancelled"
            _same(story, before, dump(box))
        await box.close()

    simulate(run)


@pytest.mark.parametrize("story", [s for s in STORIES if not s.internal], ids=lambda story: story.name)
def test_cancel_at_every_point(story: Story) -> None:
    bad = []
    for point in sample(points(story), story.name):
        try:
            cancel_case(story, point)
        except Exception as problem:  # noqa: BLE001 - all cases are told, not only the first
            bad.append(f"cancelled at {point}: {type(problem).__name__}: {problem}")
    assert not bad, "\n".join(bad[:20])


# --- the undo itself is killed ---

LAST: dict[str, Effect] = {
    "add": ("guest", "node1", "start", "after"),
    "add-local": ("guest", "node3", "start", "after"),
    "add-disk": ("guest", "node1", "plug", "after"),
    "attach-disk": ("guest", "node1", "plug", "after"),
    "failover": ("guest", "node3", "start", "after"),
    "migrate": ("guest", "node1", "migrate_out", "after"),
    "move-running": ("guest", "node1", "migrate_out", "after"),
    "move-stopped": ("storage", "node1", "push", "after"),
    "detach-disk": ("guest", "node1", "unplug", "after"),
    "rename": ("storage", "node1", "rename", "after"),
}


def undo_case(story: Story, effect: Effect, point: str, kill: str) -> list[str]:
    async def run() -> list[str]:
        box = await story.make()
        before = dump(box)
        with Striker(box, point, KILLS[kill] if kill else None, times=10) as striker:
            async with Ticking(box):
                failing = Failing(box, effect, GuestError)
                number = await story.submit(box, "the key")
                job = await box.end_of(number)
                assert failing.failed == 1
                assert job.state == "undone", (job.state, job.reason)
                assert bool(striker.struck) == bool(kill)
                # What was told to the dead is told again; what was durable before they died is not.
                if (kill, point.split(":")[0]) in (("master", "master"), ("agent", "agent")) and "before" in point:
                    assert striker.struck == 10
                await settle(box)
        check(box)
        _same(story, before, dump(box))
        await box.close()
        return [name for name in dict.fromkeys(striker.seen) if name.endswith("undo")]

    return simulate(run)


@pytest.mark.parametrize("name", sorted(LAST))
def test_undo_killed_ten_times(name: str) -> None:
    story = next(s for s in STORIES if s.name == name)
    effect = LAST[name]
    found = undo_case(story, effect, "", "")
    assert found
    bad = []
    for point, kill in sample([(point, kill) for point in found for kill in KILLS], name):
        try:
            undo_case(story, effect, point, kill)
        except Exception as problem:  # noqa: BLE001 - all cases are told, not only the first
            bad.append(f"{kill} killed ten times at {point}: {type(problem).__name__}: {problem}")
    assert not bad, "\n".join(bad[:20])
