"""A real Ceph cluster of three real nodes, and a fourth that joins: bluestore on spare disks, plain daemons, all by our own commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import until

from atoll.lab.bringup import ATOLL
from ceph_trial import DISK, MORE, PROGRAMS, Trial, Watching, Writer, keys_of, killed_and_back

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("ceph-deploy"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
    pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS), reason="Ceph is not installed"),
]
CLIENT = ["-c", "/etc/atoll/ceph/ceph.conf", "-n", "client.atoll"]


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    made = Trial(f"cd{os.getpid()}")
    try:
        yield made
    finally:
        made.lab.down()


@pytest.fixture(scope="module")
def writer(trial: Trial) -> Writer:
    """It writes from here to the end, whatever becomes of the nodes."""
    return Writer(trial)


def test_everything_that_stands_against_it_is_told_at_once(trial: Trial) -> None:
    trial.atoll("cluster", "modify", "-S", f"ceph:disk={DISK},profile=small")
    trial.node("node2").exec(["sh", "-c", "echo '[global]' > /etc/ceph/ceph.conf"], check=True)
    trial.node("node3").exec(["mkfs.xfs", "-q", DISK], check=True)
    trial.atoll("node", "modify", "node1", "-S", f"ceph:disk={DISK}:/dev/disk9")
    plan = trial.atoll("storage", "init", "-s", "ceph", "default", "--dry-run").stdout
    assert "one node may fail, whichever: guests go on reading and writing" in plan
    done = trial.atoll("storage", "init", "-s", "ceph", "default", check=False)
    assert done.returncode == 6, done.stdout + done.stderr
    for words in ("node1: disk /dev/disk9 is not there", "node2: /etc/ceph/ceph.conf exists", "node3: disk /dev/disk1 is not empty"):
        assert words in done.stderr, done.stderr
    assert not any(trial.daemons(node.name) for node in trial.lab.nodes)
    assert not trial.has("node1", "/etc/ceph/ceph.conf")
    trial.node("node2").exec(["rm", "/etc/ceph/ceph.conf"], check=True)
    trial.node("node3").exec(["wipefs", "-qa", DISK], check=True)
    trial.atoll("node", "modify", "node1", "-S", "ceph:disk=")


def test_what_is_cancelled_in_the_middle_leaves_nothing(trial: Trial) -> None:
    held = trial.arm("node3", "agent", "hold agent:ceph.osd:after")
    job = trial.atoll("storage", "init", "-s", "ceph", "default", "--submit").stdout.strip()
    until(held.with_name(f"{held.name}.held").exists, "the OSD on node3 is made")
    assert trial.daemons("node1")
    trial.atoll("job", "cancel", job)
    until(lambda: trial.ask("job", "info", job)["state"] == "undone", "it is undone")
    held.unlink(missing_ok=True)
    held.with_name(f"{held.name}.held").unlink(missing_ok=True)
    for node in trial.lab.nodes:
        assert trial.daemons(node.name) == {}
        left = node.exec(["find", "/etc/ceph", "/etc/atoll/ceph", "/var/lib/ceph", "-type", "f"]).stdout
        assert left == "", left
        assert node.exec(["blkid", "-p", DISK]).returncode == 2, "the disk is empty again"
    assert trial.ask("storage", "list") == []


def test_three_nodes_become_a_ceph_cluster_though_master_and_agent_die(trial: Trial) -> None:
    faults = [
        trial.arm("node2", "agent", "agent:ceph.osd:after"),
        # The intents of managers and OSDs are journaled, and no order has been given.
        trial.arm("node1", "master", "master:storage.init:16:after-intent"),
    ]
    began = time.monotonic()
    with Watching() as watching:
        done = trial.atoll("storage", "init", "-s", "ceph", "default")
    print(f"made in {time.monotonic() - began:.1f} s")
    assert "health: HEALTH_OK" in done.stdout
    assert not [path.name for path in faults if path.exists()], "both have died"
    status = trial.ask("storage", "status", "ceph")
    assert (status["quorum"], status["osds_up"], status["manager"]) == (["node1", "node2", "node3"], 3, True)
    rows = {row["name"]: row for row in trial.ask("node", "list")}
    assert [rows[f"node{n}"]["storage_roles"] for n in (1, 2, 3)] == [["mon", "mgr", "osd"], ["mon", "mgr", "osd"], ["mon", "osd"]]
    keys = keys_of(trial)
    assert len(keys) == 4 + 2 + 3, "mon., admin, two clients; two managers; three OSDs"
    assert not [line for line in watching.seen if any(key in line for key in keys)], "a key was in a command line"
    assert any("ceph-osd" in line for line in watching.seen)
    # The key that manages images lies on the controller only; the administrator's where monitors are.
    assert trial.has("node1", "/etc/atoll/ceph/ceph.client.atoll.keyring")
    assert not trial.has("node2", "/etc/atoll/ceph/ceph.client.atoll.keyring")
    assert trial.has("node2", "/etc/atoll/ceph/ceph.client.atoll-node.keyring")


def test_no_key_is_in_the_store_or_in_logs(trial: Trial) -> None:
    keys = [key.encode() for key in keys_of(trial)]
    here = trial.node("node1")
    files = [path for path in (here.root / "var/lib/atoll/store").rglob("*") if path.is_file()]
    files += [path for node in trial.lab.nodes for path in node.log_dir.rglob("*") if path.is_file()]
    files += [node.root / "var/lib/atoll/agent.db" for node in trial.lab.nodes]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not any(key in content for key in keys), path


def test_clients_write_and_read(trial: Trial) -> None:
    here = trial.node("node1")
    here.exec(["sh", "-c", "head -c 8M /dev/urandom > /tmp/data"], check=True)
    here.exec(["rbd", *CLIENT, "import", "/tmp/data", "rbd/one"], check=True, timeout=60)
    here.exec(["rbd", *CLIENT, "export", "rbd/one", "/tmp/back"], check=True, timeout=60)
    here.exec(["cmp", "/tmp/data", "/tmp/back"], check=True)
    # Who only opens images cannot make others' users, and who manages images is no administrator.
    denied = here.exec(["ceph", *CLIENT, "--connect-timeout", "20", "auth", "ls"], timeout=60)
    assert denied.returncode == 13, denied.stderr


def test_a_pool_in_it_tells_how_it_is(trial: Trial) -> None:
    options = ["pool=rbd", "conf=/etc/atoll/ceph/ceph.conf", "keyring=/etc/atoll/ceph/ceph.client.atoll.keyring"]
    trial.atoll("pool", "add", "vms", "-t", "rbd", *options, "node_keyring=/etc/atoll/ceph/ceph.client.atoll-node.keyring")

    def sample() -> dict[str, Any]:
        found: dict[str, Any] = trial.ask("storage", "status", "vms")["sample"] or {}
        return found

    # With the rights that its user was given when the cluster was made, also of its manager.
    found = until(lambda: (s := sample()) and s["client"] and s["total"] and s, "a sample with all figures")
    assert (found["status"], found["figures"], found["refusals"]) == ("ok", "", [])
    assert (found["osds_up"], found["quorum"], found["pgs_inactive"]) == (3, ["node1", "node2", "node3"], 0)
    assert found["commit_latency"] is not None
    assert "3/3" in trial.atoll("storage", "status").stdout
    trial.atoll("pool", "remove", "vms", "--force")


def test_a_second_time_changes_nothing(trial: Trial) -> None:
    before = {node.name: trial.daemons(node.name) for node in trial.lab.nodes}
    assert "unchanged: yes" in trial.atoll("storage", "init", "-s", "ceph", "default").stdout
    assert {node.name: trial.daemons(node.name) for node in trial.lab.nodes} == before
    refused = trial.atoll("cluster", "modify", "-S", "ceph:size=2", check=False)
    assert refused.returncode == 6
    assert "is initialised" in refused.stderr


def test_a_node_goes_offline_with_its_daemons_and_comes_back(trial: Trial, writer: Writer) -> None:
    before = sorted(trial.daemons("node3"))
    with writer.during("node offline"):
        trial.atoll("node", "modify", "node3", "--offline", "yes")
    assert trial.daemons("node3") == {}
    assert trial.row("node3")["storage"] == "stopped"
    status = trial.ask("storage", "status", "ceph")
    assert status["quorum"] == ["node1", "node2"]
    assert any(word.startswith("OSD_FLAGS") for word in status["checks"]), "noout for the host"
    # Guests go on; without a second node they could not.
    trial.node("node1").exec(["rbd", *CLIENT, "import", "/tmp/data", "rbd/two"], check=True, timeout=60)
    refused = trial.atoll("node", "modify", "node2", "--offline", "yes", check=False)
    assert refused.returncode == 6, refused.stderr
    assert "--io-may-stop" in refused.stderr
    assert len(trial.daemons("node2")) == 3
    # It stays off over a restart of its agent.
    here = trial.node("node3")
    here.stop_service("agent")
    here.start_service("agent")
    trial.wait_nodes()
    until(lambda: trial.row("node3")["alive"], "the agent of node3 reports")
    assert trial.daemons("node3") == {}
    with writer.during("node back"):
        trial.atoll("node", "modify", "node3", "--offline", "no")
    assert sorted(trial.daemons("node3")) == before
    until(trial.healthy, "Ceph is well")


def test_a_fourth_node_joins_by_itself(trial: Trial, writer: Writer) -> None:
    refused = trial.atoll("group", "assign-nodes", "default", "node4", check=False)
    assert "only a node that is offline" in refused.stderr
    trial.atoll("node", "modify", "node4", "--offline", "yes")
    trial.atoll("group", "assign-nodes", "default", "node4")
    assert trial.daemons("node4") == {}, "nothing is configured yet"
    with writer.during("node added"):
        trial.node("node1").exec([*ATOLL, "node", "add", "node4", "--readd"], check=True)
        until(lambda: trial.row("node4")["storage"] == "joined", "node4 has joined", 150)
        until(lambda: trial.ask("storage", "status", "ceph")["osds_up"] == 4 and trial.healthy(), "Ceph is well with four OSDs", 150)
    assert trial.row("node4")["storage_roles"] == ["osd"], "three monitors are enough"
    assert list(trial.daemons("node4")) == ["osd.3"]
    assert not trial.has("node4", "/etc/ceph/ceph.client.admin.keyring")
    osd = next(row for row in trial.ask("storage", "status", "ceph")["osds"] if row["osd"] == "osd.3")
    assert osd["host"] == "node4"
    assert trial.ask("storage", "status", "ceph")["osds_in"] == 4, "it was let in"


def test_a_disk_is_added_later_and_removed_again(trial: Trial, writer: Writer) -> None:
    plan = trial.atoll("storage", "add-disks", "node4", MORE, "--dry-run").stdout
    assert f"node4: OSD on {MORE} comes: its disk is erased" in plan
    with writer.during("disk added"):
        trial.atoll("storage", "add-disks", "node4", MORE)
    assert sorted(trial.daemons("node4")) == ["osd.3", "osd.4"]
    assert "unchanged: yes" in trial.atoll("storage", "add-disks", "node4", MORE).stdout
    assert trial.ask("storage", "status", "ceph")["osds_in"] == 5
    with writer.during("disk removed"):
        trial.atoll("storage", "remove-disks", "node4", MORE)
    assert sorted(trial.daemons("node4")) == ["osd.3"]
    assert trial.node("node4").exec(["blkid", "-p", MORE]).returncode == 2, "the disk is empty again"
    refused = trial.atoll("storage", "remove-disks", "node4", DISK, check=False)
    assert "--drain" in refused.stderr


def test_daemons_that_are_killed_stop_nobody(trial: Trial, writer: Writer) -> None:
    killed_and_back(trial, writer, "OSD killed", "node2", "osd.")
    killed_and_back(trial, writer, "monitor killed", "node2", "mon.")
    killed_and_back(trial, writer, "leader killed", "node1", "mon.")


def test_a_node_is_drained_and_a_part_that_is_needed_is_not(trial: Trial, writer: Writer) -> None:
    refused = trial.atoll("node", "remove", "node4", "--force", check=False)
    assert refused.returncode == 6, refused.stderr
    assert "atoll node modify node4 --drain" in refused.stderr
    plan = trial.atoll("node", "modify", "node4", "--drain", "--dry-run").stdout
    assert "one node may fail, whichever" in plan, plan
    # The agent dies while it takes its OSD away, and the master before it is said that it has gone.
    faults = [
        trial.arm("node4", "agent", "agent:ceph.unosd:after"),
        trial.arm("node1", "agent", "agent:ceph.emptied:before"),
        trial.arm("node1", "master", "master:node.leave-storage:06:after-effect"),
    ]
    with writer.during("node drained"):
        trial.atoll("node", "modify", "node4", "--drain")
    assert not [path.name for path in faults if path.exists()], "all have died"
    assert trial.daemons("node4") == {}
    assert trial.row("node4")["storage"] == ""
    assert not trial.has("node4", "/etc/ceph/ceph.conf")
    assert trial.has("node4", "/etc/atoll/ceph/ceph.conf"), "it is a client still"
    assert trial.node("node4").exec(["blkid", "-p", DISK]).returncode == 2, "its disk is empty"
    assert {row["host"] for row in trial.ask("storage", "status", "ceph")["osds"]} == {"node1", "node2", "node3"}
    refused = trial.atoll("node", "modify", "node3", "--drain", check=False)
    assert refused.returncode == 6, refused.stderr
    assert "3 copies need 3 nodes with OSDs, and 2 would be left" in refused.stderr
    assert "unchanged: yes" in trial.atoll("node", "modify", "node4", "--drain").stdout


def test_daemons_outlive_the_agent_and_come_back_after_a_power_cut(trial: Trial, writer: Writer) -> None:
    before = trial.daemons("node3")
    assert sorted(name.split(".")[0] for name in before) == ["mon", "osd"]
    here = trial.node("node3")
    os.kill(next(s.pid for s in here.services() if s.name == "agent") and _outer(trial, "node3"), signal.SIGKILL)
    until(lambda: any(s.restarts for s in here.services() if s.name == "agent"), "the agent was started again")
    assert trial.daemons("node3") == before
    with writer.during("power cut"):
        here.kill()
        here.boot()
        until(lambda: sorted(trial.daemons("node3")) == sorted(before), "its daemons are back")
        until(lambda: trial.ask("storage", "status", "ceph")["osds_up"] == 3 and trial.healthy(), "Ceph is well")
    trial.node("node1").exec(["rbd", *CLIENT, "export", "rbd/one", "/tmp/again"], check=True, timeout=60)
    trial.node("node1").exec(["cmp", "/tmp/data", "/tmp/again"], check=True)


def _outer(trial: Trial, node: str) -> int:
    """The agent's pid as this machine sees it."""
    within = os.readlink(f"/proc/{trial.node(node).pid}/ns/pid")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_text()
            if "atoll.agent.daemon" in argv and os.readlink(f"/proc/{entry}/ns/pid") == within:
                return int(entry)
        except OSError:
            continue
    raise AssertionError("no agent there")


