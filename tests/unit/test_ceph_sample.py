"""From what a real Ceph 16.2 said (tests/fixtures/ceph: one node, pools vms and other) to samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.model.health import Health
from atoll.storage.rbd.sample import SETTLING, sample

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "ceph"


def told(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return found


def read(name: str, *pools: str, change: dict[str, Any] | None = None) -> Health:
    answers = {**told(name), **(change or {})}
    manager = {word: answers[word] for word in ("osd perf", "osd pool stats") if word in answers}
    found = sample(answers, pools or ("vms",), manager or "")
    assert Health(**found.model_dump(mode="json")) == found
    return found


def test_a_cluster_that_is_well() -> None:
    found = read("ok")
    assert (found.status, found.checks, found.refusals, found.manager, found.figures) == ("ok", (), (), True, "")
    assert (found.monitors, found.quorum, found.osds, found.osds_up, found.osds_in) == (1, ("a",), 1, 1, 1)
    assert (found.pgs, found.pgs_inactive) == ({"active+clean": 17}, 0)
    assert (found.total, found.nearfull_ratio, found.full_ratio) == (1 << 30, 0.85, 0.95)
    assert found.used == told("ok")["df"]["stats"]["total_used_raw_bytes"]
    assert (found.commit_latency, found.apply_latency) == (0.0, 0.0)


def test_rates_are_of_the_pools_that_are_asked_for() -> None:
    busy = read("busy").client
    assert busy is not None
    assert busy.write_bytes > 1 << 20
    assert busy.writes > 10
    idle = read("busy", "other").client
    assert idle is not None
    assert (idle.write_bytes, idle.writes) == (0, 0)
    both = read("busy", "vms", "other").client
    assert both == busy


@pytest.mark.parametrize(
    ("name", "pool", "codes"),
    [
        ("nearfull", "vms", ["POOL_NEARFULL"]),
        ("full", "vms", ["POOL_FULL", "OSD_FULL"]),
        ("quota", "vms", ["POOL_FULL"]),
        ("quota", "other", []),
        ("osd-down", "vms", ["PG_AVAILABILITY"]),
        ("no-manager", "vms", []),
    ],
)
def test_what_refuses_new_volumes(name: str, pool: str, codes: list[str]) -> None:
    found = read(name, pool)
    assert [refusal.code for refusal in found.refusals] == codes
    assert all(refusal.reason and refusal.hint for refusal in found.refusals)


def test_reasons_name_pool_and_share() -> None:
    assert read("nearfull").refusals[0].reason == "Ceph pool vms is nearly full: an OSD of it has reached 5%"
    assert read("full").refusals[0].reason == "Ceph pool vms is full: an OSD of it has reached 7%"
    assert read("full").refusals[1].reason == "Ceph is in HEALTH_ERR, OSD_FULL: 1 full osd(s)"
    assert read("quota").refusals[0].reason == "Ceph pool vms has used up its quota"


def test_groups_whose_osds_are_gone_do_not_work_though_their_last_state_was_active() -> None:
    found = read("osd-down")
    assert (found.osds, found.osds_up) == (1, 0)
    assert found.pgs_inactive == 17
    assert found.refusals[0].reason == "17 of Ceph's 17 placement groups do not work: 17 stale+active+clean"
    assert found.refusals[0].grace == SETTLING
    assert [check.code for check in found.checks] == ["OSD_DOWN", "OSD_HOST_DOWN", "OSD_ROOT_DOWN"]


def test_without_a_manager_old_figures_are_called_old() -> None:
    found = read("no-manager")
    assert found.manager is False
    assert "no active manager" in found.figures
    assert (found.client, found.commit_latency) == (None, None)
    # Recovery that the lost manager told of last is not told on.
    groups = {**told("no-manager")["status"]["pgmap"], "recovering_bytes_per_sec": 7}
    assert read("no-manager", change={"status": {**told("no-manager")["status"], "pgmap": groups}}).recovery_bytes == 0


def check(code: str, severity: str, message: str, *, muted: bool = False) -> dict[str, Any]:
    made = {"severity": severity, "summary": {"message": message, "count": 1}, "detail": [{"message": f"line {n}"} for n in range(9)]}
    return {"health": {"status": severity, "checks": {code: {**made, "muted": muted}}, "mutes": []}}


def test_errors_refuse_but_not_those_that_are_muted_or_the_managers_own() -> None:
    bad = read("ok", change=check("PG_DAMAGED", "HEALTH_ERR", "Possible data damage: 1 pg inconsistent"))
    assert bad.refusals[0].reason == "Ceph is in HEALTH_ERR, PG_DAMAGED: Possible data damage: 1 pg inconsistent"
    assert bad.status == "error"
    assert len(bad.checks[0].details) == 5
    assert read("ok", change=check("PG_DAMAGED", "HEALTH_ERR", "x", muted=True)).refusals == ()
    for code in ("MGR_DOWN", "MGR_MODULE_ERROR"):
        manager = read("ok", change=check(code, "HEALTH_ERR", "no active mgr"))
        assert (manager.status, manager.refusals) == ("error", ())


def test_slow_operations_are_counted() -> None:
    found = read("ok", change=check("SLOW_OPS", "HEALTH_WARN", "12 slow ops, oldest one blocked for 41 sec, osd.0 has slow ops"))
    assert found.slow_ops == 12
