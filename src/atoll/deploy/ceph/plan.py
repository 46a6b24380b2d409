"""What shall be where in a Ceph cluster, and how it is made. Pure, but for new keys; runs on the master."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from atoll.deploy.ceph import conf, growing, resting, shrinking, words
from atoll.deploy.ceph.info import INFO
from atoll.deploy.ceph.layout import Host, Layout, Osd
from atoll.deploy.ceph.options import Network, Options, parse, within
from atoll.deploy.ceph.planned import (
    CLIENTS,
    CONTROLLER,
    NODE_USER,
    admit_step,
    client_step,
    config_step,
    mgr_step,
    mon_step,
    osd_step,
)
from atoll.deploy.contract import Facts, Member, Planned, Preview, Results
from atoll.model.errors import InvalidInput

#: PGs of the pool: for so many copies of PGs per OSD, and within these bounds.
PGS_PER_OSD, FEWEST_PGS, MOST_PGS = 50, 16, 1024


class CephPlanner:
    """See ``deploy.contract.Planner``."""

    def check_options(self, options: Mapping[str, str]) -> None:
        """Errors: InvalidInput."""
        parse(options)

    def name_of(self, options: Mapping[str, str]) -> str:
        """The storage cluster's name."""
        return parse(options).name

    # --- what stands against it ---

    def questions(self, members: list[Member], layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What each node is asked before anything is done."""
        fsid = layout.get("fsid", "")
        mons = monitors(members, parse(_shared(members))) if not layout else []
        found = {}
        for member in _inside(members):
            if member.name in layout.get("hosts", {}):
                continue
            options = parse(member.options)
            ports = [3300, 6789] if member.name in mons else []
            networks = {"public_network": options.public_network, "cluster_network": options.cluster_network}
            found[member.id] = {
                "fsid": fsid,
                "name": options.name,
                "address": member.address,
                "disks": list(options.disks),
                "ports": ports,
                "networks": {name: str(network) for name, network in networks.items() if network},
            }
        return found

    def disk_questions(self, member: Member, layout: Mapping[str, Any], disks: list[str]) -> dict[str, dict[str, Any]]:
        """Only its new disks can stand against it."""
        made = Layout.model_validate(layout)
        there = {osd.disk for osd in made.osds if osd.node == member.name}
        fresh = [disk for disk in disks if disk not in there]
        args = {"fsid": made.fsid, "name": made.name, "address": member.address, "disks": fresh, "ports": [], "networks": {}, "there": True}
        return {member.id: args}

    def objections(self, members: list[Member], facts: Mapping[str, Facts]) -> list[str]:
        """What only shows when nodes are compared."""
        found = []
        heard = [(member, facts[member.id]) for member in _inside(members) if member.id in facts]
        versions = Counter(fact.version for _, fact in heard if fact.version)
        if len(versions) > 1:
            said = ", ".join(f"{member.name} has {fact.version}" for member, fact in heard if fact.version)
            found.append(f"Ceph's versions differ: {said}; install the same one everywhere")
        names = Counter(fact.hostname for _, fact in heard if fact.hostname)
        for name, count in names.items():
            if count > 1:
                them = ", ".join(member.name for member, fact in heard if fact.hostname == name)
                found.append(f"{them} call themselves {name}: give each a hostname of its own (hostnamectl hostname NAME)")
        return found

    # --- what shall be ---

    def layout(self, members: list[Member], facts: Mapping[str, Facts], uuid: Callable[[], str]) -> dict[str, Any]:
        """A new cluster. Errors: InvalidInput."""
        inside = _inside(members)
        options = parse(_shared(members))
        osds = [Osd(uuid=uuid(), node=m.name, disk=disk) for m in inside for disk in parse(m.options).disks]
        with_disks = {osd.node for osd in osds}
        if not osds:
            raise InvalidInput("no disk is named for any node", hint=f"atoll cluster modify -S {INFO.name}:disk=/dev/sdb")
        domain = "osd" if len(with_disks) == 1 else "host"
        places = len(osds) if domain == "osd" else len(with_disks)
        size = options.size or min(3, places)
        if size > places:
            what = "disks" if domain == "osd" else "nodes with disks"
            raise InvalidInput(
                f"{size} copies need {size} {what}, and there are {places}", hint=f"-S {INFO.name}:size={places}, or more of them"
            )
        mons = monitors(members, options)
        made = Layout(
            fsid=uuid(),
            name=options.name,
            pool=options.pool,
            size=size,
            min_size=min_size(size),
            pg_num=pg_num(len(osds), size) if options.profile == "standard" else FEWEST_PGS,
            domain=domain,
            profile=options.profile,
            public_network=str(options.public_network or ""),
            cluster_network=str(options.cluster_network or ""),
            hosts={m.name: _host(m, facts.get(m.id), options) for m in inside},
            mons=mons,
            mgrs=mons[:2] if len(mons) > 1 else [m.name for m in inside][:2],
            osds=osds,
        )
        return made.model_dump(mode="json")

    def preview(self, layout: Mapping[str, Any]) -> Preview:
        """The layout in words."""
        return words.preview(Layout.model_validate(layout))

    def roles(self, layout: Mapping[str, Any]) -> dict[str, list[str]]:
        """Node (name) -> mon, mgr, osd."""
        made = Layout.model_validate(layout)
        found: dict[str, list[str]] = {name: [] for name in made.hosts}
        for role, names in (("mon", made.mons), ("mgr", made.mgrs), ("osd", [osd.node for osd in made.osds])):
            for name in dict.fromkeys(names):
                found[name].append(role)
        return found

    def tellers(self, layout: Mapping[str, Any]) -> list[str]:
        """Those with a monitor."""
        return Layout.model_validate(layout).mons

    def secrets(self, layout: Mapping[str, Any]) -> dict[str, str]:
        """A new key for each daemon and user."""
        made = Layout.model_validate(layout)
        names = ["mon.", "client.admin", CONTROLLER, NODE_USER, *(f"mgr.{name}" for name in made.mgrs), *(osd.uuid for osd in made.osds)]
        return {name: conf.new_key() for name in names}

    def kept(self, secrets: Mapping[str, str]) -> dict[str, str]:
        """A new monitor and a new client need these."""
        return {name: secrets[name] for name in ("mon.", "client.admin", CONTROLLER, NODE_USER)}

    # --- how it is made ---

    def make(self, members: list[Member], layout: dict[str, Any], secrets: Mapping[str, str], results: Results) -> Iterator[list[Planned]]:
        """Files, monitors, who may come, daemons, the pool, health, clients."""
        made = Layout.model_validate(layout)
        first = made.hosts[made.mons[0]].id
        yield [config_step(made, name, secrets) for name in made.hosts]
        yield [mon_step(made, name, secrets) for name in made.mons]
        yield [admit_step(made, first, secrets, made.mons, made.mgrs, made.osds)]
        numbers: dict[str, int] = results["admit"]["osds"]
        yield [
            *(mgr_step(made, name, secrets) for name in made.mgrs),
            *(osd_step(made, osd, numbers[osd.uuid], secrets) for osd in made.osds),
        ]
        pool = {"pool": made.pool, "size": made.size, "min_size": made.min_size, "pg_num": made.pg_num, "domain": made.domain}
        where = {"fsid": made.fsid, "osds": len(made.osds)}
        yield [Planned(key="pool", node=first, step="pool", args={**where, **pool}, deadline=300.0, text=f"making the pool {made.pool}")]
        yield [Planned(key="health", node=first, step="health", args=where, deadline=600.0, text="waiting for Ceph's health")]
        yield [client_step(made, member, secrets) for member in members]

    # --- nodes that join ---

    def grown(
        self, layout: Mapping[str, Any], members: list[Member], facts: Mapping[str, Facts], uuid: Callable[[], str]
    ) -> dict[str, Any]:
        """With their disks; and as many monitors as a new cluster of this size would have."""
        old, inside = Layout.model_validate(layout), _inside(members)
        options = parse(_shared(inside))
        fresh = [m for m in inside if m.name not in old.hosts]
        hosts = {**old.hosts, **{m.name: _host(m, facts.get(m.id), options) for m in fresh}}
        hosts = {name: hosts[name] for name in sorted(hosts, key=_natural)}
        osds = [*old.osds, *(Osd(uuid=uuid(), node=m.name, disk=disk) for m in fresh for disk in parse(m.options).disks)]
        lacking = max(0, _monitors_of(len(hosts), options) - len(old.mons))
        able = [m.name for m in inside if m.name not in old.mons]
        # All of them or none: their number stays odd.
        mons = [*old.mons, *(able[:lacking] if len(able) >= lacking else [])]
        mgrs = [*old.mgrs, *(m.name for m in fresh)][: max(2, len(old.mgrs))]
        return old.model_copy(update={"hosts": hosts, "osds": osds, "mons": mons, "mgrs": mgrs}).model_dump(mode="json")

    def more_secrets(self, layout: Mapping[str, Any], grown: Mapping[str, Any]) -> dict[str, str]:
        """Keys of new managers and OSDs."""
        old, new = Layout.model_validate(layout), Layout.model_validate(grown)
        known = {f"mgr.{name}" for name in old.mgrs} | {osd.uuid for osd in old.osds}
        names = [*(f"mgr.{name}" for name in new.mgrs), *(osd.uuid for osd in new.osds)]
        return {name: conf.new_key() for name in names if name not in known}

    def grow(
        self,
        members: list[Member],
        layouts: tuple[Mapping[str, Any], Mapping[str, Any]],
        secrets: Mapping[str, str],
        results: Results,
        teller: str,
    ) -> Iterator[list[Planned]]:
        """See ``growing``."""
        old, new = (Layout.model_validate(one) for one in layouts)
        return growing.phases(members, old, new, secrets, results, teller)

    def enter(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]], results: Results, teller: str) -> list[list[Planned]]:
        """See ``growing``."""
        old, new = (Layout.model_validate(one) for one in layouts)
        return growing.enter(old, new, results, teller)

    def with_disks(self, layout: Mapping[str, Any], name: str, disks: list[str], uuid: Callable[[], str]) -> dict[str, Any]:
        """An OSD on each that has none yet."""
        old = Layout.model_validate(layout)
        checked = parse({"disk": ":".join(disks)}).disks
        if not checked:
            raise InvalidInput("no disk is named", hint="such as /dev/sdd")
        there = {osd.disk for osd in old.osds if osd.node == name}
        fresh = [Osd(uuid=uuid(), node=name, disk=disk) for disk in checked if disk not in there]
        return old.model_copy(update={"osds": [*old.osds, *fresh]}).model_dump(mode="json")

    # --- nodes and disks that leave ---

    def shrunk(self, layout: Mapping[str, Any], name: str, disks: list[str], *, dead: bool) -> dict[str, Any]:
        """See ``shrinking``."""
        return shrinking.shrunk(Layout.model_validate(layout), name, disks, dead=dead).model_dump(mode="json")

    def spare(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]], name: str, *, dead: bool) -> Planned:
        """Ceph knows it best."""
        old, new = (Layout.model_validate(one) for one in layouts)
        return shrinking.question(old, new, name, dead=dead)

    def shrink(
        self,
        members: list[Member],
        layouts: tuple[Mapping[str, Any], Mapping[str, Any]],
        name: str,
        secrets: Mapping[str, str],
        *,
        dead: bool,
    ) -> tuple[Iterator[list[Planned]], Iterator[list[Planned]]]:
        """See ``shrinking``."""
        old, new = (Layout.model_validate(one) for one in layouts)
        first = shrinking.before(old, new, name, secrets, dead=dead)
        return first, shrinking.after(members, old, new, name, secrets, dead=dead)

    def changed(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Preview:
        """What comes and what goes, and what is then."""
        old, new = (Layout.model_validate(one) for one in layouts)
        return words.changed(old, new)

    # --- a node that goes away for a while ---

    def stops(self, layout: Mapping[str, Any], name: str, teller: str) -> Planned:
        """See ``resting``."""
        return resting.question(Layout.model_validate(layout), name, teller)

    def rest(self, layout: Mapping[str, Any], name: str, teller: str, *, hold: bool, wait: bool) -> list[list[Planned]]:
        """See ``resting``."""
        return resting.rest(Layout.model_validate(layout), name, teller, hold=hold, wait=wait)

    def wake(self, layout: Mapping[str, Any], name: str, teller: str) -> list[list[Planned]]:
        """See ``resting``."""
        return resting.wake(Layout.model_validate(layout), name, teller)

    def finished(self, layout: dict[str, Any], results: Results) -> dict[str, Any]:
        """The layout with the OSDs' numbers."""
        made, numbers = Layout.model_validate(layout), results["admit"]["osds"]
        osds = [o if o.number is not None else o.model_copy(update={"number": numbers[o.uuid]}) for o in made.osds]
        return made.model_copy(update={"osds": osds}).model_dump(mode="json")

    def outcome(self, layout: Mapping[str, Any], results: Results) -> dict[str, Any]:
        """What people are told."""
        made = Layout.model_validate(layout)
        options = f"-O pool={made.pool} -O conf={CLIENTS}/{made.name}.conf -O keyring={CLIENTS}/{made.name}.{CONTROLLER}.keyring"
        return {
            "health": results["health"]["health"],
            "checks": results["health"]["checks"],
            "osds": len(made.osds),
            "monitors": made.mons,
            "next": f"atoll pool add NAME -t rbd {options} -O node_keyring={CLIENTS}/{made.name}.{NODE_USER}.keyring",
        }


# --- choices ---


def min_size(size: int) -> int:
    """How many copies a write needs: more than half, and never one while there are several, or it could lie in one place only."""
    return 1 if size == 1 else max(2, size // 2 + 1)


def pg_num(osds: int, size: int) -> int:
    """A power of two."""
    wanted = osds * PGS_PER_OSD // size
    return max(FEWEST_PGS, min(MOST_PGS, 1 << (max(1, wanted).bit_length() - 1)))


def monitors(members: list[Member], options: Options) -> list[str]:
    """Where monitors are: an odd number of nodes, the first by name."""
    names = [member.name for member in _inside(members)]
    number = _monitors_of(len(names), options)
    if number > len(names):
        raise InvalidInput(f"{number} monitors need {number} nodes, and there are {len(names)}", hint=f"-S {INFO.name}:monitors=1")
    return names[:number]


def _monitors_of(nodes: int, options: Options) -> int:
    return options.monitors or (5 if nodes >= 5 else 3 if nodes >= 3 else 1)


def _inside(members: list[Member]) -> list[Member]:
    return sorted((member for member in members if member.inside), key=lambda member: _natural(member.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def _shared(members: list[Member]) -> dict[str, str]:
    """The options that hold for the whole cluster; nodes may differ in their disks only. Errors: InvalidInput."""
    inside = _inside(members)
    if not inside:
        raise InvalidInput("there is no node to make a storage cluster of")
    shared = {name: value for name, value in inside[0].options.items() if name != "disk"}
    for member in inside:
        for name in {*shared, *member.options} - {"disk"}:
            if shared.get(name) != member.options.get(name):
                raise InvalidInput(
                    f"option {name} is for the whole storage cluster, and {member.name} has another than {inside[0].name}",
                    hint=f"atoll node modify {member.name} -S {INFO.name}:{name}=",
                )
    return shared


def _host(member: Member, facts: Facts | None, options: Options) -> Host:
    public = _address(member, facts, options.public_network) if options.public_network else member.address
    replica = _address(member, facts, options.cluster_network) if options.cluster_network else ""
    return Host(id=member.id, public=public, replica=replica)


def _address(member: Member, facts: Facts | None, network: Network) -> str:
    """The node's own address if it lies there, else its first that does; empty: nobody has looked yet."""
    known = [member.address, *(facts.addresses if facts else [])]
    return next((address for address in known if within(network, address)), "")


PLANNER = CephPlanner()
