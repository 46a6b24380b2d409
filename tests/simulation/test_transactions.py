"""The master dies at every transaction of its store: just before it is durable, and just after, unacknowledged. This covers what fault
points do not: submitting, granting, committing and ending jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simstories import STORIES
from simsupport import Story, Striker, Ticking, background, bounce_master, check, dump, sample, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, StoreError
from atoll.store.contract import Transaction

pytestmark = pytest.mark.timeout(300)


class Transactions:
    """Counts the transactions of the present master, and kills it at one."""

    def __init__(self, box: Box, kill_at: int = -1, phase: str = "") -> None:
        assert box.store is not None
        self.box, self.kill_at, self.phase, self.count = box, kill_at, phase, 0
        self.store = box.store
        self.real = box.store.transact
        box.store.transact = self.transact  # type: ignore[method-assign]

    async def transact(self, transaction: Transaction) -> int:
        self.count += 1
        if self.count - 1 != self.kill_at:
            return await self.real(transaction)
        if self.phase == "after":
            await self.real(transaction)
        self.store.crash()
        background(bounce_master(self.box))
        raise StoreError("the master dies here")


async def submit(story: Story, box: Box) -> int:
    """As a client: the same key again, until a master answers."""
    for _ in range(20):
        try:
            if box.leader is not None:
                return await story.submit(box, "the key")
        except AtollError as error:
            if error.code not in ("store_error", "not_leader"):
                raise
        await asyncio.sleep(0.3)
    raise AssertionError("no master takes the request")


def count(story: Story) -> int:
    async def run() -> int:
        box = await story.make()
        counter = Transactions(box)
        job = await box.end_of(await story.submit(box, "the key"))
        assert job.state == "done"
        found = counter.count
        await box.close()
        return found

    return simulate(run)


def run_case(story: Story, number: int, phase: str) -> None:
    async def run() -> None:
        box = await story.make()
        before = dump(box)
        with Striker(box):
            async with Ticking(box):
                counter = Transactions(box, number, phase)
                job = await box.end_of(await submit(story, box))
                assert counter.count > number
                assert job.state in story.ends, f"{job.state}: {job.error} {job.reason}"
                await settle(box)
            check(box, free=story.frees)
            if job.state == "undone" and not story.partial:
                assert story.undone(dump(box)) == story.undone(before)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("story", [s for s in STORIES if not s.internal], ids=lambda story: story.name)
def test_every_transaction(story: Story) -> None:
    failed: list[str] = []
    total = count(story)
    cases: list[tuple[int, Any]] = [(number, phase) for number in range(total) for phase in ("before", "after")]
    cases = sample(cases, story.name)
    for number, phase in cases:
        try:
            run_case(story, number, phase)
        except Exception as error:  # noqa: BLE001 - all cases are told, not only the first
            failed.append(f"killed {phase} transaction {number} of {total}: {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(failed[:20])
