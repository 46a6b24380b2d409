"""A node that goes away for a while, with what it has: its daemons are stopped, and started again."""

from __future__ import annotations

from atoll.deploy.ceph.layout import Layout
from atoll.deploy.ceph.planned import daemons_of
from atoll.deploy.contract import Planned


def question(made: Layout, name: str, teller: str) -> Planned:
    """What would stop without it: Ceph knows it best."""
    return Planned(key="what would stop", node=teller, step="stops", args=_gone(made, name))


def rest(made: Layout, name: str, teller: str, *, hold: bool, wait: bool) -> list[list[Planned]]:
    """No data is moved (noout), then OSDs, the manager and the monitor are stopped.

    The monitor only when the others miss the OSDs: while monitors elect, nobody hears that an OSD has gone, and its clients wait.
    """
    names, host = daemons_of(made, name), {"host": name}
    osds = [daemon for daemon in names if daemon.startswith("osd.")]
    phases = []
    if hold:
        text = f"{name}: noout"
        phases.append([Planned(key=f"hold/{name}", node=teller, step="hold", args=host, undo="release", undo_args=host, text=text)])
    for what, daemons in (("osds", osds), ("mons", [daemon for daemon in names if daemon not in osds])):
        if not daemons:
            continue
        phases.append([_change(made, name, "stop", "start", daemons, f"stop/{name}/{what}")])
        if wait:
            args = {"mons": [], "osds": [], what: _gone(made, name)[what]}
            text = f"waiting until the others miss {name}"
            phases.append([Planned(key=f"away/{name}/{what}", node=teller, step="away", args=args, text=text)])
    return phases


def wake(made: Layout, name: str, teller: str) -> list[list[Planned]]:
    """The other way round."""
    host = {"host": name}
    start = _change(made, name, "start", "stop", daemons_of(made, name), f"start/{name}")
    return [[start], [Planned(key=f"release/{name}", node=teller, step="release", args=host, undo="hold", undo_args=host)]]


def _gone(made: Layout, name: str) -> dict[str, list[object]]:
    return {"osds": [osd.number for osd in made.osds if osd.node == name], "mons": [mon for mon in made.mons if mon == name]}


def _change(made: Layout, name: str, step: str, undo: str, daemons: list[str], key: str) -> Planned:
    args, word = {"fsid": made.fsid, "daemons": daemons}, "stopping" if step == "stop" else "starting"
    return Planned(key=key, node=made.hosts[name].id, step=step, args=args, undo=undo, undo_args=args, text=f"{word} Ceph on {name}")
