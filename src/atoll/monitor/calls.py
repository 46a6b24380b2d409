"""The functions that run in the doctor's worker processes: whatever they look at may hang, and then they are killed."""

from __future__ import annotations

from typing import Any

from atoll.monitor import disks, host, links, remains
from atoll.monitor.checks import Check
from atoll.runtime.config import Config


def _json(checks: list[Check]) -> list[dict[str, Any]]:
    return [check.to_json() for check in checks]


def machine(config: dict[str, Any]) -> list[dict[str, Any]]:
    """See ``host.machine``."""
    return _json(host.machine(Config(**config)))


def guests(config: dict[str, Any]) -> list[dict[str, Any]]:
    """See ``host.guests``."""
    return _json(host.guests(Config(**config)))


def directories(config: dict[str, Any]) -> list[dict[str, Any]]:
    """See ``disks.directories``."""
    return _json(disks.directories(Config(**config)))


def secrets(config: dict[str, Any]) -> list[dict[str, Any]]:
    """See ``disks.secrets``."""
    return _json(disks.secrets(Config(**config)))


def network(config: dict[str, Any], master: str) -> dict[str, Any]:
    """See ``links.look``."""
    found = links.look(Config(**config), master)
    return {"checks": _json(found.checks), "facts": found.facts}


def leftovers(config: dict[str, Any], pools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """See ``remains.leftovers``."""
    return _json(remains.leftovers(Config(**config), pools))


def units(config: dict[str, Any], path: str, bin_dir: str) -> list[dict[str, Any]]:
    """See ``remains.units``."""
    return _json(remains.units(Config(**config), path, bin_dir))


FUNCTIONS = {
    "machine": machine,
    "guests": guests,
    "directories": directories,
    "secrets": secrets,
    "network": network,
    "leftovers": leftovers,
    "units": units,
}
