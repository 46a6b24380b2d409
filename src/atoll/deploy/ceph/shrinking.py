"""Nodes and disks that leave a Ceph cluster while its clients go on: what is left, and the phases that lead there.

Until the commit everything can be taken back: data moves away, and back. After it, daemons, disks and names go for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atoll.deploy.ceph.growing import client_again, config_again, join_mon, quorum_step, with_admin
from atoll.deploy.ceph.layout import Layout, Osd
from atoll.deploy.ceph.planned import admit_step, mgr_step
from atoll.deploy.contract import Member, Planned
from atoll.model.errors import InUse, NotFound

#: Seconds for data to move elsewhere. The step itself gives up when nothing moves any more.
MOVING = 7 * 24 * 3600.0


def shrunk(old: Layout, name: str, disks: Sequence[str], *, dead: bool) -> Layout:
    """The layout without the node, or without some of its disks. Another node takes the place of its monitor and manager, if there is one.

    Errors: NotFound (no such disk), InUse (what is left could not hold all copies; unless it is ``dead``, and they are missing already).
    """
    here = [osd.disk for osd in old.osds if osd.node == name]
    for disk in disks:
        if disk not in here:
            raise NotFound(f"node {name} has no OSD on {disk}", hint=f"its disks: {', '.join(here) or 'none'}")
    if dead and not disks and old.mons == [name]:
        raise InUse(
            f"node {name} has the only monitor, and without it nobody knows where the data is",
            hint=f"switch it on again, whatever it takes; then: atoll node modify {name} --drain",
        )
    if disks and not dead and set(disks) == set(here):
        hint = f"atoll node modify {name} --drain takes the node out; or first: atoll storage add-disks {name} DISK"
        raise InUse(f"these are all disks of node {name}", hint=hint)
    goes = {osd.uuid for osd in old.osds if osd.node == name and (not disks or osd.disk in disks)}
    osds = [osd for osd in old.osds if osd.uuid not in goes]
    if disks:
        new = old.model_copy(update={"osds": osds})
    else:
        hosts = {host: found for host, found in old.hosts.items() if host != name}
        if not hosts:
            raise InUse(f"node {name} is the last of the storage cluster", hint="atoll node add another first")
        update = {"osds": osds, "hosts": hosts}
        new = old.model_copy(update={**update, "mons": _without(old.mons, name, hosts), "mgrs": _without(old.mgrs, name, hosts)})
    if goes and not dead and new.places < old.size:
        what, more = ("nodes", "atoll node add NAME") if old.domain == "host" else ("disks", f"atoll storage add-disks {name} DISK")
        raise InUse(
            f"{old.size} copies need {old.size} {what} with OSDs, and {new.places} would be left", hint=f"add another first: {more}"
        )
    return new


def _without(names: list[str], name: str, hosts: Mapping[str, Any]) -> list[str]:
    if name not in names:
        return names
    others = [other for other in names if other != name]
    return [*others, *[host for host in hosts if host not in names][:1]]


def _leaving(old: Layout, new: Layout) -> list[Osd]:
    left = {osd.uuid for osd in new.osds}
    return [osd for osd in old.osds if osd.uuid not in left]


def _numbers(osds: list[Osd]) -> list[int]:
    return sorted(osd.number for osd in osds if osd.number is not None)


def _teller(old: Layout, new: Layout) -> str:
    """A monitor that stays, or else the one that goes."""
    kept = [name for name in old.mons if name in new.mons]
    return old.hosts[(kept or old.mons)[0]].id


def question(old: Layout, new: Layout, name: str, *, dead: bool) -> Planned:
    """What stands against it."""
    mons = [mon for mon in old.mons if mon not in new.hosts or (mon == name and mon not in new.mons)]
    args = {"osds": _numbers(_leaving(old, new)), "mons": mons, "dead": dead}
    return Planned(key="what would be lost", node=_teller(old, new), step="spare", args=args, deadline=150.0)


def before(old: Layout, new: Layout, name: str, secrets: Mapping[str, str], *, dead: bool) -> Iterator[list[Planned]]:
    """Until the commit: others take over what it does, and its data moves elsewhere."""
    teller, osds = _teller(old, new), _leaving(old, new)
    if not dead:
        yield from _successors(old, new, list(old.mons), secrets, teller)
    if not osds:
        return
    numbers = {"osds": _numbers(osds)}
    yield [Planned(key=f"out/{name}", node=teller, step="out", args=numbers, undo="in", undo_args=numbers, text=f"{name}: OSDs out")]
    if new.places < old.size:
        yield [Planned(key=f"unneeded/{name}", node=teller, step="unneeded", text="looking whether its data is elsewhere")]
        return
    text = f"moving the data of {name} to other disks"
    yield [Planned(key=f"emptied/{name}", node=teller, step="emptied", args=numbers, deadline=MOVING, text=text)]


def after(members: list[Member], old: Layout, new: Layout, name: str, secrets: Mapping[str, str], *, dead: bool) -> Iterator[list[Planned]]:
    """After the commit: its daemons and disks go, and everybody hears of it."""
    teller, osds, whole = _teller(old, new), _leaving(old, new), name not in new.hosts
    if whole and name in old.mons:
        left = [mon for mon in (old.mons if dead else dict.fromkeys([*old.mons, *new.mons])) if mon != name]
        if left:
            # First it is taken from their number, then another comes: in between, no other must be lost to have a majority.
            teller = teller if old.hosts[name].id != teller else new.hosts[left[0]].id
            args = {"id": name, "left": left}
            yield [
                Planned(key=f"dropmon/{name}", node=teller, step="dropmon", args=args, deadline=180.0, text=f"{name}: its monitor leaves")
            ]
    if dead:
        yield from _successors(old, new, [mon for mon in old.mons if mon != name], secrets, teller)
    if new.mons != old.mons:
        yield [config_again(old, new, host) for host in new.hosts if host in old.mons or host not in new.mons]
    if gone := _daemons_gone(old, name, osds, whole=whole, dead=dead):
        yield gone
    forget = {
        "osds": [osd.uuid for osd in osds],
        "mgrs": [name] if whole and name in old.mgrs else [],
        "hosts": [name] if whole else [],
    }
    if forget["osds"] or whole:
        yield [Planned(key=f"purge/{name}", node=teller, step="dismiss", args=forget, deadline=240.0, text=f"{name}: purging its OSDs")]
    told = [client_again(old, new, member) for member in members if member.id != old.hosts[name].id or not dead]
    last = [] if dead or not whole else [_unconfig(old, name)]
    if last or new.mons != old.mons:
        yield [*last, *(told if new.mons != old.mons else [])]


def _successors(old: Layout, new: Layout, known: list[str], secrets: Mapping[str, str], teller: str) -> Iterator[list[Planned]]:
    """A monitor and a manager elsewhere, for those that go."""
    for mon in [mon for mon in new.mons if mon not in old.mons]:
        yield [with_admin(old, new, mon, secrets)]
        yield [join_mon(new, known, mon, secrets, addresses=old)]
        known.append(mon)
        yield [quorum_step(mon, teller)]
    mgrs = [mgr for mgr in new.mgrs if mgr not in old.mgrs]
    if mgrs:
        admit = admit_step(new, teller, secrets, [], mgrs, [], users=False)
        undo = {"osds": [], "mgrs": mgrs, "hosts": []}
        yield [admit.model_copy(update={"undo": "dismiss", "undo_args": undo})]
        yield [mgr_step(new, mgr, secrets) for mgr in mgrs]


def _daemons_gone(old: Layout, name: str, osds: list[Osd], *, whole: bool, dead: bool) -> list[Planned]:
    """On the node itself, if it lives: daemons stopped, what they had removed, disks erased."""
    here = {"node": old.hosts[name].id, "deadline": 300.0}
    if dead and whole:
        return []
    gone = [
        Planned(
            key=f"unosd/{name}{osd.disk}",
            step="unosd",
            args={"uuid": osd.uuid, "disk": osd.disk, "keep": dead},
            text=f"{name}: OSD on {osd.disk} goes",
            **here,
        )
        for osd in osds
    ]
    for kind, names in (("mgr", old.mgrs), ("mon", old.mons)):
        if whole and name in names:
            gone.append(Planned(key=f"un{kind}/{name}", step=f"un{kind}", args={"fsid": old.fsid, "id": name}, **here))
    return gone


def _unconfig(old: Layout, name: str) -> Planned:
    return Planned(key=f"unconfig/{name}", node=old.hosts[name].id, step="unconfig", args={"fsid": old.fsid}, text=f"{name}: files")
