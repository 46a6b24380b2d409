"""Every step of the main operations, once with a real SIGKILL of the master and once of the agent. The cases come from the journals
of jobs that ran undisturbed; after each case nothing is left over, nothing is lost, and the same key gives the same job."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kill_support import KillLab, points

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("kill")]
MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[KillLab]:
    lab = KillLab("kill-steps")
    yield lab
    lab.close()


class Story:
    """One operation: how to bring the cluster to its beginning, and the request."""

    def __init__(self, cluster: KillLab, name: str) -> None:
        self.cluster, self.name = cluster, name

    def instance(self) -> dict[str, Any] | None:
        return next((row for row in self.cluster.items("instances") if row["name"] == "web"), None)

    def add(self) -> None:
        if self.instance() is None:
            self.cluster.do("POST", "/v1/instances", **self._body())
        row = self.instance()
        assert row is not None
        if row["state"] != "running":
            self.cluster.settled()
            row = self.instance()
            assert row is not None
            if row["state"] == "stopped":
                self.cluster.do("POST", "/v1/instances/web/start")

    def _body(self) -> dict[str, Any]:
        disks = [{"size": 16 * MIB}]
        return {"name": "web", "template": "shared", "disks": disks, "memory": 16 * MIB, "append": "ctr=vda", "node": "node2"}

    def begin(self) -> None:
        """The state from which the operation starts."""
        if self.name == "instance.add":
            if self.instance() is not None:
                self.cluster.do("DELETE", "/v1/instances/web", timeout=0)
        else:
            self.add()
        self.cluster.settled()

    def request(self, key: str = "") -> int:
        """Submit it; the job's number."""
        row = self.instance()
        other = "node3" if row and row["node"] == "node2" else "node2"
        if self.name == "instance.add":
            return self.cluster.submit("POST", "/v1/instances", key, **self._body())
        if self.name == "instance.remove":
            return self.cluster.submit("DELETE", "/v1/instances/web", key, timeout=0)
        if self.name == "instance.grow-disk":
            return self.cluster.submit("POST", "/v1/instances/web/grow-disk", key, index=0, increment=MIB)
        verb = self.name.split(".")[1]
        more = {"timeout": 0} if verb == "failover" else {}
        return self.cluster.submit("POST", f"/v1/instances/web/{verb}", key, node=other, **more)


@pytest.mark.parametrize("operation", ["instance.add", "instance.grow-disk", "instance.migrate", "instance.failover", "instance.remove"])
def test_kill_at_every_step(cluster: KillLab, operation: str) -> None:
    story = Story(cluster, operation)
    story.begin()
    undisturbed = cluster.end_of(story.request())
    assert undisturbed["state"] == "done", undisturbed
    cases = points(cluster, undisturbed)
    assert cases, "the journal tells no steps"
    for node, service, point in cases:
        story.begin()
        row = story.instance()
        # Methods repeat with the node of the case: an agent's point is armed on every node, only the right one reaches it.
        nodes = [node] if service == "master" else [n.name for n in cluster.lab.nodes]
        armed = [cluster.arm(n, service, point) for n in nodes]
        key = str(uuid.uuid4())
        job = story.request(key)
        end = cluster.end_of(job)
        fired = [path for path in armed if not path.exists()]
        for path in armed:
            path.unlink(missing_ok=True)
        assert fired, f"{point} was not reached: {end['state']}"
        print(f"{point}: {end['state']}")
        assert end["state"] in ("done", "undone"), f"killed at {point}: {end}"
        cluster.wait_alive()
        cluster.settled()
        assert _again(story, row, key) == job, f"killed at {point}: the same key gave another job"
        now = story.instance()
        if now is not None:
            before = cluster.acknowledged(now["id"])
            if now["state"] == "running":
                _writes_on(cluster, now["id"], before)
            cluster.nothing_lost(now["id"], cluster.get("/v1/instances/web")["disks"][0]["volume"])


def _again(story: Story, row: dict[str, Any] | None, key: str) -> int:
    """The same request once more, with the same key."""
    cluster = story.cluster
    if story.name == "instance.remove":
        return cluster.submit("DELETE", "/v1/instances/web", key, timeout=0)
    if story.name == "instance.add":
        return cluster.submit("POST", "/v1/instances", key, **story._body())
    if story.name == "instance.grow-disk":
        return cluster.submit("POST", "/v1/instances/web/grow-disk", key, index=0, increment=MIB)
    assert row is not None
    other = "node3" if row["node"] == "node2" else "node2"
    verb = story.name.split(".")[1]
    more = {"timeout": 0} if verb == "failover" else {}
    return cluster.submit("POST", f"/v1/instances/web/{verb}", key, node=other, **more)


def _writes_on(cluster: KillLab, instance: str, beyond: int) -> None:
    end = time.monotonic() + 20
    while cluster.acknowledged(instance) <= beyond:
        assert time.monotonic() < end, f"the guest writes nothing beyond record {beyond}"
        time.sleep(0.02)
