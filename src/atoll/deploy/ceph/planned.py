"""Single steps of a plan: what each is given, and how it is undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.deploy.ceph import conf
from atoll.deploy.ceph.layout import Layout, Osd, mon_address
from atoll.deploy.contract import Member, Planned

#: Ceph users: who manages images, and who only opens them.
CONTROLLER, NODE_USER = "client.atoll", "client.atoll-node"
CLIENTS = "/etc/atoll/ceph"


def admit_step(
    made: Layout,
    teller: str,
    secrets: Mapping[str, str],
    mons: list[str],
    mgrs: list[str],
    osds: list[Osd],
    *,
    users: bool = True,
    empty: bool = False,
) -> Planned:
    """When these monitors agree: keys and capabilities of managers (and of clients), and numbers for OSDs.

    ``empty``: these get no data before they are let in."""
    rbd = f"profile rbd pool={made.pool}"
    clients = {
        CONTROLLER: {"mon": 'profile rbd, allow command "osd blocklist" with blocklistop=rm', "mgr": f"{rbd}, allow r", "osd": rbd},
        NODE_USER: {"mon": "allow r", "osd": rbd},
    }
    manager = {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"}
    known = {**(clients if users else {}), **{f"mgr.{name}": manager for name in mgrs}}
    args = {
        "fsid": made.fsid,
        "mons": mons,
        "users": [{"entity": name, "caps": caps, "key": secrets[name]} for name, caps in known.items()],
        "osds": [{"uuid": osd.uuid, "key": secrets[osd.uuid]} for osd in osds],
        **({"empty": True} if empty else {}),
    }
    return Planned(key="admit", node=teller, step="admit", args=args, deadline=180.0, text="waiting for the monitors to agree")


def config_step(made: Layout, name: str, secrets: Mapping[str, str]) -> Planned:
    """Ceph's configuration of a node; the administrator's key only where a monitor is, whose root has everything anyway."""
    args: dict[str, Any] = {"fsid": made.fsid, "conf": conf.node(made, name)}
    if name in made.mons:
        args["admin"] = secrets["client.admin"]
    undo = {"fsid": made.fsid}
    return Planned(
        key=f"config/{name}", node=made.hosts[name].id, step="config", args=args, undo="unconfig", undo_args=undo, text=f"{name}: files"
    )


def mon_step(made: Layout, name: str, secrets: Mapping[str, str]) -> Planned:
    """A monitor of a new cluster."""
    args = {
        "fsid": made.fsid,
        "id": name,
        "mons": {mon: mon_address(made.hosts[mon].public) for mon in made.mons},
        "key": secrets["mon."],
        "admin": secrets["client.admin"],
    }
    undo = {"fsid": made.fsid, "id": name}
    return Planned(
        key=f"mon/{name}", node=made.hosts[name].id, step="mon", args=args, undo="unmon", undo_args=undo, text=f"{name}: monitor"
    )


def mgr_step(made: Layout, name: str, secrets: Mapping[str, str]) -> Planned:
    """A manager."""
    args = {"fsid": made.fsid, "id": name, "key": secrets[f"mgr.{name}"]}
    undo = {"fsid": made.fsid, "id": name}
    return Planned(
        key=f"mgr/{name}", node=made.hosts[name].id, step="mgr", args=args, undo="unmgr", undo_args=undo, text=f"{name}: manager"
    )


def osd_step(made: Layout, osd: Osd, number: int, secrets: Mapping[str, str]) -> Planned:
    """An OSD on its disk."""
    where = {"fsid": made.fsid, "uuid": osd.uuid, "disk": osd.disk}
    return Planned(
        key=f"osd/{osd.node}{osd.disk}",
        node=made.hosts[osd.node].id,
        step="osd",
        args={**where, "number": number, "key": secrets[osd.uuid]},
        undo="unosd",
        undo_args=where,
        deadline=300.0,
        text=f"{osd.node}: OSD on {osd.disk}",
    )


def client_step(made: Layout, member: Member, secrets: Mapping[str, str], *, joins: bool = False) -> Planned:
    """What clients on a node need; the key that manages images only where storage is managed. ``joins``: it may be a client already."""
    users = {NODE_USER: secrets[NODE_USER], **({CONTROLLER: secrets[CONTROLLER]} if member.controller else {})}
    args = {"fsid": made.fsid, "name": made.name, "conf": conf.client(made, CLIENTS), "users": users}
    # The undo takes away what this step has brought, not what was there before.
    undo = {"fsid": made.fsid, "name": made.name, "mark": f"{made.fsid} {member.name}" if joins else made.fsid}
    args["mark"] = undo["mark"]
    return Planned(
        key=f"client/{member.name}",
        node=member.id,
        step="client",
        args=args,
        undo="unclient",
        undo_args=undo,
        text=f"{member.name}: clients",
    )


def daemons_of(made: Layout, name: str) -> list[str]:
    """A node's daemons, in the order in which they are stopped."""
    found = [f"osd.{osd.number}" for osd in made.osds if osd.node == name]
    return found + [f"{kind}.{name}" for kind, names in (("mgr", made.mgrs), ("mon", made.mons)) if name in names]
