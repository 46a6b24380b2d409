"""What a Ceph cluster will survive, and what stops it: for people who decide whether to make it so."""

from __future__ import annotations

from atoll.deploy.ceph.layout import Layout
from atoll.deploy.contract import Preview


def preview(layout: Layout) -> Preview:
    """The layout in words."""
    lines = []
    for name, host in layout.hosts.items():
        parts = [word for word, names in (("monitor", layout.mons), ("manager", layout.mgrs)) if name in names]
        parts += [f"OSD on {osd.disk}" for osd in layout.osds if osd.node == name]
        networks = host.public or f"an address in {layout.public_network}"
        if layout.cluster_network:
            networks += f"; copies: {host.replica or f'an address in {layout.cluster_network}'}"
        lines.append(f"{name} ({networks}): {', '.join(parts) or 'nothing'}")
    apart = "nodes" if layout.domain == "host" else "disks"
    if layout.size == 1:
        lines.append(f"pool {layout.pool}: one copy of everything")
    else:
        lines.append(f"pool {layout.pool}: {layout.size} copies on different {apart}; a write needs {layout.min_size} of them")
    return Preview(lines=lines, survives=_survives(layout), warnings=_warnings(layout))


def changed(old: Layout, new: Layout) -> Preview:
    """What comes and what goes; then the same as for a new cluster."""
    lines = []
    for word, one, other in (("goes", old, new), ("comes", new, old)):
        for what, found, there in (("monitor", one.mons, other.mons), ("manager", one.mgrs, other.mgrs)):
            lines += [f"{what} of {name} {word}" for name in found if name not in there]
        known = {osd.uuid for osd in other.osds}
        moved = "its data moves to other disks first, if there is room for all copies; then its disk is erased"
        tail = f": {moved}" if word == "goes" else ": its disk is erased"
        lines += [f"{osd.node}: OSD on {osd.disk} {word}{tail}" for osd in one.osds if osd.uuid not in known]
    if not lines:
        return Preview(lines=["nothing changes"])
    then = preview(new)
    return Preview(lines=[*lines, "then:", *(f"  {line}" for line in then.lines)], survives=then.survives, warnings=then.warnings)


def spare_monitors(layout: Layout) -> int:
    """How many monitors may be lost with the majority left."""
    return (len(layout.mons) - 1) // 2


def nodes_to_spare(layout: Layout) -> int:
    """How many nodes, whichever they are, may be lost while guests go on reading and writing."""
    if layout.domain != "host":
        return 0
    return max(0, min(layout.size - layout.min_size, layout.places - layout.min_size, spare_monitors(layout)))


def _survives(layout: Layout) -> list[str]:
    found = []
    spare, copies = nodes_to_spare(layout), min(layout.size, layout.places)
    if spare:
        found.append(f"{_count(spare, 'node')} may fail, whichever: guests go on reading and writing")
    elif copies > layout.min_size:
        found.append(f"{_count(copies - layout.min_size, 'disk')} may fail, whichever: guests go on reading and writing")
    if copies > 1:
        what = "node" if layout.domain == "host" else "disk"
        found.append(f"nothing is lost for good while at most {_count(copies - 1, what)} of those with copies {_fail(copies - 1)}")
    return found


def _warnings(layout: Layout) -> list[str]:
    found = []
    if layout.size == 1:
        found.append("there is one copy: a disk that fails takes what is on it with it")
    elif layout.size == layout.min_size:
        what = "node" if layout.domain == "host" else "disk"
        found.append(
            f"when a {what} stops, reading and writing stop until it is back: a write needs all {layout.size} copies, so that none is ever "
            "acknowledged that lies in one place only"
        )
    if len(layout.hosts) == 1:
        found.append(f"{next(iter(layout.hosts))} is all there is: when it stops, everything stops")
    elif len(layout.mons) == 1:
        found.append(f"{layout.mons[0]} has the only monitor: while it is off, no disk can be opened, and none fails over")
    if len(layout.mgrs) == 1 and len(layout.hosts) > 1:
        found.append(f"{layout.mgrs[0]} has the only manager: while it is off, there are no figures")
    with_disks = len({osd.node for osd in layout.osds})
    if layout.places < layout.size:
        found.append(f"there is room for {layout.places} of {layout.size} copies: the others are missing until there is more")
    if len(layout.mons) % 2 == 0:
        found.append(f"{len(layout.mons)} monitors survive no more than {len(layout.mons) - 1} do: another node should join soon")
    if layout.domain == "host" and 1 < layout.size == with_disks:
        found.append(
            f"there are {with_disks} nodes for {layout.size} copies: after one has failed for good, copies are missing until another joins"
        )
    return found


def _count(number: int, noun: str) -> str:
    return f"{'one' if number == 1 else number} {noun}{'' if number == 1 else 's'}"


def _fail(number: int) -> str:
    return "fails" if number == 1 else "fail"
