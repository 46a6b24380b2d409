"""The master's machine loses power for good. A candidate takes over, everything goes on, and the old master is refused when it returns.

Then the master moves once more, by a backup, to a node that was never a candidate.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.lab.bringup import ATOLL, daemon, make_cluster
from atoll.lab.lab import Lab
from atoll.lab.nodes import Node

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(600), pytest.mark.xdist_group("master-lost")]
MIB = 1 << 20


class Trio:
    """Three nodes with the fake hypervisor; node1 is the master, node2 a candidate; a guest on each."""

    def __init__(self) -> None:
        self.lab = Lab.create(f"mlost-{os.getpid()}", 3)
        self.master = "node1"
        try:
            make_cluster(self.lab, "fake")
            self.ok("node1", "pool", "add", "shared", "-t", "sharedfile", f"path={self.lab.shared}")
            self.ok("node1", "node", "modify", "node2", "--role", "vm", "--role", "master-candidate")
            for number in (1, 2, 3):
                self.add(f"web{number}", f"node{number}")
        except BaseException:
            self.lab.down()
            raise

    def node(self, name: str) -> Node:
        return self.lab.node(name)

    def type(self, node: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """A command of the command line, typed on a node."""
        done: subprocess.CompletedProcess[str] = self.node(node).exec([*ATOLL, *words], timeout=120, **more)
        return done

    def ok(self, node: str, *words: str) -> str:
        done = self.type(node, *words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def rows(self, noun: str) -> dict[str, dict[str, Any]]:
        """All objects of a kind, by name, as the master that leads now tells."""
        return {row["name"]: row for row in json.loads(self.ok(self.master, noun, "list", "--format", "json"))}

    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.type(self.master, "cluster", "verify", "--format", "json").stdout)
        return found

    def add(self, name: str, node: str) -> None:
        boot = ("--append", "ctr=vda")
        self.ok(self.master, "instance", "add", name, "-t", "sharedfile", "--disk", "0:size=16M", "-B", "maxmem=64M", "-n", node, *boot)

    def lead(self, name: str) -> None:
        """As systemd would: the master starts, now and at each boot."""
        self.master = name
        self.node(name).set_service("master", daemon("master", self.node(name).config_path))
        self.until(lambda: self.type(name, "node", "list").returncode == 0, f"the master on {name} answers")

    def guests(self) -> dict[str, tuple[str, int]]:
        """Instance id -> node and process of its guest, from /run itself."""
        found = {}
        for node in self.lab.nodes:
            for file in node.run_dir.glob("guests/*/pid") if node.running else []:
                pid = node.host_pid(int(file.read_text().split()[0]))
                if pid and b"fakeguest" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[file.parent.name] = (node.name, pid)
        return found

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.1)
        return found

    def quiet(self) -> bool:
        return self.type(self.master, "cluster", "verify").returncode == 0


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    made = Trio()
    try:
        yield made
    finally:
        made.lab.down()


def secrets_of(node: Node) -> list[str]:
    """The lines of the keys that must be seen nowhere. The end of the CA's is its public half, which every certificate has."""
    etc = node.root / "etc/atoll"
    return [*(etc / "master/ca.key").read_text().splitlines()[1:3], (etc / "master.key").read_text().strip()]


def test_the_copy_and_the_keys_reach_the_candidate_and_nobody_else(trio: Trio) -> None:
    trio.until(lambda: trio.rows("node")["node2"]["replica"] == "in step", "node2 has everything")
    home = trio.node("node2").root
    for name in ("ca.pem", "ca.key", "master.key"):
        assert stat.S_IMODE((home / "etc/atoll/candidate" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "etc/atoll/candidate").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "var/lib/atoll/replica/log").stat().st_mode) == 0o600
    assert not (trio.node("node3").root / "etc/atoll/candidate").exists()
    secrets = secrets_of(trio.node("node1"))
    assert secrets
    for node in trio.lab.nodes:
        for log in node.log_dir.iterdir():
            assert not [line for line in secrets if line in log.read_text(errors="replace")], log
        for place in ("replica", "store"):
            for file in (node.root / "var/lib/atoll" / place).glob("*"):
                assert not [line for line in secrets if line.encode() in file.read_bytes()], file
    # A node's certificate gets nothing from another agent.
    outsider = (
        "import asyncio, sys; from pathlib import Path; from atoll.model.errors import AtollError; from atoll.model.messages import Call;"
        "from atoll.model.objects import Node; from atoll.rpc.https import HttpsTransport; from atoll.runtime.tls import fresh_client\n"
        "async def ask():\n"
        "    transport = HttpsTransport(fresh_client(Path('/etc/atoll/tls')))\n"
        "    for method in ('recall', 'replica.forget', 'replica.append', 'master.follow'):\n"
        "        try:\n"
        f"            await transport.call(Node(id='x', name='node2', group='', address='{trio.node('node2').address}'),"
        " Call(term=10**9, method=method, args={'masters': [], 'term': 1}), print)\n"
        "            print('obeyed', method)\n"
        "        except AtollError as error:\n"
        "            print(type(error).__name__, error.message)\n"
        "    await transport.close()\n"
        "asyncio.run(ask())\n"
    )
    done = trio.node("node3").exec([ATOLL[0], "-c", outsider], timeout=60)
    assert done.stdout.count("agents obey masters only") == 4, (done.stdout, done.stderr)
    assert (home / "etc/atoll/candidate/ca.key").exists()


