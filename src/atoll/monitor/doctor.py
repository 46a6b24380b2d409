"""``atoll doctor``: everything about one machine that can be looked at, each part within a deadline. It changes nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from atoll.model.errors import UNKNOWN_OUTCOME, AtollError
from atoll.model.messages import PoolRef
from atoll.monitor.checks import LEVELS, Check, error, ok, warning
from atoll.runtime.config import Config
from atoll.runtime.worker import Worker
from atoll.storage import registry
from atoll.storage.contract import StorageAccess
from atoll.storage.host import StorageHost

#: Seconds for each part; for a pool; and for all of it.
PART, POOL, ALL = 20.0, 10.0, 60.0
_MODULE = "atoll.monitor.calls"
#: What a part's name is for people.
_WORDS = {
    "machine": "the operating system",
    "guests": "QEMU",
    "directories": "the daemons' directories",
    "secrets": "the secrets' files",
    "network": "the network",
    "leftovers": "what was left behind",
    "units": "the units",
}


async def examine(config: Config, path: str = "", *, master: str = "", storage: StorageAccess | None = None) -> dict[str, Any]:
    """``findings`` (see ``Check``), the worst first, and ``pools``: pool id -> details of its mount here. ``path``: the configuration's
    file; ``master``: the URL of one that the configuration does not name; ``storage``: an agent's own, so that a pool which hangs is not
    asked by more processes than its lanes."""
    data = config.model_dump(mode="json")
    # Each part may hang: none waits for another, but for the cluster's facts.
    worker = Worker("doctor", _MODULE, lanes=4)
    own = storage or StorageHost(guest_user=config.guest_user)
    try:
        bin_dir = str(Path(sys.executable).parent)
        first = [
            _part(worker, "machine", config=data),
            _part(worker, "guests", config=data),
            _part(worker, "directories", config=data),
            _part(worker, "secrets", config=data),
            _part(worker, "units", config=data, path=path, bin_dir=bin_dir),
        ]
        network, *others = await asyncio.gather(_network(worker, data, master), *first)
        facts = network["facts"]
        refs = [PoolRef(**ref) for ref in facts.get("pools", ())]
        checked = await asyncio.gather(*(_pool(own, ref) for ref in refs))
        left = await _part(worker, "leftovers", config=data, pools=facts.get("pools", []))
    finally:
        await worker.close()
        if storage is None:
            await own.close()
    findings = [*network["checks"], *(check for part in (*others, left) for check in part), *(check.to_json() for check, _ in checked)]
    findings.sort(key=lambda check: LEVELS.get(check["level"], 0))
    details = {ref.id: seen for ref, (_, seen) in zip(refs, checked, strict=True) if seen}
    return {"findings": findings, "pools": details}


async def _part(worker: Worker, name: str, **args: Any) -> list[dict[str, Any]]:
    found, late = await _bounded(name, worker.call(name, PART, **args))
    return [late.to_json()] if late else found


async def _network(worker: Worker, config: dict[str, Any], master: str) -> dict[str, Any]:
    found, late = await _bounded("network", worker.call("network", ALL / 2, config=config, master=master))
    return {"checks": [late.to_json()], "facts": {}} if late else found


async def _bounded(name: str, work: Awaitable[Any]) -> tuple[Any, Check | None]:
    """Its result, or a finding that there is none."""
    about = f"looking at {_WORDS[name]}"
    try:
        return await work, None
    except UNKNOWN_OUTCOME as late:
        why = "something there hangs, such as a mount whose server is gone"
        return None, error(about, late.message, why, "dmesg | tail; cat /proc/mounts")
    except AtollError as failed:
        return None, error(about, failed.message, "this part was not looked at", failed.hint)


async def _pool(storage: StorageAccess, ref: PoolRef) -> tuple[Check, dict[str, str]]:
    """Whether it can be used here, and where it lies."""
    about = f"pool {ref.name}"
    why = "guests with disks there cannot start here, or stand still"
    try:
        status = await storage.pool(ref, "check", POOL)
    except AtollError as failed:
        return error(about, failed.message, why, failed.hint or f"atoll pool check {ref.name}"), {}
    details = {str(key): str(value) for key, value in (status.get("details") or {}).items()}
    if not status["ok"]:
        return error(about, status["reason"], why, status.get("hint") or f"atoll pool check {ref.name}"), details
    mount, kind = details.get("mount", ""), details.get("file system", "")
    words = f"{kind} on {mount}" if mount else "it is there"
    if mount == "/" and not registry.info(ref.driver).node_local:
        why = "other nodes see another directory, unless the whole root file system is shared"
        return warning(about, f"shared, and on the root file system ({words})", why, f"atoll pool info {ref.name}; findmnt"), details
    return ok(about, words), details