def test_another_node_takes_the_place_of_one_that_died(trial: Trial, writer: Writer) -> None:
    refused = trial.atoll("storage", "replace-node", "node3", "node4", check=False)
    assert "node node3 answers; it is not dead" in refused.stderr
    with writer.during("node dead"):
        trial.node("node3").kill()
        until(lambda: not trial.row("node3")["alive"], "node3 is missed")
        until(lambda: trial.ask("storage", "status", "ceph")["quorum"] == ["node1", "node2"], "its monitor is missed", 150)
    plan = trial.atoll("storage", "replace-node", "node3", "node4", "--dry-run").stdout
    for words in ("monitor of node3 goes", "monitor of node4 comes", f"node3: OSD on {DISK} goes", f"node4: OSD on {DISK} comes"):
        assert words in plan, plan
    with writer.during("node replaced"):
        trial.atoll("storage", "replace-node", "node3", "node4")
    until(trial.healthy, "Ceph is well, and misses nothing", 150)
    status = trial.ask("storage", "status", "ceph")
    assert (status["quorum"], status["monitors"], status["osds_up"]) == (["node1", "node2", "node4"], 3, 3)
    assert {row["host"] for row in status["osds"]} == {"node1", "node2", "node4"}
    assert (trial.row("node3")["storage"], trial.row("node4")["storage_roles"]) == ("", ["mon", "osd"])
    assert "unchanged: yes" in trial.atoll("storage", "replace-node", "node3", "node4").stdout
    trial.atoll("node", "remove", "node3", "--force")


def test_no_record_was_lost_and_nobody_waited_for_long(trial: Trial, writer: Writer) -> None:
    writer.end()
    assert max(writer.pauses.values()) <= 2 * 22.2, writer.pauses


def test_nothing_stays_after_the_lab(trial: Trial) -> None:
    pids = [pid for node in trial.lab.nodes if node.running for pid in trial.daemons(node.name).values()]
    assert len(pids) == 8
    trial.lab.down()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    loops = subprocess.run(["losetup", "-l", "-n", "-O", "BACK-FILE"], capture_output=True, text=True, check=True).stdout
    assert trial.lab.name not in loops
