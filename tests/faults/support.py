"""A real cluster for tests: nodes in namespaces, real daemons, real guests under QEMU; ways to break it, and what must always hold."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sight import Acks, Sight

from atoll.lab.bringup import ATOLL, make_cluster
from atoll.lab.guest.build import append, build
from atoll.lab.guest.ring import check_ring
from atoll.lab.lab import Lab
from atoll.lab.nodes import Node

CACHE = Path(os.environ.get("ATOLL_TEST_CACHE", "/var/cache/atoll"))
MIB = 1 << 20
#: Seconds for what takes one to ten on an idle machine.
PATIENCE = 90.0


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Poll what nothing tells us of; what the condition gave when it was true."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


class Held:
    """A daemon that waits (or will wait) at a fault point."""

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, path.with_name(path.name + ".held")

    def reached(self, seconds: float = PATIENCE) -> None:
        """Until it waits there."""
        until(self._held.exists, f"{self._path.name} holds", seconds)

    def release(self) -> None:
        """Let it go on; it need not have come there."""
        self._path.unlink(missing_ok=True)
        self._held.unlink(missing_ok=True)


class Cluster:
    """Nodes with daemons that have fault files; a shared pool ``shared``. The master's node takes no guests unless ``all_vm``."""

    def __init__(self, name: str, nodes: int = 3, *, bandwidth: int = 0, all_vm: bool = False, binds: Sequence[str] = ()) -> None:
        self.image = build(CACHE)
        self.lab = Lab.create(name, nodes, binds=[str(CACHE), *binds])
        try:
            make_cluster(self.lab, "qemu")
            with ThreadPoolExecutor(len(self.lab.nodes)) as pool:
                list(pool.map(lambda node: self._prepare(node, bandwidth), self.lab.nodes))
            self.wait_alive()
            self.acks = Acks(self.lab)
            self.sight = Sight(self.lab)
            if not all_vm:
                self.do("POST", "/v1/nodes/node1/modify", roles=["master-candidate", "storage-controller"])
            self.do("POST", "/v1/pools", name="shared", driver="sharedfile", options={"path": self.lab.shared})
        except BaseException:
            self.lab.down()
            raise

    def _prepare(self, node: Node, bandwidth: int) -> None:
        if bandwidth:
            path = node.root / node.config_path.lstrip("/")
            path.write_text(path.read_text() + f"migration_bandwidth = {bandwidth}\n")
        for service in node.services():
            node.set_service(service.name, service.argv, {"ATOLL_FAULT_FILE": f"/run/atoll/fault-{service.name}"})
            node.stop_service(service.name)
            node.start_service(service.name)

    def close(self) -> None:
        self.acks.close()
        self.sight.close()
        if not os.environ.get("ATOLL_TEST_KEEP"):
            self.lab.down()

    def node(self, name: str) -> Node:
        return self.lab.node(name)

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

    def row(self, noun: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/v1/{noun}/{name}")
        return found

    def submit(self, method: str, path: str, /, **body: Any) -> int:
        """The job's number."""
        status, data = self.request(method, path, body, str(uuid.uuid4()))
        assert status == 202, data
        return int(data["job"])

    def refused(self, method: str, path: str, /, **body: Any) -> str:
        """The code of the error with which the request, or else its job, is refused."""
        status, data = self.request(method, path, body, str(uuid.uuid4()))
        if status == 202:
            ended = self.end_of(int(data["job"]))
            assert ended["state"] == "undone", ended
            return str(ended["error"]["code"])
        return str(data["code"])

    def end_of(self, job: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """The job when it has ended or needs attention."""
        end = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.get(f"/v1/jobs/{job}?wait=5")
            if found["state"] in ("done", "undone", "needs-attention"):
                return found
            assert time.monotonic() < end, f"job {job} has not ended: {found}"

    def do(self, method: str, path: str, /, **body: Any) -> dict[str, Any]:
        """Until it is done."""
        found = self.end_of(self.submit(method, path, **body))
        assert found["state"] == "done", found
        return found

    def type(self, command: str) -> str:
        """Run a command of the command line, as printed in a hint; what it said."""
        words = shlex.split(command)
        assert words[0] == "atoll", command
        environment = {**os.environ, "ATOLL_SOCKET": str(self.node("node1").run_dir / "api.sock")}
        done = subprocess.run([*ATOLL, *words[1:]], capture_output=True, text=True, timeout=PATIENCE, env=environment)
        return done.stdout + done.stderr

    def findings(self, about: str = "") -> list[dict[str, Any]]:
        return [f for f in self.get("/v1/cluster/verify")["findings"] if about in f["about"]]

    # --- faults ---

    def arm(self, node: str, service: str, point: str) -> Path:
        """Let a daemon die at a fault point."""
        path = self.node(node).run_dir / f"fault-{service}"
        path.write_text(point)
        return path

    def hold(self, node: str, service: str, point: str) -> Held:
        """Let a daemon wait at a fault point."""
        return Held(self.arm(node, service, f"hold {point}"))

    def qemu(self, node: str, instance: str) -> int:
        """The guest's process on that node; 0 = none."""
        return next(iter(self._processes(node, "qemu-system-x86_64", instance)), 0)

    def watchdog(self, node: str, instance: str) -> int:
        """The process that watches the guest's migration away from that node; 0 = none."""
        return next(iter(self._processes(node, "python", f"{instance}/watchdog")), 0)

    def _processes(self, node: str, program: str, word: str) -> Iterable[int]:
        here = self.node(node)
        if not here.running:
            return
        within = os.readlink(f"/proc/{here.pid}/ns/pid")
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid") == within:
                    argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
                    if program in argv[0] and any(word in argument for argument in argv[1:]):
                        yield int(entry)
            except OSError:
                continue

    def kill_qemu(self, node: str, instance: str) -> None:
        pid = self.qemu(node, instance)
        assert pid, f"no guest {instance} on {node}"
        os.kill(pid, signal.SIGKILL)
        until(lambda: not self.qemu(node, instance), "the guest's process is gone")

    # --- waiting ---

    def wait_alive(self, *names: str) -> None:
        """Until these nodes (all by default) answer, and no proof of death stands."""

        def alive() -> bool:
            return all(r["alive"] and r["state"] in ("ok", "drained") for r in self.items("nodes") if not names or r["name"] in names)

        until(alive, "all nodes are alive")

    def wait_silent(self, name: str) -> None:
        until(lambda: not self.row("nodes", name)["alive"], f"{name} counts as silent")

    def wait_state(self, instance: str, *states: str) -> dict[str, Any]:
        found: dict[str, Any] = until(
            lambda: (row := self.row("instances", instance))["state"] in states and row, f"{instance} is {' or '.join(states)}"
        )
        return found

    # --- guests ---

    def add(self, name: str, node: str, *, disks: int = 1, pool: str = "shared", memory: int = 128 * MIB, **more: Any) -> str:
        """Make a guest that writes; its id. Returns when the writer has begun."""
        body: dict[str, Any] = {
            "name": name,
            "template": pool,
            "disks": [{"size": 16 * MIB} for _ in range(disks)],
            "memory": memory,
            "node": node,
            "kernel": str(self.image.kernel),
            "initrd": str(self.image.initrd),
            "append": append(ctr="vda", ctrdelay=10000),
        }
        made = self.do("POST", "/v1/instances", **{**body, **more})
        instance: str = made["result"]["instance"]
        if more.get("start", True):
            self.acks.beyond(instance, 0)
        return instance

    def writer(self, delay: int) -> str:
        """The kernel command line of a guest that writes with pauses of so many microseconds."""
        return append(ctr="vda", ctrdelay=delay)

    def states(self, instance: str) -> dict[str, str]:
        """What the agents that answer say of the guest."""
        found = {}
        for node in self.lab.nodes:
            for guest in self.sight.ask(node.name) or []:
                if guest["instance"] == instance:
                    found[node.name] = guest["state"]
        return found

    def migrating(self, node: str, instance: str) -> str:
        """How far its migration away from the node is, as QEMU calls it."""
        return next((str(g["migration"]) for g in self.sight.ask(node) or [] if g["instance"] == instance), "")

    def image_of(self, instance: str, index: int = 0) -> Path:
        """The image of a disk, as this machine sees it."""
        disk = self.row("instances", instance)["disks"][index]
        volume = self.row("volumes", disk["volume"])
        holder = volume["node"] or "node1"
        path = self.row("pools", disk["pool"])["options"]["path"]
        return self.node(holder).root / path.lstrip("/") / volume["logical_id"]

    def ring(self, instance: str, image: Path | None = None) -> None:
        """Everything that was acknowledged is on the disk. It may run meanwhile."""
        last = self.acks.last(instance)
        report = check_ring(image or self.image_of(instance), last)
        assert report.ok, (report, last)

    def one_writer(self, instance: str) -> None:
        """No record was acknowledged twice, and no two copies ran at a time."""
        twice = [record for record in self.acks.twice if record[0] == instance]
        assert not twice, twice
        assert not self.sight.both(instance), self.sight.both(instance)

    def settled(self, instance: str, *, on: str = "", writes: bool = True) -> str:
        """Wait until everything is as it shall be, and check it: no job under way, the claim names the one node where the guest runs,
        no other process of it exists, it goes on writing, and nothing that it acknowledged is lost. Gives the node."""
        holder: str = ""

        def calm() -> bool:
            nonlocal holder
            row = self.row("instances", instance)
            holder = row["claim"]["holder"] or ""
            processes = [node.name for node in self.lab.nodes if self.qemu(node.name, instance)]
            busy = [job for job in self.items("jobs") if job["state"] not in ("done", "undone")]
            self.said = (row["state"], row["reason"], row["claim"], processes, [(j["id"], j["state"], j["summary"]) for j in busy])
            return row["state"] == "running" and processes == [holder] and not row["claim"]["migration"] and not busy

        try:
            until(calm, f"{instance} is calm")
        except AssertionError:
            raise AssertionError(f"{instance} is not calm: {self.said}") from None
        if on:
            assert holder == on, f"it runs on {holder}, not on {on}"
        if writes:
            self.acks.beyond(instance, self.acks.last(instance) + 3)
        self.ring(instance)
        self.one_writer(instance)
        return holder
