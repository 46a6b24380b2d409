"""Which mount an open directory lies on, from the kernel's own list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from atoll.model.errors import PoolUnavailable


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo (proc(5))."""

    number: str
    point: str
    fstype: str


def parse(text: str) -> dict[str, Mount]:
    """All mounts, by their number."""
    found = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        found[fields[0]] = Mount(fields[0], unescape(fields[4]), after.split()[0])
    return found


def mount_of(fd: int) -> Mount:
    """The mount that an open file lies on. Errors: PoolUnavailable when it was unmounted under our hands."""
    # By number and not by path: a path may be covered by another mount at any moment, an open file stays where it is.
    number = next(line.split()[1] for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("mnt_id:"))
    begin = f"{number} "
    ours = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.startswith(begin)]
    if not ours:
        raise PoolUnavailable("the file system of the directory was unmounted just now", hint="mount it")
    return parse(ours[0])[number]


def unescape(text: str) -> str:
    """A path as it is, of one as mountinfo writes it."""
    # The kernel writes space, tab, newline and backslash as octal bytes; everything else as it is.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
