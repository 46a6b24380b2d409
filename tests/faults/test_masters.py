"""Two masters on one store, stopped daemons, and what guests notice of it: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_support import KillLab

from atoll.runtime.config import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("masters")]
MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[KillLab]:
    lab = KillLab("masters")
    body = {"name": "web", "template": "shared", "disks": [{"size": 16 * MIB}], "memory": 16 * MIB, "append": "ctr=vda"}
    try:
        lab.do("POST", "/v1/instances", node="node2", **body)
        yield lab
    finally:
        lab.close()


def acknowledged_more(cluster: KillLab, instance: str, seconds: float = 20.0) -> None:
    before, end = cluster.acknowledged(instance), time.monotonic() + seconds
    while cluster.acknowledged(instance) <= before + 20:
        assert time.monotonic() < end, "the guest does not write"
        time.sleep(0.02)


def test_a_second_master_on_the_same_store_is_refused(cluster: KillLab) -> None:
    node = cluster.lab.node("node1")
    done = subprocess.run(
        [sys.executable, "-m", "atoll.master.daemon", "--config", node.config_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 9, done
    assert str(node.service_pid("master")) in done.stderr
    assert "stop the other master first" in done.stderr
    assert cluster.get("/v1/cluster")["name"]


def test_the_same_key_gives_the_same_job_and_another_request_with_it_is_refused(cluster: KillLab) -> None:
    key = str(uuid.uuid4())
    first = cluster.submit("POST", "/v1/volumes", key, name="once", pool="shared", size=MIB)
    assert cluster.end_of(first)["state"] == "done"
    assert cluster.submit("POST", "/v1/volumes", key, name="once", pool="shared", size=MIB) == first
    status, problem = cluster.request("POST", "/v1/volumes", {"name": "twice", "pool": "shared", "size": MIB}, key)
    assert (status, problem["code"]) == (409, "idempotency_key_reused")
    assert [v["name"] for v in cluster.items("volumes") if v["name"] in ("once", "twice")] == ["once"]


@pytest.mark.parametrize(("node", "service"), [("node2", "agent"), ("node1", "master")])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_daemons_may_die_or_hang_and_the_guest_goes_on(cluster: KillLab, node: str, service: str, number: signal.Signals) -> None:
    row = next(r for r in cluster.items("instances") if r["name"] == "web")
    guest = cluster.guests(row["id"])
    pid = cluster.lab.node(node).service_pid(service)
    os.kill(pid, number)
    try:
        acknowledged_more(cluster, row["id"])
        assert cluster.guests(row["id"]) == guest
    finally:
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    cluster.wait_alive()
    cluster.settled()
    acknowledged_more(cluster, row["id"])
    cluster.nothing_lost(row["id"], cluster.get("/v1/instances/web")["disks"][0]["volume"])


def test_a_log_that_was_cut_off_is_refused_and_what_is_left_can_be_restored(cluster: KillLab) -> None:
    """As docs/howto/restore-the-master.md says it."""
    node = cluster.lab.node("node1")
    web = cluster.get("/v1/instances/web")
    guest = cluster.guests(web["id"])
    assert cluster.end_of(cluster.submit("POST", "/v1/volumes", str(uuid.uuid4()), name="last", pool="shared", size=MIB))["state"] == "done"
    store = load(Path(node.config_path)).store_dir
    pid = node.service_pid("master")
    assert pid
    # It has no time to fold the log into the database.
    os.kill(pid, signal.SIGSTOP)
    os.truncate(store / "atoll.db-wal", 0)
    os.kill(pid, signal.SIGKILL)
    node.stop_service("master")
    environment = {**os.environ, "ATOLL_CONFIG": node.config_path}
    command = [sys.executable, "-m", "atoll.master.daemon", "--config", node.config_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done
    assert "lacks changes that were acknowledged" in done.stderr
    assert "docs/howto/restore-the-master.md" in done.stderr
    restore = [sys.executable, "-m", "atoll.cli.main", "cluster", "restore", str(store / "atoll.db"), "-f"]
    done = subprocess.run(restore, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done
    node.start_service("master")
    cluster.wait_alive()
    acknowledged_more(cluster, web["id"])
    assert cluster.guests(web["id"]) == guest
    cluster.nothing_lost(web["id"], web["disks"][0]["volume"])
