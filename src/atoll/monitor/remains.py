"""What may have been left behind on a node: processes, loop devices, exports, attachments, units that are not ours any more."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from atoll.monitor import residue
from atoll.monitor.checks import Check, ok, warning
from atoll.runtime import systemd
from atoll.runtime.config import DEFAULT_PATH, Config

_UNITS = Path("/etc/systemd/system")


def leftovers(config: Config, pools: list[dict[str, Any]]) -> list[Check]:
    """What can be told without a master that it was left behind."""
    seen = residue.found(config.run_dir)
    checks = []
    for worker in seen["workers"]:
        why = "it holds a place among the pool's workers until it ends"
        what = f"process {worker['pid']} of an earlier agent {'hangs in the kernel' if worker['state'] == 'D' else 'still runs'}"
        checks.append(warning(f"worker of {worker['key']}", what, why, "dmesg | tail; it ends when the storage answers, or with a reboot"))
    places = [str(ref.get("options", {}).get("path", "")) for ref in pools]
    ours = [str(config.state_dir), *(place for place in places if place)]
    for device, file in seen["loops"].items():
        if any(file == place or file.startswith(place.rstrip("/") + "/") for place in ours):
            why = "Atoll makes none; it writes past every lock, and keeps the space of a deleted file"
            checks.append(warning(f"loop device {device}", f"it has {file} open", why, f"losetup -d /dev/{device}"))
    guests = config.run_dir / "guests"
    for guest, pid in seen["watchdogs"].items():
        if not (guests / guest / "pid").exists():
            why = "the migration that it watched has ended"
            checks.append(warning(f"watchdog {pid}", f"guest {guest} is gone", why, f"kill {pid}"))
    if not checks:
        checks.append(ok("leftovers", "no process and no loop device was left behind"))
    return checks


def units(config: Config, path: str, bin_dir: str) -> list[Check]:
    """The daemons' units, where systemd runs."""
    if not systemd.booted_with_systemd():
        return [ok("units", "this machine has no systemd; whoever runs it starts the daemons")]
    texts = systemd.units(bin_dir, path or DEFAULT_PATH)
    wanted = ["atoll-agent.service"] if config.node else []
    if (config.store_dir / "atoll.db").exists():
        wanted.append("atoll-master.service")
    checks = []
    for name in wanted:
        try:
            there = (_UNITS / name).read_text()
        except OSError:
            why = "nothing starts the daemon after a reboot"
            checks.append(warning(name, "the unit is missing", why, "docs/howto/doctor.md says how to make it"))
            continue
        if there != texts[name]:
            why = "it may lack what this version needs; a change of yours belongs in a drop-in (systemctl edit)"
            what = f"it is not what version and configuration here ask for: {_UNITS / name}"
            checks.append(warning(name, what, why, f"systemctl cat {name}"))
        state = _systemctl("is-enabled", name), _systemctl("is-active", name)
        if state != ("enabled", "active"):
            why = "it does not start after a reboot, or does not run now"
            checks.append(warning(name, f"it is {' and '.join(state)}", why, f"systemctl enable --now {name}; journalctl -eu {name}"))
    return checks or [ok("units", f"{' and '.join(wanted)} are in order" if wanted else "none is needed yet")]


def _systemctl(*words: str) -> str:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
