"""How the pools' storage is, in words: for ``pool info`` and ``storage status``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from atoll.cli.output import Column, Row, Table
from atoll.model.units import format_size


def _of(name: str) -> Any:
    return lambda row: row["health"].get(name)


def _sampled(name: str) -> Any:
    return lambda row: (row["health"]["sample"] or {}).get(name)


def _share(part: str, whole: str) -> Any:
    def value(row: Row) -> str | None:
        sample = row["health"]["sample"] or {}
        return f"{sample[part]}/{sample[whole]}" if sample.get(whole) is not None else None

    return value


def _used(row: Row) -> str | None:
    sample = row["health"]["sample"] or {}
    return f"{sample['used'] / sample['total']:.0%}" if sample.get("total") else None


def _checks(row: Row) -> list[str]:
    return [check["code"] for check in (row["health"]["sample"] or {}).get("checks", ()) if not check["muted"]]


def _groups(row: Row) -> str | None:
    sample = row["health"]["sample"] or {}
    whole = sum(sample.get("pgs", {}).values())
    return f"{whole - sample['pgs_inactive']}/{whole}" if whole else None


def _flow(row: Row) -> str | None:
    client = (row["health"]["sample"] or {}).get("client")
    return f"{format_size(int(client['read_bytes']))} / {format_size(int(client['write_bytes']))}" if client else None


HEALTH = Table(
    {
        "name": Column("Pool", lambda row: row["name"]),
        "state": Column("Storage", _of("state")),
        "osds": Column("OSDs up", _share("osds_up", "osds")),
        "pgs": Column("PGs active", _groups),
        "used": Column("Used", _used),
        "flow": Column("Read / written a second", _flow, if_any=True),
        "slow_ops": Column("Slow", _sampled("slow_ops"), "number"),
        "checks": Column("Checks", _checks, if_any=True),
        "refuses": Column("No new volumes, because", _of("refuses_volumes"), "prose", True),
        "problem": Column("No sample, because", _of("problem"), "prose", True),
    },
    ("name", "state", "osds", "pgs", "used", "flow", "slow_ops", "checks", "refuses", "problem"),
)


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def lines(health: dict[str, Any]) -> Iterator[str]:
    """All that is known, a fact a line."""
    sample = health["sample"]
    yield f"Storage: {health['state']}"
    if health["problem"]:
        last = f"; what follows is of {_when(health['sampled'])}" if sample else ""
        yield f"  no sample: {health['problem']}{last}"
    if health["refuses_volumes"]:
        yield f"  no new volumes, because {health['refuses_volumes']}"
        yield f"  Next: {health['hint']}"
    if not sample:
        return
    for check in sample["checks"]:
        since = health["since"].get(check["code"])
        muted = ", muted" if check["muted"] else ""
        yield f"  {check['severity']}{muted}: {check['code']}: {check['summary']}" + (f" (since {_when(since)})" if since else "")
        for detail in check["details"]:
            yield f"    {detail}"
    yield from (f"  {name}: {value}" for name, value in _facts(sample) if value)


def _facts(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if sample["monitors"] is not None:
        yield "monitors", f"{len(sample['quorum'])} of {sample['monitors']} agree: {', '.join(sample['quorum'])}"
    if sample["osds"] is not None:
        yield "OSDs", f"{sample['osds']}, of which {sample['osds_up']} run and {sample['osds_in']} count"
    yield "placement groups", ", ".join(f"{count} {state}" for state, count in sorted(sample["pgs"].items()))
    if sample["degraded"]:
        yield "copies that are missing", f"{sample['degraded']:.1%}"
    if sample["total"]:
        ratios = f"; nearly full at {sample['nearfull_ratio']:.0%}, full at {sample['full_ratio']:.0%}" if sample["nearfull_ratio"] else ""
        used, total = format_size(sample["used"]), format_size(sample["total"])
        yield "raw space", f"{used} of {total} used, {sample['used'] / sample['total']:.0%}{ratios}"
    if client := sample["client"]:
        yield (
            "this pool, in a second",
            (
                f"{client['reads']:.0f} reads ({format_size(int(client['read_bytes']))}), "
                f"{client['writes']:.0f} writes ({format_size(int(client['write_bytes']))})"
            ),
        )
    if sample["recovery_objects"] or sample["recovery_bytes"]:
        objects = f"{sample['recovery_objects']:.0f} objects"
        yield "recovery, in a second", f"{objects} ({format_size(int(sample['recovery_bytes']))})"
    if sample["commit_latency"] is not None:
        yield "slowest OSD", f"{sample['commit_latency'] * 1000:.1f} ms to commit, {sample['apply_latency'] * 1000:.1f} ms to apply"
    yield "slow operations", str(sample["slow_ops"] or "")
    yield "mind", sample["figures"]


def show(row: Row) -> None:
    """Print what a pool's storage says."""
    if row.get("health"):
        click.echo("\n".join(lines(row["health"])))
