"""Whatever is asked of any address of a real master, it answers with a result or a problem that explains itself, never with a bug.

Requests are made by schemathesis from the OpenAPI document: right ones and wrong ones, many with the names of what is there.
``make test`` asks a sample, ``make faults`` far more.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from real_master import Served, real_master

LONG = bool(os.environ.get("ATOLL_FAULT_STEPS"))
#: Requests to each address: right ones, and wrong ones.
COUNT = {"positive": 60, "negative": 30} if LONG else {"positive": 4, "negative": 2}
#: Fields of bodies that name something.
NAMES = {
    "node": "nodes",
    "secondary": "nodes",
    "nodes": "nodes",
    "only": "nodes",
    "node_is_dead": "nodes",
    "group": "groups",
    "groups": "groups",
    "pool": "pools",
    "template": "pools",
    "volume": "volumes",
    "instance": "instances",
    "instances": "instances",
}
GIB = 1 << 30
MIB = 1 << 20
#: Values of fields that are seldom found by chance; none: a new name.
GOOD: dict[str, list[Any]] = {
    "name": [],
    "new_name": [],
    "disk": [0, 1, {"size": GIB}],
    "increment": [GIB],
    "size": [GIB, 2 * GIB, 3 * GIB],
    "memory": [128 * MIB, GIB],
    "driver": ["file", "sharedfile"],
    "options": [{"path": "/box/more", "mount": "none"}],
    "slot": [0, 1],
    "index": [0, 1],
    "image": [None],
}


#: Requests that are right in the cluster as it is restored: target and body. Each is asked as it is, and then again and again with some of
#: its fields as schemathesis made them up.
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "POST /v1/instances": ("", {"name": "web5", "template": "shared", "disks": [{"size": GIB}], "memory": 128 * MIB}),
    "POST /v1/instances/{target}/start": ("web3", {}),
    "POST /v1/instances/{target}/stop": ("web1", {"timeout": 1}),
    "POST /v1/instances/{target}/reboot": ("web1", {"type": "hard"}),
    "POST /v1/instances/{target}/modify": ("web3", {"vcpus": 2}),
    "POST /v1/instances/{target}/activate-disks": ("web3", {}),
    "POST /v1/volumes": ("", {"name": "data4", "pool": "shared", "size": GIB}),
    "DELETE /v1/volumes/{target}": ("data1", {}),
    "DELETE /v1/snapshots/{target}": ("then", {}),
    "DELETE /v1/instances/{target}": ("web3", {"timeout": 1}),
    "POST /v1/instances/{target}/add-disk": ("web1", {"disk": {"size": GIB}, "template": "shared"}),
    "POST /v1/instances/{target}/attach-disk": ("web1", {"volume": "data1"}),
    "POST /v1/instances/{target}/detach-disk": ("web3", {"index": 1}),
    "POST /v1/instances/{target}/remove-disk": ("web3", {"index": 1}),
    "POST /v1/instances/{target}/grow-disk": ("web3", {"index": 0, "increment": GIB}),
    "POST /v1/instances/{target}/rename": ("web3", {"new_name": "web4"}),
    "POST /v1/instances/{target}/recreate": ("web3", {"disks": [0]}),
    "POST /v1/instances/{target}/migrate": ("web1", {}),
    "POST /v1/instances/{target}/failover": ("web1", {}),
    "POST /v1/instances/{target}/move": ("web2", {"node": "{elsewhere}"}),
    "POST /v1/snapshots": ("", {"volume": "data3"}),
    "POST /v1/volumes/{target}/grow": ("data1", {"increment": GIB}),
    "GET /v1/pools/{target}/images": ("ceph", {}),
    "POST /v1/volumes/{target}/flatten": ("data3", {}),
    "POST /v1/volumes/{target}/rename": ("data1", {"new_name": "data2"}),
    "GET /v1/groups/{target}/storage-plan?type=ceph": ("spare", {}),
    "POST /v1/groups/{target}/rename": ("spare", {"new_name": "other"}),
}


#: What can be done only in a state that is seldom there by chance: files on the nodes, jobs that need attention, dead nodes, empty ones.
SELDOM = {
    "POST /v1/instances/import",
    "POST /v1/instances/{target}/export",
    "POST /v1/instances/{target}/reinstall",
    "GET /v1/nodes/{target}/logs",
    "POST /v1/jobs/{target}/cancel",
    "POST /v1/jobs/{target}/resume",
    "POST /v1/jobs/{target}/undo",
    "POST /v1/nodes/{target}/declare-dead",
    "DELETE /v1/nodes/{target}",
    "GET /v1/storages/{target}",
    "GET /v1/storages/{target}/status",
    "POST /v1/storages/{target}/init",
    "POST /v1/nodes/{target}/join-storage",
    "POST /v1/nodes/{target}/leave-storage",
    "POST /v1/nodes/{target}/add-storage-disks",
    "POST /v1/nodes/{target}/remove-storage-disks",
    "POST /v1/nodes/{target}/replace-storage",
}


class Fuzz:
    """Asks, and keeps what was wrong."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served, self._random = served, random.Random(seed)
        self.known: dict[str, list[str]] = {}
        self.wrong: list[str] = []
        self.statuses: dict[str, Counter[int]] = {}
        self.asked = 0
        #: Jobs that take long.
        self.slow: set[int] = set()

    def restore(self) -> None:
        """Some things to ask for, whatever the requests before have done to the cluster."""
        ask = self.served.json
        for name, driver in (("shared", "sharedfile"), ("local", "file")):
            ask("POST", "/v1/pools", {"name": name, "driver": driver, "options": {"path": f"/box/{name}", "mount": "none"}})
        ask("POST", "/v1/pools", {"name": "ceph", "driver": "rbd", "options": {"pool": "box"}})
        self._wait()
        for node in ask("GET", "/v1/nodes")["items"]:
            if node["offline"] or node["drained"]:
                ask("POST", f"/v1/nodes/{node['name']}/modify", {"offline": False, "drained": False})
        group = ask("GET", "/v1/nodes/node1")["group"]
        ask("POST", f"/v1/groups/{group}/assign-nodes", {"nodes": ["node1", "node2", "node3"]})
        for name in ("shared", "local", "ceph"):
            ask("POST", f"/v1/pools/{name}/connect", {"group": group})
            ask("POST", f"/v1/pools/{name}/modify", {"state": "ready"})
        self._wait()
        for name, template, disks in (("web1", "shared", 1), ("web2", "local", 1), ("web3", "shared", 2)):
            ask("POST", "/v1/instances", {"name": name, "template": template, "disks": [{"size": GIB}] * disks, "memory": 128 * MIB})
        self._wait()
        ask("POST", "/v1/instances/web1/start", {})
        # Much can be done with those that stand still only.
        ask("POST", "/v1/instances/web3/stop", {"timeout": 1})
        ask("POST", "/v1/volumes", {"name": "data1", "pool": "shared", "size": GIB})
        ask("POST", "/v1/volumes", {"name": "data3", "pool": "ceph", "size": GIB})
        self._wait()
        ask("POST", "/v1/snapshots", {"name": "then", "volume": "data3"})
        ask("POST", "/v1/groups", {"name": "spare"})
        ask("POST", "/v1/tokens", {"name": "ray", "role": "reader"})
        self._wait()
        self.look()

    def _wait(self, seconds: float = 5.0) -> None:
        """Until no job is at work, but for those that did not end when waited for: they may take minutes, as they were asked to."""
        ends = time.monotonic() + seconds
        for job in self.served.json("GET", "/v1/jobs")["items"]:
            while job.get("state") in ("queued", "running", "undoing") and job["id"] not in self.slow:
                if time.monotonic() > ends:
                    self.slow.add(job["id"])
                    break
                job = self.served.json("GET", f"/v1/jobs/{job['id']}?wait=5")

    def look(self) -> None:
        """What there is now."""
        for noun in ("nodes", "groups", "pools", "volumes", "instances", "jobs", "snapshots"):
            rows = self.served.json("GET", f"/v1/{noun}")["items"]
            self.known[noun] = [str(row[key]) for row in rows for key in ("name", "id") if row.get(key)][-40:]
        self.known["tokens"] = ["ray"]

    def right(self, label: str) -> tuple[str, dict[str, Any]]:
        """What RIGHT says, with the place filled in that depends on where an instance is."""
        target, body = RIGHT[label]
        if "{elsewhere}" in body.values():
            here = self.served.json("GET", f"/v1/instances/{target}").get("node")
            body = body | {"node": next(name for name in ("node1", "node2") if name != here)}
        return target, dict(body)

    def ask_right(self, label: str) -> None:
        """One that is right as it stands, in a cluster without what requests before it have made of it."""
        for right in (right for right in RIGHT if right.partition("?")[0] == label):
            for name in ("web1", "web2", "web3"):
                self.served.json("POST", f"/v1/instances/{name}/deactivate-disks", {})
            self._wait(20.0)
            for name in ("web1", "web2", "web3"):
                self.served.json("DELETE", f"/v1/instances/{name}", {"timeout": 1})
            self._wait(20.0)
            for row in self.served.json("GET", "/v1/volumes")["items"]:
                self.served.json("DELETE", f"/v1/volumes/{row['name']}")
            self._wait(20.0)
            self.restore()
            target, body = self.right(right)
            method, path = right.split(" ")
            path = path.replace("{target}", target)
            status, kind, answer = self.served.ask(method, path, body)
            self.note(label, f"{method} {path} {body}", status, kind, answer)
            if status >= 300:
                print(f"right, but refused: {method} {path} {body}: {answer.decode()}")

    def graft(self, label: str, case: Any) -> None:
        """One that is right but for some fields."""
        target, body = self.right(label)
        made = case.body if isinstance(case.body, dict) else {}
        case.body = body | {key: value for key, value in made.items() if self._random.random() < 0.35}
        if "target" in case.path_parameters:
            case.path_parameters["target"] = target

    def salt(self, body: Any, noun: str = "") -> Any:
        """Three times out of four names of what is there instead of invented ones, and names and sizes that are good."""
        if isinstance(body, dict):
            return {key: self._good(key) or self.salt(value, NAMES.get(key, "")) for key, value in body.items()}
        if isinstance(body, list):
            return [self.salt(value, noun) for value in body]
        if isinstance(body, str) and self.known.get(noun) and self._random.random() < 0.75:
            return self._random.choice(self.known[noun])
        return body

    def _good(self, key: str) -> Any:
        if key not in GOOD or self._random.random() > 0.75:
            return None
        return self._random.choice(GOOD[key]) if GOOD[key] else f"new{self._random.randrange(10_000)}"

    def one(self, case: Any) -> None:
        """Ask as the case says."""
        noun = case.path.split("/")[2].split("{")[0] if case.path.startswith("/v1/") else ""
        if "target" in case.path_parameters and self._random.random() < 0.85 and self.known.get(noun):
            case.path_parameters["target"] = self._random.choice(self.known[noun])
        case.body = self.salt(case.body)
        if f"{case.method} {case.path}" in RIGHT and self._random.random() < 0.4:
            self.graft(f"{case.method} {case.path}", case)
        if "wait" in (case.query or {}) and self._random.random() < 0.9:
            case.query["wait"] = 0.1
        case.headers.pop("Authorization", None)
        import requests

        try:
            made = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
            body = made.body.encode() if isinstance(made.body, str) else made.body
            headers = {name: str(value) for name, value in made.headers.items() if name.lower() not in ("content-length", "user-agent")}
            label = f"{case.method} {case.path}"
            told = f"{case.method} {made.path_url[:200]} {(body or b'')[:600]!r}"
            status, kind, answer = self.served.ask(case.method, made.path_url, body, headers)
        except (ValueError, requests.RequestException, UnicodeError):
            return  # it cannot be said in HTTP
        self.note(label, told, status, kind, answer)

    def note(self, label: str, told: str, status: int, kind: str, answer: bytes) -> None:
        """Look at an answer."""
        self.asked += 1
        self.statuses.setdefault(label, Counter())[status] += 1
        if status >= 500:
            self.wrong.append(f"{told} -> {status} {answer[:300]!r}")
        elif status >= 400:
            problem = json.loads(answer)
            explained = problem["detail"] and problem["code"] and problem["status"] == status
            if not kind.startswith("application/problem+json") or not explained:
                self.wrong.append(f"{told} -> no problem: {status} {kind} {answer[:300]!r}")

    def jobs(self) -> None:
        """No job may have met a bug."""
        for job in self.served.json("GET", "/v1/jobs")["items"]:
            text = json.dumps(job)
            if "unexpectedly" in text or "Traceback" in text or "agent failed in" in text:
                self.wrong.append(f"job {text[:600]}")


