"""What is there on a node that may have been left behind, from the system itself. It imports next to nothing: a new process is asked, for
reading /proc may hang, too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.storage.files import loops as mappings

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
    seen: dict[str, Any] = {"exports": {}, "watchdogs": {}, "workers": [], "attached": {}, "loops": {}}
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
    seen["loops"] = _loops({volume for volumes in seen["attached"].values() for volume in volumes})
    return seen


def _loops(known: set[str]) -> dict[str, str]:
    """Loop devices with the files behind them, without those that map a volume for somebody: for another node on this kernel, or ``known``.
    A file that was deleted says so."""
    ours = mappings.mapped()
    others = {f"loop{number}" for (_, volume), number in mappings.everybodys().items() if volume in known or volume not in ours}
    seen = {}
    for place in Path("/sys/block").glob("loop*/loop/backing_file"):
        if place.parent.parent.name in others:
            continue
        try:
            seen[place.parent.parent.name] = place.read_text().strip()
        except OSError:
            continue
    return seen


def remaining(run_dir: str) -> dict[str, Any]:
    """See ``found``."""
    return found(Path(run_dir))


FUNCTIONS = {"remaining": remaining}
