"""``/metrics``: what Prometheus reads, with every series that an alarm may stand on."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rest_fakes import NODES, SHARED, FakeLeader, Script, fake_leader, served

from atoll.api.leader import Caller
from atoll.model.errors import PoolFull
from atoll.model.health import Health, HealthCheck, Rates, Refusal
from atoll.model.messages import Space
from atoll.model.objects import JobState
from atoll.model.units import GIB
from atoll.operations.health import Seen

TOP = Path(__file__).resolve().parents[2]
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


SAMPLE = Health(
    status="warning",
    checks=(
        HealthCheck(code="POOL_NEARFULL", severity="warning", summary="1 pool(s) nearfull"),
        HealthCheck(code="OSD_DOWN", severity="warning", summary="1 osds down", muted=True),
    ),
    refusals=(Refusal(code="POOL_NEARFULL", reason="Ceph pool vms is nearly full", hint="ceph osd df"),),
    monitors=3,
    quorum=("a", "b"),
    osds=6,
    osds_up=5,
    osds_in=6,
    pgs={"active+clean": 30, "stale": 2},
    pgs_inactive=2,
    degraded=0.25,
    total=100 * GIB,
    used=86 * GIB,
    nearfull_ratio=0.85,
    full_ratio=0.95,
    slow_ops=4,
    manager=True,
    client=Rates(read_bytes=1, write_bytes=2, reads=3, writes=4),
    recovery_bytes=5,
    recovery_objects=6,
    commit_latency=0.007,
    apply_latency=0.008,
    seconds=0.01,
    cpu_seconds=0.002,
)


async def test_figures_of_storage_that_tells_how_it_is(prometheus: Prometheus) -> None:
    state = prometheus.leader.state
    pools, now = state.pools_health, state.clock.now()
    pools[SHARED.id] = Seen(0.0).followed(SAMPLE, now - 3)
    found = await prometheus.scrape()

    def of(name: str, **labels: str) -> float | None:
        return found.get((f"atoll_storage_{name}", tuple(sorted({"pool": "images", **labels}.items()))))

    assert (of("health"), of("refuses_volumes"), of("sample_failed"), of("sample_age_seconds")) == (1, 1, 0, 3)
    assert (of("monitors"), of("monitors_in_quorum")) == (3, 2)
    assert [of("osds", state=state) for state in ("all", "up", "in")] == [6, 5, 6]
    assert (of("pgs", state="active+clean"), of("pgs", state="stale"), of("pgs_inactive")) == (30, 2, 2)
    assert (of("check", check="POOL_NEARFULL", severity="warning"), of("check", check="OSD_DOWN", severity="warning")) == (1, None)
    assert (of("bytes"), of("used_bytes"), of("nearfull_ratio"), of("full_ratio")) == (100 * GIB, 86 * GIB, 0.85, 0.95)
    rates = ("client_read_bytes", "client_write_bytes", "client_reads", "client_writes", "recovery_bytes", "recovery_objects")
    assert [of(f"{rate}_per_second") for rate in rates] == [1, 2, 3, 4, 5, 6]
    assert (of("commit_latency_seconds"), of("apply_latency_seconds"), of("degraded_ratio")) == (0.007, 0.008, 0.25)
    assert (of("slow_ops"), of("manager_up"), of("sample_seconds"), of("sample_cpu_seconds")) == (4, 1, 0.01, 0.002)
    # Old figures are no figures: when nobody answers, only that is told.
    pools[SHARED.id] = replace(pools[SHARED.id], problem="node1: nobody answers")
    found = await prometheus.scrape()
    assert (of("health"), of("used_bytes"), of("refuses_volumes")) == (None, None, None)
    assert (of("sample_failed"), of("sample_age_seconds")) == (1, 3)
    # What the storage does not tell is no 0.
    pools[SHARED.id] = Seen(0.0).followed(Health(status="ok"), now)
    found = await prometheus.scrape()
    assert (of("health"), of("bytes"), of("client_reads_per_second"), of("commit_latency_seconds")) == (0, None, None, None)


async def _told(prometheus: Prometheus) -> dict[str, str]:
    """All families with their help, as there is nothing and as there is everything."""
    prometheus.leader.state.pools_health[SHARED.id] = Seen(0.0).followed(SAMPLE, 1.0)
    async with prometheus._session.get("/metrics") as answer:
        return {family.name: family.documentation for family in text_string_to_metric_families(await answer.text())}


@pytest.mark.parametrize("path", ["prometheus/atoll.rules.yml", "grafana/atoll-storage.json"])
async def test_rules_and_dashboards_ask_for_what_there_is(prometheus: Prometheus, path: str) -> None:
    told = await _told(prometheus)
    text = (TOP / "contrib" / path).read_text()
    if path.endswith("json"):
        board = json.loads(text)
        asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        asked += [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    else:
        rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
        assert len({rule["alert"] for rule in rules}) == len(rules)
        for rule in rules:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["action"]
        asked = [rule["expr"] for rule in rules]
    names = {name for expression in asked for name in re.findall(r"\batoll_\w+", expression)}
    assert len(names) > 10
    known = set(told) | {f"{name}_{part}" for name in told for part in ("bucket", "sum", "count")}
    assert names <= known, f"not exported: {names - known}"


async def test_the_reference_has_every_figure(prometheus: Prometheus) -> None:
    page = (TOP / "docs" / "reference" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(atoll\w*)` \| (.*?) \|", page, re.M))
    told = await _told(prometheus)
    assert rows == told, "docs/reference/metrics.md: a line for each figure, with its help"


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
