"""What may have been left behind on a node: processes, loop devices, exports, attachments, units that are not ours any more."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.monitor.checks import Check, ok, warning
from atoll.runtime import systemd
from atoll.runtime.config import DEFAULT_PATH, Config

_UNITS = Path("/etc/systemd/system")
_WORKER, _WATCHDOG, _SERVER = "atoll.runtime.workermain", "watchdog.py", "qemu-nbd"


def processes() -> Iterator[tuple[int, list[str]]]:
    """This node's processes with their arguments. Those of other namespaces (containers, nodes of a lab) are not this node's."""
    own = _namespace("self")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            continue
        if argv and _namespace(entry) == own:
            yield int(entry), argv


def _namespace(pid: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return -1


def _parent(pid: int) -> tuple[str, int]:
    """State letter and parent of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def found(run_dir: Path) -> dict[str, Any]:
    """What is there, for a master that knows what should be: exports of disks (volume -> pid), watchdogs of migrations (guest -> pid),
    attachments by hand (owner -> volumes), workers whose parent has died, and loop devices (device -> file)."""
    seen: dict[str, Any] = {"exports": {}, "watchdogs": {}, "workers": [], "attached": {}, "loops": loops()}
    for pid, argv in processes():
        if os.path.basename(argv[0]) == _SERVER:
            name = next((Path(a.removeprefix("--pid-file=")) for a in argv if a.startswith("--pid-file=")), None)
            if name is not None and name.parent.parent == run_dir / "copies":
                seen["exports"][name.parent.name] = pid
        elif len(argv) > 2 and any(os.path.basename(a) == _WATCHDOG for a in argv[1:4]):
            place = next((Path(a).parent for a in argv if a.startswith(f"{run_dir}/guests/")), None)
            if place is not None:
                seen["watchdogs"][place.name] = pid
        elif _WORKER in argv and len(argv) >= 4:
            # FD MODULE PARENT KEY
            at = argv.index(_WORKER)
            state, parent = _parent(pid)
            if state not in ("", "Z", "X") and len(argv) > at + 3 and argv[at + 3] != str(parent):
                seen["workers"].append({"pid": pid, "state": state, "key": argv[at + 4] if len(argv) > at + 4 else ""})
    for path in sorted((run_dir / "attached").glob("*.json")) if (run_dir / "attached").is_dir() else ():
        try:
            seen["attached"][path.stem] = sorted(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return seen


def loops() -> dict[str, str]:
    """Loop devices with the files behind them; a file that was deleted says so."""
    seen = {}
    for place in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            seen[place.parent.parent.name] = place.read_text().strip()
        except OSError:
            continue
    return seen


def leftovers(config: Config, pools: list[dict[str, Any]]) -> list[Check]:
    """What can be told without a master that it was left behind."""
    seen = found(config.run_dir)
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
