"""What shall be where in a Ceph cluster: choices that must hold for every number of nodes, disks and options."""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.deploy.ceph import conf, options, words
from atoll.deploy.ceph.layout import Layout
from atoll.deploy.ceph.plan import CONTROLLER, NODE_USER, PLANNER, min_size, pg_num
from atoll.deploy.contract import Facts, Member
from atoll.model.errors import InUse, InvalidInput


def members(count: int, disks: str = "/dev/sdb", clients: int = 0, **more: str) -> list[Member]:
    made = [
        Member(id=f"id{n}", name=f"node{n}", address=f"10.0.0.{n}", options={"disk": disks, **more}, controller=n == 1)
        for n in range(1, count + 1)
    ]
    return made + [Member(id=f"c{n}", name=f"client{n}", address=f"10.1.0.{n}", inside=False) for n in range(clients)]


def layout(found: list[Member], facts: dict[str, Facts] | None = None) -> Layout:
    count = itertools.count()
    return Layout.model_validate(PLANNER.layout(found, facts or {}, lambda: f"uuid-{next(count)}"))


def phases(found: list[Member]) -> tuple[Layout, dict[str, str], list[list[Any]]]:
    made = layout(found)
    secrets = PLANNER.secrets(made.model_dump())
    results: dict[str, Any] = {"admit": {"osds": {osd.uuid: number for number, osd in enumerate(made.osds)}}}
    return made, secrets, list(PLANNER.make(found, made.model_dump(), secrets, results))


@pytest.mark.parametrize(
    ("nodes", "disks", "mons", "mgrs", "size", "least", "domain", "spare"),
    [
        (1, "/dev/sdb", 1, 1, 1, 1, "osd", 0),
        (1, "/dev/sdb:/dev/sdc", 1, 1, 2, 2, "osd", 0),
        (1, "/dev/sdb:/dev/sdc:/dev/sdd", 1, 1, 3, 2, "osd", 0),
        (2, "/dev/sdb", 1, 2, 2, 2, "host", 0),
        (3, "/dev/sdb:/dev/sdc", 3, 2, 3, 2, "host", 1),
        (4, "/dev/sdb", 3, 2, 3, 2, "host", 1),
        (5, "/dev/sdb", 5, 2, 3, 2, "host", 1),
    ],
)
def test_the_usual_sizes(nodes: int, disks: str, mons: int, mgrs: int, size: int, least: int, domain: str, spare: int) -> None:
    made = layout(members(nodes, disks))
    assert (len(made.mons), len(made.mgrs), made.size, made.min_size, made.domain) == (mons, mgrs, size, least, domain)
    assert len(made.osds) == nodes * len(disks.split(":"))
    assert words.nodes_to_spare(made) == spare


def test_two_nodes_are_told_what_stops() -> None:
    told = words.preview(layout(members(2)))
    assert any("when a node stops, reading and writing stop until it is back" in line for line in told.warnings)
    assert any("node1 has the only monitor" in line for line in told.warnings)
    assert not any("may fail" in line for line in told.survives)


def test_three_nodes_are_told_that_one_may_fail() -> None:
    assert "one node may fail, whichever: guests go on reading and writing" in words.preview(layout(members(3))).survives


@given(nodes=st.integers(1, 12), disks=st.integers(1, 4), size=st.integers(0, 10), mons=st.sampled_from(["", "1", "3", "5", "7"]))
def test_what_always_holds(nodes: int, disks: int, size: int, mons: str) -> None:
    names = ":".join(f"/dev/sd{chr(98 + n)}" for n in range(disks))
    found = members(nodes, names, size=str(size or ""), monitors=mons)
    if size > (disks if nodes == 1 else nodes) or int(mons or 0) > nodes:
        with pytest.raises(InvalidInput) as refused:
            layout(found)
        assert refused.value.hint
        return
    made = layout(found)
    assert len(made.mons) % 2 == 1
    assert len(set(made.mons)) == len(made.mons)
    assert made.min_size > 1 or made.size == 1
    assert made.size / 2 < made.min_size <= made.size
    assert len(made.mgrs) == min(2, nodes)
    assert len({(osd.node, osd.disk) for osd in made.osds}) == len(made.osds) == nodes * disks
    assert made.pg_num & (made.pg_num - 1) == 0
    # Whichever nodes are lost: no more than what it is said to survive.
    spare = words.nodes_to_spare(made)
    for lost in itertools.combinations(made.hosts, spare) if nodes <= 6 else ():
        assert len(set(made.mons) - set(lost)) > len(made.mons) / 2
        assert made.size - len(lost) >= made.min_size
    roles = PLANNER.roles(made.model_dump())
    assert set(roles) == set(made.hosts)
    assert layout(found) == made, "the same nodes and options give the same plan"


