"""Every fault point of every operation, with the death of the master, of the agent, and of both. Cases come from undisturbed runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from simstories import STORIES
from simsupport import KILLS, Story, Striker, Ticking, check, dump, sample, settle

from atoll.lab.box import simulate

pytestmark = pytest.mark.timeout(300)


def visited(story: Story) -> list[str]:
    """The fault points that an undisturbed run visits, in order, each once."""

    async def run() -> list[str]:
        box = await story.make()
        with Striker(box) as striker:
            async with Ticking(box):
                job = await box.end_of(await story.submit(box))
                assert job.state == "done", (job.state, job.error, job.reason)
                seen = list(dict.fromkeys(striker.seen))
                await settle(box)
        check(box, free=story.frees)
        await box.close()
        return seen

    return simulate(run)


def cases(story: Story) -> Iterator[tuple[str, str]]:
    for point in visited(story):
        for kill in KILLS:
            yield point, kill


def run_case(story: Story, point: str, kill: str) -> None:
    async def run() -> None:
        box = await story.make()
        before = dump(box)
        with Striker(box, point, KILLS[kill]) as striker:
            async with Ticking(box):
                number = await story.submit(box, "the key")
                job = await box.end_of(number)
                assert striker.struck, "the point was not visited"
                assert job.state in story.ends, f"{job.state}: {job.error} {job.reason}"
                await settle(box)
            check(box, free=story.frees)
            after = dump(box)
            if job.state == "undone" and not story.partial:
                assert story.undone(after) == story.undone(before), "undone, but something has changed"
            if not story.internal:
                again = await box.submit(story.operation, story.target, key="the key", **story.request)
                assert (again.job, again.repeated) == (number, True)
                await asyncio.sleep(5)
                assert dump(box) == after, "the same key has changed something"
        await box.close()

    simulate(run)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_point(story: Story) -> None:
    failed = []
    count = 0
    for point, kill in sample(cases(story), story.name):
        count += 1
        try:
            run_case(story, point, kill)
        except Exception as error:  # noqa: BLE001 - all cases are told, not only the first
            failed.append(f"{kill} killed at {point}: {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} of {count} cases:\n" + "\n".join(failed[:20])
    assert count >= 6