def fuzz(served: Served, seed: int, only: str = "") -> Fuzz:
    """Every address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import seed as seeded
        from hypothesis.errors import Unsatisfiable
    work = Fuzz(served, seed)
    schema = schemathesis.openapi.from_dict(served.json("GET", "/v1/openapi.json"))
    operations = [found.ok() for found in schema.get_all_operations()]
    # What ends a node or a pool comes last: the others need them.
    operations.sort(key=lambda one: (one.method == "delete", one.path, one.method))
    for number, operation in enumerate(operations):
        if only and only not in operation.path:
            continue
        if number % 5 == 0 or LONG:
            work.restore()
        else:
            work.look()
        work.ask_right(f"{operation.method.upper()} {operation.path}")
        for mode in schemathesis.GenerationMode:

            @seeded(seed)
            @settings(
                max_examples=COUNT[mode.value],
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                work.one(case)

            try:
                ask()
            except schemathesis.errors.SchemathesisError:
                continue  # nothing of that kind can be made for this address
            except Unsatisfiable:
                continue
    work._wait()
    work.jobs()
    return work


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_request_meets_a_bug(tmp_path: Path, record_property: Any) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if LONG else 3
    print(f"seed {seed}")
    with real_master(tmp_path) as served:
        work = fuzz(served, seed)
        everything = {f"{m.upper()} {p}" for p, ms in served.json("GET", "/v1/openapi.json")["paths"].items() for m in ms}
    record_property("clusters", work.asked)
    assert not work.wrong, "\n".join([f"{len(work.wrong)} of {work.asked}:", *work.wrong[:20]])
    assert set(work.statuses) == everything
    # Nearly every address was asked something that it could do.
    done = {label for label, found in work.statuses.items() if any(status < 300 for status in found)}
    never = sorted(everything - done - SELDOM)
    assert everything >= SELDOM
    print(f"{work.asked} requests; never done: {never}")
    assert len(never) <= (0 if LONG else len(everything) // 3), never
    assert everything >= {right.partition("?")[0] for right in RIGHT}
