"""Thousands of jobs that want the same things: first come, first served, and all of them have their turn."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest

from atoll.lab.box import Box, simulate
from atoll.model.objects import Job, JobState, Stored, Volume
from atoll.model.units import MIB

JOBS, VOLUMES = 5000, 50

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_five_thousand_jobs_on_fifty_volumes() -> None:
    begun: dict[str, list[int]] = defaultdict(list)

    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        names = [f"v{number}" for number in range(VOLUMES)]
        for name in names:
            await box.do("volume.create", name=name, pool="shared", size=MIB)
        ids = {box.master.state.store.find(Volume, name).id: name for name in names}

        def started(before: Stored | None, after: Stored | None) -> None:
            if isinstance(after, Job) and after.started is not None and (before is None or before.started is None):  # type: ignore[attr-defined]
                begun[ids[after.request["id"]]].append(after.number)

        box.master.state.store.listeners.append(started)
        rng = random.Random(1)
        requests = [box.submit("volume.tags", rng.choice(names), add=[f"t{number % 3}"]) for number in range(JOBS)]
        for asked in await asyncio.gather(*requests):
            assert asked.job is not None
            assert (await box.end_of(asked.job)).state is JobState.DONE
        assert sum(map(len, begun.values())) == JOBS
        await box.close()

    simulate(story)
    assert all(jobs == sorted(jobs) for jobs in begun.values())