@given(st.integers(1, 10))
def test_a_write_is_never_acknowledged_by_one_copy_of_several(size: int) -> None:
    assert (min_size(size) == 1) == (size == 1)


@given(st.integers(1, 5000), st.integers(1, 10))
def test_placement_groups_are_a_power_of_two_within_bounds(osds: int, size: int) -> None:
    found = pg_num(osds, size)
    assert 16 <= found <= 1024
    assert found & (found - 1) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"disc": "/dev/sdb"}, "no option 'disc'"),
        ({"disk": "sdb"}, "is not a device"),
        ({"disk": "/dev/../etc/passwd"}, "is not a device"),
        ({"disk": "/dev/sdb:/dev/sdb"}, "twice"),
        ({"size": "0"}, "from 1 to 10"),
        ({"size": "three"}, "from 1 to 10"),
        ({"monitors": "4"}, "give an odd number"),
        ({"public_network": "10.0.0.300/24"}, "is a network"),
        ({"profile": "tiny"}, "standard, small"),
        ({"name": "../x"}, "is a word"),
        ({"pool": "a b"}, "is a word"),
    ],
)
def test_bad_options_are_refused_with_what_they_take(given: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        options.parse(given)


def test_without_a_disk_there_is_no_plan() -> None:
    with pytest.raises(InvalidInput, match="no disk is named") as refused:
        layout(members(3, ""))
    assert "disk=" in refused.value.hint


def test_a_node_may_have_other_disks_but_nothing_else_of_its_own() -> None:
    found = members(3)
    found[1] = found[1].model_copy(update={"options": {"disk": "/dev/nvme0n1:/dev/nvme1n1"}})
    assert [osd.disk for osd in layout(found).osds if osd.node == "node2"] == ["/dev/nvme0n1", "/dev/nvme1n1"]
    found[1] = found[1].model_copy(update={"options": {"disk": "/dev/sdb", "size": "2"}})
    with pytest.raises(InvalidInput, match="option size is for the whole storage cluster"):
        layout(found)


def test_networks_choose_the_addresses() -> None:
    found = members(3, public_network="192.168.7.0/24", cluster_network="192.168.8.0/24")
    facts = {m.id: Facts(addresses=[m.address, f"192.168.8.{n}", f"192.168.7.{n}"]) for n, m in enumerate(found, 1)}
    made = layout(found, facts)
    assert [(host.public, host.replica) for host in made.hosts.values()] == [(f"192.168.7.{n}", f"192.168.8.{n}") for n in (1, 2, 3)]
    text = conf.node(made, "node2")
    assert "public_addr = 192.168.7.2\ncluster_addr = 192.168.8.2\n" in text
    assert "mon_host = [v2:192.168.7.1:3300,v1:192.168.7.1:6789],[v2:192.168.7.2" in text
    # For a preview nobody has asked the nodes.
    assert "an address in 192.168.7.0/24" in words.preview(layout(found)).lines[0]


def test_names_with_numbers_are_in_their_order() -> None:
    assert layout(members(11)).mons == ["node1", "node2", "node3", "node4", "node5"]


def test_no_key_is_in_what_is_journaled() -> None:
    """Undo arguments, texts and keys of steps are journaled as they are; so is the layout."""
    made, secrets, found = phases(members(3, clients=1))
    open_text = json.dumps([(p.key, p.undo_args, p.text) for phase in found for p in phase]) + made.model_dump_json()
    assert not [key for key in secrets.values() if key in open_text]
    in_args = json.dumps([p.args for phase in found for p in phase])
    assert [key for key in secrets.values() if key in in_args] == list(secrets.values()), "and every key is brought somewhere"


def test_each_node_gets_only_the_keys_that_it_needs() -> None:
    found = members(4, clients=1)
    _, secrets, planned = phases(found)
    by_node: dict[str, str] = {}
    for phase in planned:
        for step in phase:
            by_node[step.node] = by_node.get(step.node, "") + json.dumps(step.args)
    has = {m.name: {name for name, key in secrets.items() if key in by_node[m.id]} for m in found}
    assert has["client0"] == {NODE_USER}
    assert "client.admin" not in has["node4"], "there is no monitor"
    assert CONTROLLER in has["node1"]
    assert CONTROLLER not in has["node2"]
    assert {name for name in has["node4"] if name.startswith("uuid-")} == {"uuid-3"}


def test_every_step_that_leaves_something_on_a_node_can_be_undone() -> None:
    _, _, planned = phases(members(3))
    lasting = {step.step for phase in planned for step in phase if step.undo}
    # What the monitors know is gone with them.
    assert {step.step for phase in planned for step in phase} - lasting == {"admit", "pool", "health"}


def test_objections_compare_nodes() -> None:
    found = members(3)
    told = {"id1": ("16.2.15", "a"), "id2": ("16.2.11", "a"), "id3": ("16.2.15", "c")}
    facts = {node: Facts(version=version, hostname=name) for node, (version, name) in told.items()}
    said = PLANNER.objections(found, facts)
    assert any("versions differ: node1 has 16.2.15, node2 has 16.2.11" in line for line in said)
    assert any("node1, node2 call themselves a" in line for line in said)
    assert len(said) == 2


def test_a_key_is_one_of_cephs() -> None:
    raw = base64.b64decode(conf.new_key())
    kind, seconds, nanoseconds, length = struct.unpack("<hiih", raw[:12])
    assert (kind, length, len(raw)) == (1, 16, 28)
    assert seconds > 1_700_000_000
    assert 0 <= nanoseconds < 10**9


def test_a_keyring_quotes_its_capabilities() -> None:
    text = conf.keyring("client.x", "KEY", {"mon": 'profile rbd, allow command "osd blocklist"'})
    assert text == '[client.x]\n\tkey = KEY\n\tcaps mon = "profile rbd, allow command \\"osd blocklist\\""\n'


def test_addresses_of_version_six() -> None:
    found = [m.model_copy(update={"address": f"fd00::{n}"}) for n, m in enumerate(members(3), 1)]
    made = layout(found)
    assert made.mon_host.startswith("[v2:[fd00::1]:3300,v1:[fd00::1]:6789]")
    assert "ms_bind_ipv6 = true\nms_bind_ipv4 = false" in conf.node(made, "node1")


# --- nodes and disks that leave ---


def numbered(found: list[Member]) -> dict[str, Any]:
    made = layout(found)
    osds = [osd.model_copy(update={"number": number}) for number, osd in enumerate(made.osds)]
    return made.model_copy(update={"osds": osds}).model_dump()


def leaving(count: int, name: str, *, dead: bool = False, disks: str = "/dev/sdb:/dev/sdc", gone: list[str] | None = None) -> Any:
    """The steps before and after the commit, and all keys of secrets."""
    found = members(count, disks, clients=1)
    old = numbered(found)
    new = PLANNER.shrunk(old, name, gone or [], dead=dead)
    secrets = {**PLANNER.kept(PLANNER.secrets(old)), **PLANNER.more_secrets(old, new)}
    them = [m for m in found if not dead or m.name != name]
    before, after = PLANNER.shrink(them, (old, new), name, secrets, dead=dead)
    return [step for phase in before for step in phase], [step for phase in after for step in phase], secrets


def names_of(steps: list[Any]) -> list[str]:
    return [step.step for step in steps]


@given(nodes=st.integers(2, 7), which=st.integers(1, 7), dead=st.booleans(), disks=st.sampled_from(["/dev/sdb", "/dev/sdb:/dev/sdc"]))
def test_what_holds_for_every_node_that_leaves(nodes: int, which: int, dead: bool, disks: str) -> None:
    name = f"node{min(which, nodes)}"
    found = members(nodes, disks)
    old = numbered(found)
    room = nodes - 1 >= old["size"]
    alone = dead and old["mons"] == [name]
    if alone or (not room and not dead):
        with pytest.raises(InUse, match="only monitor" if alone else "copies need") as refused:
            PLANNER.shrunk(old, name, [], dead=dead)
        assert refused.value.hint
        return
    new = Layout.model_validate(PLANNER.shrunk(old, name, [], dead=dead))
    assert name not in {*new.hosts, *new.mons, *new.mgrs, *(osd.node for osd in new.osds)}
    assert new.size == old["size"]
    able = nodes - 1 - len([mon for mon in old["mons"] if mon != name])
    assert len(new.mons) == len(old["mons"]) - (name in old["mons"] and not able)
    before, after, secrets = leaving(nodes, name, dead=dead, disks=disks)
    keys = [step.key for step in before + after]
    assert len(set(keys)) == len(keys), "the journal tells steps by their keys"
    # Nothing goes for good before the commit, and everything before it can be undone.
    assert not {"unosd", "unmon", "unmgr", "dismiss", "dropmon", "unconfig"} & set(names_of(before))
    assert {step.step for step in before if not step.undo} <= {"emptied", "unneeded", "quorum"}
    assert ("emptied" in names_of(before)) == room
    assert ("unneeded" in names_of(before)) == (not room)
    open_text = json.dumps([(step.key, step.undo_args, step.text) for step in before + after])
    assert not [key for key in secrets.values() if key in open_text]
    if dead:
        gone = next(m.id for m in found if m.name == name)
        assert not [step for step in before + after if step.node == gone], "nobody asks the dead"


def test_a_monitor_that_lives_goes_when_its_successor_is_there_and_a_dead_one_before() -> None:
    before, after, _ = leaving(4, "node2")
    assert names_of(before).index("mon") < names_of(before).index("quorum") < names_of(before).index("emptied")
    assert names_of(after)[0] == "dropmon"
    assert after[0].args["left"] == ["node1", "node3", "node4"]
    before, after, _ = leaving(4, "node2", dead=True)
    # With it still counted, losing the newcomer would cost the majority.
    assert "mon" not in names_of(before)
    assert names_of(after).index("dropmon") < names_of(after).index("mon")
    assert after[0].args["left"] == ["node1", "node3"]


def test_a_disk_is_erased_when_it_is_empty_and_left_alone_when_it_has_failed() -> None:
    before, after, _ = leaving(3, "node2", gone=["/dev/sdc"])
    assert names_of(before) == ["out", "emptied"]
    assert [(step.step, step.args.get("keep")) for step in after] == [("unosd", False), ("dismiss", None)]
    assert after[1].args == {"osds": ["uuid-3"], "mgrs": [], "hosts": []}
    _, after, _ = leaving(3, "node2", gone=["/dev/sdc"], dead=True)
    assert after[0].args["keep"]


def test_new_disks_take_no_data_before_the_commit() -> None:
    found = members(3)
    old = numbered(found)
    grown = PLANNER.with_disks(old, "node2", ["/dev/sdb", "/dev/sdc"], lambda: "new")
    assert [osd["disk"] for osd in grown["osds"] if osd["node"] == "node2"] == ["/dev/sdb", "/dev/sdc"]
    secrets = {**PLANNER.kept(PLANNER.secrets(old)), **PLANNER.more_secrets(old, grown)}
    results = {"admit": {"osds": {"new": 7}}}
    steps = [step for phase in PLANNER.grow([found[1]], (old, grown), secrets, results, "id1") for step in phase]
    assert names_of(steps) == ["admit", "osd", "settled"]
    assert steps[0].args["empty"]
    ((last,),) = PLANNER.enter((old, grown), results, "id1")
    assert (last.step, last.args, last.undo) == ("in", {"osds": [7]}, "")


def test_the_osds_of_a_node_that_rests_stop_before_its_monitor() -> None:
    """While monitors elect, nobody hears that an OSD has gone."""
    steps = [step for phase in PLANNER.rest(numbered(members(3)), "node2", "id1", hold=True, wait=True) for step in phase]
    assert names_of(steps) == ["hold", "stop", "away", "stop", "away"]
    assert [step.args.get("daemons") for step in steps if step.step == "stop"] == [["osd.1"], ["mgr.node2", "mon.node2"]]
    assert steps[2].args == {"osds": [1], "mons": []}
