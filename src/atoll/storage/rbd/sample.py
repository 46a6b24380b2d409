"""From the answers of Ceph's monitors and manager to one typed sample. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from atoll.model.health import Health, HealthCheck, Rates, Refusal

#: Details that a check keeps.
_DETAILS = 5
#: Checks of Ceph's manager about itself: data is as safe and as usable as without them.
_OF_THE_MANAGER = frozenset({"MGR_DOWN", "MGR_MODULE_ERROR", "MGR_MODULE_DEPENDENCY"})
#: Seconds for which placement groups may be inactive: they are, for a moment, whenever an OSD comes or goes.
SETTLING = 10.0
_SLOW = re.compile(r"(\d+) slow ops")


def sample(told: dict[str, Any], pools: Iterable[str], manager: dict[str, Any] | str) -> Health:
    """``told``: the monitors' answers by command (status, health detail, df, osd dump). ``pools``: those that a new image uses.
    ``manager``: the manager's answers by command (osd perf, osd pool stats), or why there are none."""
    status, osds, groups = told["status"], told["status"]["osdmap"], told["status"]["pgmap"]
    checks = tuple(_checks(told["health"]))
    states = {state["state_name"]: state["count"] for state in groups.get("pgs_by_state", ())}
    inactive = sum(count for state, count in states.items() if not _usable(state))
    present = bool(status["mgrmap"]["available"])
    asked = manager if isinstance(manager, dict) else {}
    perf = [osd["perf_stats"] for osd in asked.get("osd perf", {}).get("osdstats", {}).get("osd_perf_infos", ())]
    names = tuple(pools)
    return Health(
        status=_level(told["health"]["status"]),
        checks=checks,
        refusals=(*_full(told["osd dump"], names), *_broken(checks), *_inactive(states, inactive)),
        monitors=status["monmap"]["num_mons"],
        quorum=tuple(status["quorum_names"]),
        osds=osds["num_osds"],
        osds_up=osds["num_up_osds"],
        osds_in=osds["num_in_osds"],
        pgs=states,
        pgs_inactive=inactive,
        degraded=float(groups.get("degraded_ratio", 0.0)),
        total=told["df"]["stats"]["total_bytes"] or None,
        used=told["df"]["stats"]["total_used_raw_bytes"] if told["df"]["stats"]["total_bytes"] else None,
        nearfull_ratio=round(told["osd dump"]["nearfull_ratio"], 4),
        full_ratio=round(told["osd dump"]["full_ratio"], 4),
        slow_ops=sum(int(found[1]) for check in checks if check.code == "SLOW_OPS" and (found := _SLOW.search(check.summary))),
        manager=present,
        figures=_words(present, manager),
        client=_rates(asked, names),
        recovery_bytes=float(groups.get("recovering_bytes_per_sec", 0)) if present else 0.0,
        recovery_objects=float(groups.get("recovering_objects_per_sec", 0)) if present else 0.0,
        commit_latency=max((osd["commit_latency_ns"] / 1e9 for osd in perf), default=None),
        apply_latency=max((osd["apply_latency_ns"] / 1e9 for osd in perf), default=None),
    )


def _level(word: str) -> Literal["ok", "warning", "error"]:
    return "ok" if word == "HEALTH_OK" else "error" if word == "HEALTH_ERR" else "warning"


def _usable(state: str) -> bool:
    """A stale group is one whose OSDs have all gone: its last state says nothing."""
    words = state.split("+")
    return "active" in words and "stale" not in words


def _checks(health: dict[str, Any]) -> Iterable[HealthCheck]:
    for code, check in sorted(health["checks"].items()):
        yield HealthCheck(
            code=code,
            severity="error" if check["severity"] == "HEALTH_ERR" else "warning",
            summary=check["summary"]["message"],
            details=tuple(line["message"] for line in check.get("detail", ())[:_DETAILS]),
            muted=bool(check.get("muted")),
        )


def _words(present: bool, manager: dict[str, Any] | str) -> str:
    if not present:
        return "Ceph has no active manager: use, placement groups and rates are as it last told them"
    return manager if isinstance(manager, str) else ""


def _rates(asked: dict[str, Any], pools: tuple[str, ...]) -> Rates | None:
    if "osd pool stats" not in asked:
        return None
    found = [pool.get("client_io_rate") or {} for pool in asked["osd pool stats"] if pool["pool_name"] in pools]
    return Rates(
        read_bytes=sum(rate.get("read_bytes_sec", 0) for rate in found),
        write_bytes=sum(rate.get("write_bytes_sec", 0) for rate in found),
        reads=sum(rate.get("read_op_per_sec", 0) for rate in found),
        writes=sum(rate.get("write_op_per_sec", 0) for rate in found),
    )


# --- why no new volumes ---


def _full(dump: dict[str, Any], pools: tuple[str, ...]) -> Iterable[Refusal]:
    """Ceph's own flags on the pools: they stand when one of the OSDs that a pool uses has reached the ratio."""
    for pool in dump["pools"]:
        name = pool["pool_name"]
        if name not in pools:
            continue
        flags = str(pool.get("flags_names", "")).split(",")
        more = "ceph osd df; add disks, or delete what nobody needs: docs/howto/full-pool.md"
        if "full_quota" in flags:
            yield Refusal(code="POOL_FULL", reason=f"Ceph pool {name} has used up its quota", hint=f"ceph osd pool get-quota {name}")
        elif "full" in flags:
            reason = f"Ceph pool {name} is full: an OSD of it has reached {dump['full_ratio']:.0%}"
            yield Refusal(code="POOL_FULL", reason=reason, hint=more)
        elif "nearfull" in flags or "backfillfull" in flags:
            reason = f"Ceph pool {name} is nearly full: an OSD of it has reached {dump['nearfull_ratio']:.0%}"
            yield Refusal(code="POOL_NEARFULL", reason=reason, hint=more)


def _broken(checks: tuple[HealthCheck, ...]) -> Iterable[Refusal]:
    for check in checks:
        if check.severity == "error" and not check.muted and check.code not in _OF_THE_MANAGER:
            yield Refusal(code=check.code, reason=f"Ceph is in HEALTH_ERR, {check.code}: {check.summary}", hint="ceph health detail")


def _inactive(states: dict[str, int], inactive: int) -> Iterable[Refusal]:
    if inactive:
        bad = ", ".join(f"{count} {state}" for state, count in sorted(states.items()) if not _usable(state))
        reason = f"{inactive} of Ceph's {sum(states.values())} placement groups do not work: {bad}"
        yield Refusal(code="PG_AVAILABILITY", reason=reason, hint="ceph osd tree; ceph health detail", grace=SETTLING)