def test_it_is_refused_while_the_master_leads(trio: Trio) -> None:
    before = trio.rows("node")
    assert "a master works on node node1" in trio.type("node2", "cluster", "master-failover", "-f").stderr
    refused = trio.type("node2", "cluster", "master-failover", "-f", "--node-is-dead", "node1")
    assert refused.returncode == 6
    assert "node node1 answers" in refused.stderr
    assert "no master candidate" in trio.type("node3", "cluster", "master-failover", "-f").stderr
    trio.node("node1").cut()
    try:
        # Cut off, it may lead all the same: a person has to say that it does not.
        assert "if it still leads" in trio.type("node2", "cluster", "master-failover", "-f").stderr
    finally:
        trio.node("node1").heal()
    trio.until(lambda: all(row["alive"] for row in trio.rows("node").values()), "all are back")
    assert trio.rows("node").keys() == before.keys()


def test_a_candidate_takes_over_and_the_guests_go_on(trio: Trio) -> None:
    before = trio.guests()
    assert len(before) == 3
    trio.until(lambda: trio.rows("node")["node2"]["replica"] == "in step", "node2 has everything")
    trio.node("node1").kill()
    done = trio.ok("node2", "cluster", "master-failover", "-f", "--node-is-dead", "node1")
    assert "to be the master now" in done
    trio.lead("node2")
    trio.until(lambda: all(trio.rows("node")[n]["alive"] for n in ("node2", "node3")), "node2 and node3 follow the new master")
    rows = trio.rows("instance")
    assert (rows["web2"]["state"], rows["web3"]["state"]) == ("running", "running")
    assert {i: g for i, g in trio.guests().items()} == {i: g for i, g in before.items() if g[0] != "node1"}
    trio.until(lambda: trio.type("node2", "node", "failover", "node1").returncode == 0, "web1 is started elsewhere")
    assert trio.rows("instance")["web1"]["state"] == "running"
    trio.add("web4", "node3")
    trio.ok("node2", "instance", "migrate", "web4")
    hint = trio.type("node3", "node", "list").stderr
    assert f"https://{trio.node('node2').address}:7770" in hint


def test_the_old_master_is_refused_when_it_returns(trio: Trio) -> None:
    before = trio.guests()
    trio.node("node1").boot()
    log = trio.node("node1").log_dir / "master.log"
    trio.until(lambda: "another master has taken over" in log.read_text(), "the old master says that it was deposed")
    assert "let this node be a candidate of the new master" in log.read_text()
    trio.until(lambda: trio.rows("node")["node1"]["state"] == "ok", "node1 is readmitted")
    trio.until(lambda: trio.rows("node")["node1"]["replica"] == "in step", "node1 is a candidate")
    trio.until(trio.quiet, "nothing is wrong")
    assert trio.guests() == before
    assert all(row["state"] == "running" for row in trio.rows("instance").values())
    # It does not try again, whatever it can reach.
    trio.node("node1").cut()
    try:
        refused = trio.node("node1").exec(daemon("master", trio.node("node1").config_path), timeout=60)
        assert refused.returncode == 10, refused
        assert trio.type("node1", "node", "list").returncode == 8
    finally:
        trio.node("node1").heal()
    trio.until(trio.quiet, "nothing is wrong")


def test_a_backup_makes_another_node_the_master(trio: Trio) -> None:
    done = trio.type("node2", "cluster", "backup", "/var/lib/atoll/saved")
    assert done.returncode == 0, done
    assert "/etc/atoll/master.key" in done.stderr
    saved = trio.node("node2").root / "var/lib/atoll/saved"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    content = saved.read_bytes()
    assert not [line for line in secrets_of(trio.node("node2")) if line.encode() in content]
    trio.add("late", "node1")
    late = trio.rows("instance")["late"]["id"]
    trio.ok("node2", "instance", "stop", "web2")
    before = trio.guests()
    there = trio.node("node3").root / "var/lib/atoll"
    (there / "saved").write_bytes(content)
    (there / "key").write_bytes((trio.node("node2").root / "etc/atoll/master.key").read_bytes())
    (there / "key").chmod(0o600)
    words = ("cluster", "restore", "/var/lib/atoll/saved", "-f", "--master-key", "/var/lib/atoll/key")
    assert "a master works on node node2" in trio.type("node3", *words).stderr
    trio.node("node2").stop_service("master")
    assert "without the master key" in trio.type("node3", *words[:4]).stderr
    said = trio.ok("node3", *words)
    assert "web2: was let go by" in said
    assert "late on node1: newer than the copy" in said
    trio.lead("node3")
    trio.until(lambda: all(row["alive"] for row in trio.rows("node").values()), "all follow the new master")
    trio.until(lambda: {"node1", "node2"} <= {n for n, row in trio.rows("node").items() if row["replica"] == "in step"}, "in step")
    found = [(f["what"], f["about"]) for f in trio.findings()]
    assert ("stranger: a guest that no instance owns", "late on node1") in found
    assert [about for what, about in found if what == "orphan image" and late is not None]
    assert trio.guests() == before, "a guest was harmed"
    states = {name: row["state"] for name, row in trio.rows("instance").items()}
    assert states == {"web1": "running", "web2": "stopped", "web3": "running", "web4": "running"}
    trio.ok("node3", "instance", "start", "web2")
    trio.node("node2").start_service("master")
    log = trio.node("node2").log_dir / "master.log"
    trio.until(lambda: "another master has taken over" in log.read_text(), "the old master says that it was deposed")


def test_the_role_taken_away_takes_the_keys_away(trio: Trio) -> None:
    for name in ("node1", "node2"):
        trio.ok("node3", "node", "modify", name, "--role", "vm")
    for name in ("node1", "node2"):
        home = trio.node(name).root
        places = [home / "etc/atoll" / word for word in ("candidate", "master", "master.key")] + [home / "var/lib/atoll/replica"]
        trio.until(lambda places=places: not [p for p in places if p.exists()], f"{name} has no keys any more")
    trio.until(lambda: not [f for f in trio.findings() if "keys" in f["what"]], "everybody knows")
