"""A rootless lab whose daemons can be told where to die, and what must hold afterwards."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from atoll.lab.bringup import make_cluster
from atoll.lab.guest.ring import acks, check_ring
from atoll.lab.process import ProcessLab

PATIENCE = 60.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


class KillLab:
    """Three nodes as processes, the fake hypervisor, one shared pool; every daemon looks at its own fault file."""

    def __init__(self, name: str) -> None:
        # The number lets several runs stand side by side.
        self.lab = ProcessLab.create(f"{name}-{os.getpid()}", 3)
        try:
            self._bring_up()
        except BaseException:
            self.lab.down()
            raise

    def _bring_up(self) -> None:
        make_cluster(self.lab, "fake")
        for node in self.lab.nodes:
            for service in node.services():
                node.set_service(service.name, service.argv, {"ATOLL_FAULT_FILE": str(self.fault_file(node.name, service.name))})
                node.stop_service(service.name)
                node.start_service(service.name)
        self.wait_alive()
        self.do("POST", "/v1/pools", name="shared", driver="sharedfile", options={"path": self.lab.shared, "mount": "none"})

    def fault_file(self, node: str, service: str) -> Path:
        return Path(self.lab.directory) / f"fault-{node}-{service}"

    # --- asking ---

    def request(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """One request, repeated while the master is away; POSTs carry a key, so a repeat is the same request."""
        end = time.monotonic() + PATIENCE
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
        while True:
            connection = _Connection(self.lab.node("node1").run_dir / "api.sock")
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read() or b"null")
            except (OSError, http.client.HTTPException):
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            finally:
                connection.close()

    def get(self, path: str) -> Any:
        status, data = self.request("GET", path)
        assert status == 200, data
        return data

    def items(self, noun: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"/v1/{noun}")["items"]
        return found

    def submit(self, method: str, path: str, key: str = "", **body: Any) -> int:
        """The job's number."""
        status, data = self.request(method, path, body, key or str(uuid.uuid4()))
        assert status == 202, data
        return int(data["job"])

    def end_of(self, job: int) -> dict[str, Any]:
        """The job when it has ended or needs attention."""
        end = time.monotonic() + PATIENCE
        while True:
            found: dict[str, Any] = self.get(f"/v1/jobs/{job}?wait=5")
            if found["state"] in ("done", "undone", "needs-attention"):
                return found
            assert time.monotonic() < end, f"job {job} has not ended: {found}"

    def do(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        found = self.end_of(self.submit(method, path, **body))
        assert found["state"] == "done", found
        return found

    # --- faults ---

    def arm(self, node: str, service: str, point: str) -> Path:
        path = self.fault_file(node, service)
        path.write_text(point)
        return path

    def wait_alive(self) -> None:
        end = time.monotonic() + PATIENCE
        while not all(row["alive"] for row in self.items("nodes")):
            assert time.monotonic() < end, "not all nodes are alive"
            time.sleep(0.05)

    # --- what must hold ---

    def guests(self, instance: str) -> list[str]:
        """The nodes on which a process of the instance exists, from /proc itself."""
        found = []
        for node in self.lab.nodes:
            for pid_file in node.run_dir.glob(f"guests/{instance}/pid"):
                try:
                    pid = json.loads(pid_file.read_text().split()[0])
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                except (OSError, ValueError, IndexError):
                    continue
                if b"fakeguest" in command:
                    found.append(node.name)
        return found

    def settled(self) -> None:
        """No findings, no job under way, every instance that should run does so exactly once; waits for the reconcile loop."""
        end = time.monotonic() + PATIENCE
        while True:
            trouble = self._trouble()
            if not trouble:
                return
            assert time.monotonic() < end, trouble
            time.sleep(0.1)

    def _trouble(self) -> list[str]:
        trouble = [f"job {j['id']} is {j['state']}" for j in self.items("jobs") if j["state"] not in ("done", "undone")]
        trouble += [f"{f['what']}: {f['about']} ({f['why']})" for f in self.get("/v1/cluster/verify")["findings"]]
        for row in self.items("instances"):
            where = self.guests(row["id"])
            wanted = [row["node"]] if row["state"] == "running" else []
            if where != wanted:
                trouble.append(f"{row['name']} is {row['state']} on {row['node']}, its processes are on {where}")
        images = [p.name for p in Path(self.lab.shared).iterdir() if not p.name.startswith(".atoll-p")]
        known = {row["id"] for row in self.items("volumes")}
        trouble += [f"image {name} belongs to nobody" for name in images if not any(v in name for v in known)]
        return trouble

    def acknowledged(self, instance: str) -> int:
        """The highest record that its writer acknowledged on any node."""
        found = [0]
        for node in self.lab.nodes:
            for log in node.run_dir.glob(f"*/{instance}/console.log"):
                found += acks(log.read_text(errors="replace"))
        return max(found)

    def nothing_lost(self, instance: str, volume: str) -> None:
        last = self.acknowledged(instance)
        image = next(p for p in Path(self.lab.shared).iterdir() if volume in p.name)
        report = check_ring(image, last)
        assert report.ok, (report, last)

    def close(self) -> None:
        self.lab.down()


def points(cluster: Any, job: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(node, service, fault point) of each step of a job that ran undisturbed."""
    names = {row["id"]: row["name"] for row in cluster.items("nodes")}
    found = []
    for index, step in enumerate(job["steps"]):
        if step["what"] == "write":
            found.append(("node1", "master", f"master:{job['operation']}:{index + 1:02d}:after-write"))
        elif step["what"] == "call":
            # Before and after the effect in turn: the simulation goes through all of them.
            found.append(("node1", "master", f"master:{job['operation']}:{index + 1:02d}:after-{('intent', 'effect')[index % 2]}"))
            found.append((names.get(step["node"], step["node"]), "agent", f"agent:{step['method']}:{('after', 'before')[index % 2]}"))
    return found
