"""A leader for tests of the API and the command line: the real store, state and operations' requests, scripted jobs."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.api.events import Hub
from atoll.api.leader import Caller, Finding, JoinAnswer, Submission
from atoll.model.errors import AtollError, Forbidden, KeyReused, NotFound, TokenInvalid, Unauthenticated, WrongState
from atoll.model.messages import GuestStatus, NodeReport, Progress, Space
from atoll.model.objects import (
    Claim,
    Cluster,
    Disk,
    Group,
    Instance,
    Job,
    JobState,
    Locks,
    Nic,
    Node,
    Pool,
    Step,
    StepState,
    Stored,
    Volume,
    VolumeState,
    Writers,
)
from atoll.model.units import GIB, MIB
from atoll.operations.all import OPERATIONS
from atoll.operations.state import State
from atoll.store.cache import LeaderStore
from atoll.store.memory import MemoryStore


def ident(prefix: str, number: int) -> str:
    """An id that is easy to read."""
    return f"{prefix}-{number:017x}"


class FakeHealth:
    """What nodes report: everything is set by the test."""

    def __init__(self) -> None:
        self.reports: dict[str, NodeReport] = {}
        self.dead: set[str] = set()

    def alive(self, node: str) -> bool:
        return node in self.reports and node not in self.dead

    def report(self, node: str) -> NodeReport | None:
        return self.reports.get(node)

    def since(self, node: str) -> float | None:
        return (90.0 if node in self.dead else 0.4) if node in self.reports else None


class FixedClock:
    """Time stands still."""

    def now(self) -> float:
        return 1_800_000_000.0

    def monotonic(self) -> float:
        return 1000.0


@dataclass
class Script:
    """How jobs go: what progress they tell, and how they end."""

    progress: list[Progress] = field(default_factory=list)
    state: JobState = JobState.DONE
    error: AtollError | None = None
    reason: str = ""
    commands: tuple[str, ...] = ()
    result: Any = None
    #: Until this is set, the job runs.
    gate: asyncio.Event | None = None


class FakeLeader:
    """A Leader whose jobs follow ``script``. ``asked`` records every submission."""

    def __init__(self, store: LeaderStore) -> None:
        self.health = FakeHealth()
        self._state = State(store, self.health, FixedClock(), random.Random(1))
        self.script = Script()
        self.events = Hub(store, lambda number: self._progress.get(number, Progress()))
        self.asked: list[tuple[str, str, dict[str, Any], Caller, str]] = []
        self.steered: list[tuple[str, int, str | None]] = []
        self.reported: list[tuple[str, NodeReport]] = []
        self.findings: list[Finding] = []
        self.looked: list[dict[str, Any]] = []
        self.definitions: list[dict[str, Any]] = []
        self.refuse: AtollError | None = None
        self.refuse_state: AtollError | None = None
        self.tokens = {"read": Caller("ray", "reader"), "operate": Caller("olga", "operator"), "admin": Caller("ada", "admin")}
        self.serials: dict[str, str] = {}
        self.named: dict[str, str] = {}
        self._keys: dict[str, tuple[int, Any]] = {}
        self._progress: dict[int, Progress] = {}
        self._changed = asyncio.Event()
        self._next = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self.space: dict[tuple[str, str], Space] = {}

    def spaces(self) -> dict[tuple[str, str], Space]:
        return self.space

    @property
    def state(self) -> State:
        if self.refuse_state:
            raise self.refuse_state
        return self._state

    async def submit(
        self, operation: str, target: str, request: dict[str, Any], *, who: Caller, key: str = "", dry_run: bool = False
    ) -> Submission:
        OPERATIONS[operation].request.model_validate(request)
        self.asked.append((operation, target, request, who, key))
        if self.refuse:
            raise self.refuse
        name = target or request.get("name") or ""
        summary = f"{operation.replace('.', ' ')} {name}".strip()
        if dry_run:
            return Submission(None, summary, shared=("node:x",), exclusive=("instance:y",))
        if key in self._keys:
            job, before = self._keys[key]
            if before != (operation, target, request):
                raise KeyReused("the idempotency key was used for another request")
            return Submission(job, summary, True)
        number, self._next = self._next, self._next + 1
        if key:
            self._keys[key] = (number, (operation, target, request))
        job = Job(id=f"{number:010d}", operation=operation, summary=summary, who=who.name, created=1_799_999_990.0, state=JobState.RUNNING)
        job = job.model_copy(update={"started": 1_799_999_991.0, "locks": Locks(exclusive=(f"instance:{ident('i', 1)}",))})
        await self._state.store.write(put=[job])
        task = asyncio.get_running_loop().create_task(self._play(job, self.script))
        self._tasks.add(task)
        return Submission(number, summary)

    async def _play(self, job: Job, script: Script) -> None:
        for progress in script.progress:
            self._tell(job.number, progress)
            await asyncio.sleep(0.05)
        if script.gate:
            await script.gate.wait()
        await self.end(job.number, script)

    async def end(self, number: int, script: Script) -> None:
        """Let a job end as the script says."""
        job = self._state.store.require(Job, f"{number:010d}")
        wire = script.error.to_wire() if script.error else None
        changes = {"state": script.state, "error": wire, "reason": script.reason, "commands": script.commands, "result": script.result}
        steps = [
            Step(id=f"{job.id}/0000", key="start guest", what="call", node=ident("node", 1), method="guest.start", state=StepState.DONE)
        ]
        # The journal of a job that has ended is closed.
        steps = [] if job.over else steps
        await self._state.store.write(put=[job.model_copy(update={**changes, "ended": 1_799_999_994.2}), *steps])
        self._tell(number, self._progress.get(number, Progress()))

    def _tell(self, number: int, progress: Progress) -> None:
        self._progress[number] = progress
        self.events.progress(number, progress)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_job(self, job: int, seconds: float) -> tuple[Job, Progress]:
        if self._state.store.require(Job, f"{job:010d}").state.active:
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                pass
        return self._state.store.require(Job, f"{job:010d}"), self.job_progress(job)

    def job_progress(self, job: int) -> Progress:
        return self._progress.get(job, Progress())

    async def cancel_job(self, job: int) -> None:
        self.steered.append(("cancel", job, None))
        if not self._state.store.require(Job, f"{job:010d}").state.active:
            raise WrongState(f"job {job} has ended")
        await self.end(job, Script(state=JobState.UNDONE))

    async def resume_job(self, job: int, node_is_dead: str | None = None) -> None:
        self.steered.append(("resume", job, node_is_dead))
        await self.end(job, Script())

    async def undo_job(self, job: int) -> None:
        self.steered.append(("undo", job, None))
        await self.end(job, Script(state=JobState.UNDONE))

    async def os_definitions(self) -> list[dict[str, Any]]:
        return self.definitions

    async def storage_status(self, target: str) -> dict[str, Any]:
        if target != "ceph":
            raise NotFound(f"there is no storage cluster {target!r}")
        return {"name": target, "type": "ceph", "health": "HEALTH_OK", "checks": []}

    async def pool_images(self, target: str) -> list[dict[str, Any]]:
        if target != "looked-at":
            raise NotFound(f"there is no pool {target!r}")
        image = {"name": "old", "size": 4 << 20, "modified": 0.0, "writers": ["the Ceph client at 10.0.0.9:0/1"], "snapshots": ["then"]}
        return [{**image, "parent": "", "volume": None}]

    async def verify(self) -> list[Finding]:
        return self.findings

    def facts(self, node: str) -> dict[str, Any]:
        return {"node": node}

    async def doctor(self) -> list[dict[str, Any]]:
        return self.looked

    async def logs(self, node: str) -> dict[str, str]:
        return {"agent.log": node}

    async def join_token(self, name: str, group: str | None, rejoin: bool = False) -> str:
        return f"fingerprint.secret-for-{name}-in-{group}"

    async def api_token(self, name: str, role: str, days: int | None = None) -> str:
        self.named[name] = role
        return f"token-of-{name}-{role}"

    def api_tokens(self) -> list[dict[str, Any]]:
        return [{"name": name, "role": role, "created": 1.0, "expires": None} for name, role in sorted(self.named.items())]

    async def revoke_token(self, name: str) -> None:
        if self.named.pop(name, None) is None:
            raise NotFound("there is no such token")

    async def join(self, token: str, name: str, address: str, port: int, csr: str) -> JoinAnswer:
        if token != "good":
            raise TokenInvalid("this token is not known")
        return JoinAnswer(node=ident("node", 9), cluster="lagoon", certificate="CERT", ca="CA", masters=("https://m:7770",))

    async def report(self, node: str, report: NodeReport) -> dict[str, Any]:
        self.reported.append((node, report))
        return {"term": 7}

    def caller_of_token(self, token: str) -> Caller:
        if token not in self.tokens:
            raise Unauthenticated("this token is not known")
        return self.tokens[token]

    def node_of_serial(self, serial: str, ident: str = "", issued: float = 0.0) -> str:
        if serial not in self.serials:
            raise Forbidden("this node was removed")
        return self.serials[serial]


GROUP = Group(id=ident("group", 1), name="default")
NODES = [Node(id=ident("node", n), name=f"node{n}", group=GROUP.id, address=f"10.0.0.{n}", ready=True) for n in (1, 2, 3)]
SHARED = Pool(
    id=ident("pool", 1), name="images", driver="sharedfile", options={"path": "/srv"}, groups=(GROUP.id,), writers=Writers.ADVISORY
)
LOCAL = Pool(id=ident("pool", 2), name="local", driver="file", options={"path": "/var/local"}, groups=(GROUP.id,))


def cluster_objects() -> list[Stored]:
    """A cluster with three nodes, two pools, and instances in many states."""
    objects: list[Stored] = [Cluster(id="cluster", name="lagoon"), GROUP, *NODES, SHARED, LOCAL]
    volume = Volume(id=ident("vol", 1), name="web1-0", pool=SHARED.id, size=10 * GIB, state=VolumeState.IN_USE, instance=ident("i", 1))
    local = Volume(
        id=ident("vol", 2), name="db1-0", pool=LOCAL.id, size=2 * GIB, state=VolumeState.IN_USE, instance=ident("i", 2), node=NODES[1].id
    )
    spare = Volume(id=ident("vol", 3), name="spare", pool=SHARED.id, size=GIB, state=VolumeState.AVAILABLE)
    web = Instance(
        id=ident("i", 1),
        name="web1",
        group=GROUP.id,
        memory=512 * MIB,
        vcpus=2,
        disks=(Disk(volume=volume.id, slot=0),),
        nics=(Nic(mac="52:54:00:00:00:01"),),
        desired="running",
        home=NODES[0].id,
        tags=("env:prod",),
    )
    database = Instance(id=ident("i", 2), name="db1", group=GROUP.id, memory=GIB, disks=(Disk(volume=local.id, slot=0),), home=NODES[1].id)
    objects += [volume, local, spare, web, database, Claim(id=web.id, holder=NODES[0].id, generation=3)]
    return objects


async def fake_leader(objects: list[Stored] | None = None) -> FakeLeader:
    """A leader of that cluster, with all nodes alive and web1 running on node1."""
    store = await LeaderStore.open(MemoryStore())
    await store.write(put=cluster_objects() if objects is None else objects)
    leader = FakeLeader(store)
    for node in store.all(Node):
        leader.health.reports[node.id] = NodeReport(node=node.id, term=1, memory_total=8 * GIB, memory_free=6 * GIB, cpus=4, version="0.1")
    first = leader.health.reports.get(NODES[0].id)
    if first:
        guest = GuestStatus(instance=ident("i", 1), name="web1", generation=3, state="running", memory=512 * MIB, vcpus=2)
        leader.health.reports[NODES[0].id] = first.model_copy(update={"guests": [guest]})
    return leader


@asynccontextmanager
async def served(leader: FakeLeader, directory: Path, **tls: Any) -> AsyncIterator[tuple[str, int | None]]:
    """The leader behind a real Unix socket (and HTTPS, if asked for): the socket's path and the port."""
    from atoll.api.rest.app import create_app
    from atoll.runtime.httpserver import listening

    path = directory / "api.sock"
    async with listening(create_app(leader), socket_path=path, **tls) as port:
        yield str(path), port


def clean_environment(**more: str) -> dict[str, str]:
    """The environment for commands: nothing of the developer's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
    return {**kept, "ATOLL_CONFIG": "/nonexistent/atoll.toml", **more}
