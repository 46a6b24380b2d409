"""Nodes that join a Ceph cluster while its clients go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from atoll.deploy.ceph import conf
from atoll.deploy.ceph.layout import Layout, mon_address
from atoll.deploy.ceph.planned import CLIENTS, admit_step, client_step, config_step, mgr_step, osd_step
from atoll.deploy.contract import Member, Planned, Results


def phases(
    members: list[Member], old: Layout, new: Layout, secrets: Mapping[str, str], results: Results, teller: str
) -> Iterator[list[Planned]]:
    """Files, monitors one by one, who may come, daemons; then everybody hears of new monitors."""
    fresh = [name for name in new.hosts if name not in old.hosts]
    there = {member.name for member in members}
    more_mons = [name for name in new.mons if name not in old.mons]
    yield [config_step(new, name, secrets) for name in fresh]
    known = list(old.mons)
    for name in more_mons:
        if name in old.hosts:
            yield [with_admin(old, new, name, secrets)]
        yield [join_mon(new, known, name, secrets)]
        known.append(name)
        # One after the other: until this one is there, losing another would cost the majority.
        yield [quorum_step(name, teller)]
    if more_mons:
        yield [config_again(old, new, name) for name in old.hosts if name in there and name not in more_mons]
    mgrs = [name for name in new.mgrs if name not in old.mgrs]
    known_osds = {osd.uuid for osd in old.osds}
    osds = [osd for osd in new.osds if osd.uuid not in known_osds]
    # Those that were there need not all agree: it may be for a dead one that somebody joins.
    admit = admit_step(new, teller, secrets, more_mons, mgrs, osds, users=False, empty=True)
    undo = {"osds": [osd.uuid for osd in osds], "mgrs": mgrs, "hosts": fresh}
    yield [admit.model_copy(update={"undo": "dismiss", "undo_args": undo})]
    numbers: dict[str, int] = results["admit"]["osds"]
    daemons = [mgr_step(new, name, secrets) for name in mgrs] + [osd_step(new, osd, numbers[osd.uuid], secrets) for osd in osds]
    if daemons:
        yield daemons
    up = {"osds": sorted(numbers.values())}
    yield [Planned(key="health", node=teller, step="settled", args=up, deadline=300.0, text="waiting until its OSDs are up")]
    clients = [client_step(new, member, secrets, joins=True) for member in members if member.name in fresh]
    clients += [client_again(old, new, m) for m in members if m.name not in fresh] if more_mons else []
    if clients:
        yield clients


def enter(old: Layout, new: Layout, results: Results, teller: str) -> list[list[Planned]]:
    """After the commit: new OSDs take data. Before it, the undo erases their disks, and nothing may be on them."""
    numbers = sorted(results["admit"]["osds"].values())
    text = "new OSDs take data"
    return [[Planned(key="enter", node=teller, step="in", args={"osds": numbers}, text=text)]] if numbers else []


def quorum_step(name: str, teller: str) -> Planned:
    """Until a new monitor is one of them."""
    args = {"mons": [name]}
    return Planned(key=f"quorum/{name}", node=teller, step="quorum", args=args, deadline=180.0, text=f"waiting for the monitor of {name}")


def with_admin(old: Layout, new: Layout, name: str, secrets: Mapping[str, str]) -> Planned:
    """A node that was there gets a monitor."""
    step = config_step(new, name, secrets)
    return step.model_copy(update={"undo": "config", "undo_args": {"fsid": old.fsid, "conf": conf.node(old, name), "admin": ""}})


def config_again(old: Layout, new: Layout, name: str) -> Planned:
    """The others hear of it: daemons' configuration."""
    args, undo = ({"fsid": one.fsid, "conf": conf.node(one, name)} for one in (new, old))
    return Planned(key=f"config/{name}", node=new.hosts[name].id, step="config", args=args, undo="config", undo_args=undo, text="files")


def client_again(old: Layout, new: Layout, member: Member) -> Planned:
    """The others hear of it: clients' configuration."""
    args, undo = ({"fsid": one.fsid, "name": one.name, "conf": conf.client(one, CLIENTS)} for one in (new, old))
    return Planned(key=f"client/{member.name}", node=member.id, step="reclient", args=args, undo="reclient", undo_args=undo, text="clients")


def join_mon(new: Layout, known: list[str], name: str, secrets: Mapping[str, str], addresses: Layout | None = None) -> Planned:
    """A monitor that joins those that are known. ``addresses``: the layout that has theirs, if the new one has not."""
    hosts = {**(addresses.hosts if addresses else {}), **new.hosts}
    args: dict[str, Any] = {
        "fsid": new.fsid,
        "id": name,
        "mons": {mon: mon_address(hosts[mon].public) for mon in known},
        "key": secrets["mon."],
        "admin": secrets["client.admin"],
    }
    undo = {"fsid": new.fsid, "id": name}
    return Planned(
        key=f"mon/{name}", node=new.hosts[name].id, step="mon", args=args, undo="leavemon", undo_args=undo, text=f"{name}: monitor"
    )
