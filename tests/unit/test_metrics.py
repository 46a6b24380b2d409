"""``/metrics``: what Prometheus reads, with every series that an alarm may stand on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rest_fakes import NODES, SHARED, FakeLeader, Script, fake_leader, served

from atoll.api.leader import Caller
from atoll.model.errors import PoolFull
from atoll.model.messages import Space
from atoll.model.objects import JobState
from atoll.model.units import GIB

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Prometheus:
    def __init__(self, leader: FakeLeader, session: aiohttp.ClientSession) -> None:
        self.leader, self._session = leader, session

    async def scrape(self, token: str | None = None) -> Samples:
        async with self._session.get("/metrics", headers={"Authorization": f"Bearer {token}"} if token else {}) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            text = await answer.text()
        found = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        return found


@pytest.fixture
async def prometheus(tmp_path: Path) -> AsyncIterator[Prometheus]:
    leader = await fake_leader()
    async with (
        served(leader, tmp_path) as (path, _),
        aiohttp.ClientSession("http://x", connector=aiohttp.UnixConnector(path)) as session,
    ):
        yield Prometheus(leader, session)


async def test_figures(prometheus: Prometheus) -> None:
    leader = prometheus.leader
    leader.health.dead.add(NODES[1].id)
    report = leader.health.reports[NODES[0].id]
    leader.health.reports[NODES[0].id] = report.model_copy(
        update={"stalled_pools": {SHARED.id: "no answer"}, "stalled_for": {SHARED.id: 42.0}}
    )
    leader.space[SHARED.id, ""] = Space(total=100 * GIB, free=5 * GIB)
    found = await prometheus.scrape("read")

    def of(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    assert of("atoll_info", version="0.1.0", cluster="lagoon") == 1
    assert (of("atoll_nodes", state="ok"), of("atoll_nodes", state="unreachable"), of("atoll_nodes", state="offline")) == (2, 1, 0)
    assert (of("atoll_agent_up", node="node1"), of("atoll_agent_up", node="node2")) == (1, 0)
    assert of("atoll_agent_report_age_seconds", node="node2") == 90
    assert of("atoll_instances", state="running") == 1
    assert (of("atoll_pool_bytes", pool="images", node=""), of("atoll_pool_free_bytes", pool="images", node="")) == (100 * GIB, 5 * GIB)
    assert of("atoll_pool_promised_bytes", pool="images") == 11 * GIB
    assert (of("atoll_pool_stalled", pool="images", node="node1"), of("atoll_pool_stalled", pool="images", node="node3")) == (1, 0)
    assert of("atoll_pool_stalled_seconds", pool="images", node="node1") == 42
    assert (of("atoll_jobs", state="needs-attention"), of("atoll_holds")) == (0, 0)


async def test_durations_of_jobs_by_operation_and_end(prometheus: Prometheus) -> None:
    leader, who = prometheus.leader, Caller("ada", "admin")
    for script in (Script(), Script(), Script(state=JobState.UNDONE, error=PoolFull("full"))):
        leader.script = script
        job = (await leader.submit("instance.start", "web1", {}, who=who)).job
        assert job is not None
        while (await leader.wait_job(job, 1))[0].state.active:
            pass
    found = await prometheus.scrape()
    labels = (("end", "done"), ("operation", "instance.start"))
    assert found["atoll_job_duration_seconds_count", labels] == 2
    assert found["atoll_job_duration_seconds_count", (("end", "undone"), ("operation", "instance.start"))] == 1
    assert found["atoll_jobs", (("state", "done"),)] == 2


async def test_figures_are_for_those_who_may_read(prometheus: Prometheus) -> None:
    async with prometheus._session.get("/metrics", headers={"Authorization": "Bearer bad"}) as answer:
        assert answer.status == 401
