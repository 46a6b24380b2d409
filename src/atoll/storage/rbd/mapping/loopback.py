"""Whether a block device would lead back to this node: where memory is short, the kernel writes to it to get some, and an OSD needs some to
take that. In user space QEMU only waits; the kernel may wait for itself, for ever."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

_FSID = re.compile(r"^\s*fsid\s*=\s*(\S+)", re.MULTILINE)


def hazard(conf: str, proc: Path = Path("/proc")) -> str:
    """What to mind of devices of the cluster with this configuration here; empty: no OSD of it runs on this node."""
    wanted = _fsid_in(Path(conf))
    found = sorted(ident for ident, fsid in _osds(proc) if not wanted or not fsid or fsid == wanted)
    if not found:
        return ""
    which = ", ".join(f"osd.{ident}" for ident in found)
    return f"this node runs {which} of the same Ceph cluster: when memory is short, a block device of it here can stop the node for good"


def _fsid_in(conf: Path) -> str:
    try:
        match = _FSID.search(conf.read_text(errors="replace"))
    except OSError:
        return ""
    return match[1] if match else ""


def _osds(proc: Path) -> list[tuple[str, str]]:
    """The number of each OSD of this node, and its cluster; empty where that is not told."""
    own, found = _namespace(proc / "self"), []
    for entry in proc.iterdir():
        try:
            if not entry.name.isdigit() or (entry / "comm").read_text().strip() != "ceph-osd" or _namespace(entry) != own:
                continue
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ident = next((value for name, value in pairwise(argv) if name in ("-i", "--id")), "?")
        try:
            fsid = (entry / "root/var/lib/ceph/osd" / f"ceph-{ident}" / "ceph_fsid").read_text().strip()
        except OSError:
            fsid = ""
        found.append((ident, fsid))
    return found


def _namespace(place: Path) -> int:
    """Nodes of a lab, and containers, are seen from outside: their OSDs are not this node's."""
    return os.stat(place / "ns/pid").st_ino
