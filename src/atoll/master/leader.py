"""The master that leads: one object that the APIs talk to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import structlog

from atoll.api.events import Hub
from atoll.api.leader import Caller, Finding, JoinAnswer, Submission
from atoll.jobs.engine import Engine
from atoll.master import definitions
from atoll.master.admission import Admission
from atoll.master.announce import Announcer
from atoll.master.health import HealthMonitor
from atoll.master.inspect import Inspector
from atoll.master.keeper import CertificateKeeper
from atoll.master.reconcile import Reconciler
from atoll.master.shipping import Run, Shipper
from atoll.master.spaces import SpaceMonitor
from atoll.master.storage_nodes import StorageNodes
from atoll.master.verify import SEVERITIES, Verifier
from atoll.master.verify_access import access
from atoll.master.verify_room import room
from atoll.master.watching import StorageWatch
from atoll.model.errors import AtollError, NodeAnswers, NotLeader
from atoll.model.messages import NodeReport, Progress, Space
from atoll.model.objects import DeathProof, Hold, Job, Node, Pool, Stored, Volume
from atoll.operations.all import OPERATIONS
from atoll.operations.pool_images import pool_images
from atoll.operations.registry import operation as find_operation
from atoll.operations.state import State
from atoll.operations.storages import storage_status
from atoll.rpc.agents import Agents
from atoll.rpc.contract import Transport
from atoll.runtime.clock import Clock
from atoll.runtime.secrets import SecretBox
from atoll.store.cache import LeaderStore

log = structlog.get_logger()
#: How many ended jobs are kept, and seconds between clean-ups.
KEEP_JOBS, CLEAN_PERIOD = 10_000, 300.0
#: Seconds after which a node that keeps its proof of death while it answers is readmitted again.
READMIT_PAUSE = 5.0
#: Seconds that a new leader waits for the first report of every node before it takes up jobs.
FIRST_REPORTS = 3.0


class MasterLeader:
    """One term of leading. ``start`` takes up the jobs; ``stop`` leaves everything as it is for the next."""

    def __init__(
        self,
        store: LeaderStore,
        transport: Transport,
        clock: Clock,
        *,
        admission: Admission | None = None,
        rng: random.Random | None = None,
        secrets: SecretBox | None = None,
        node: str = "",
        url: str = "",
        keyring: Callable[[], dict[str, str]] = dict,
        run: Run = asyncio.to_thread,
    ) -> None:
        """``node``: the name of the node it leads from; ``url``: where it serves; ``keyring``, ``run``: see ``Shipper``."""
        self.health = HealthMonitor(clock)
        self._state = State(store, self.health, clock, rng or random.SystemRandom(), secrets)
        self.engine = Engine(store, clock, find_operation, self._state)
        own = store.by_name(Node, node) if node else None
        self._state.replication.master, self._state.replication.url = own.id if own else "", url
        self.agents = Agents(store, transport, self.engine.oldest_job, own.id if own else "")
        self._shipper = Shipper(self._state, self.agents, keyring, run)
        self._admission = admission
        self._state.signer = admission.authority if admission else None
        self.storage_nodes = StorageNodes(self._state, self.engine.busy)
        self.keeper = CertificateKeeper(self._state, self.submit_internal, self.engine.busy)
        #: What else ``verify`` tells of.
        self.more_findings: list[Callable[[], list[Finding]]] = [
            self.keeper.findings,
            self.storage_nodes.findings,
            lambda: room(self._state, self._spaces.known()),
            lambda: list(access(self._state)),
        ]
        self._spaces = SpaceMonitor(self._state, self.agents)
        self._storage_watch = StorageWatch(self._state, self.agents)
        self.more_findings.append(self._storage_watch.findings)
        self.events = Hub(store, self.engine.progress)
        self.engine.on_progress = self.events.progress
        self._verifier = Verifier(self._state, self.agents, self.engine)
        self._inspector = Inspector(self._state, self.agents)
        self._tasks: list[asyncio.Task[None]] = []
        self._ready, self._all_heard = asyncio.Event(), asyncio.Event()
        self._readmitted: dict[str, float] = {}
        self._welcomed: dict[str, float] = {}

    @property
    def state(self) -> State:
        """The cluster as it is."""
        return self._state

    async def start(self, *, loops: bool = True) -> None:
        """Take up every job, and begin to look after the guests."""
        assert OPERATIONS
        self._background(self._take_up(loops))
        if self._state.replication.url:
            self._background(Announcer(self._state, self.agents).run())
        self._background(self._shipper.run())
        log.info("leading", term=self._state.store.term)

    async def _take_up(self, loops: bool) -> None:
        """Jobs decide by what nodes report: wait until all have reported, or long enough, before taking them up."""
        try:
            await asyncio.wait_for(self._all_heard.wait(), FIRST_REPORTS)
        except TimeoutError:
            log.info("some nodes are silent", nodes=[n.name for n in self._state.store.all(Node) if not self.health.alive(n.id)])
        await self.engine.start(self.agents)
        self._ready.set()
        if loops:
            self._background(Reconciler(self).run())
            self._background(self._clean())
            self._background(self._spaces.run())
            self._background(self._storage_watch.run())
            self._background(self.keeper.run())
            self._state.store.listeners += [self._noticed, self.keeper.noticed]

    async def stop(self) -> None:
        """Stop working. Jobs stay in the store as they are."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.events.close("this master ends")
        await self.engine.stop()
        await self.agents.close()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    @property
    def space_monitor(self) -> SpaceMonitor:
        """What is known of the pools' space, and since when."""
        return self._spaces

    # --- jobs ---

    async def submit(
        self, operation: str, target: str, request: dict[str, Any], *, who: Caller, key: str = "", dry_run: bool = False
    ) -> Submission:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        self._check_leads()
        if dry_run:
            job = self.engine.submitter.prepare(operation, target, request, who=who.name)
            asked = find_operation(operation)
            plan = asked.plan(self._state, target, asked.request.model_validate(request)) if asked.plan else None
            return Submission(None, job.summary, shared=job.locks.shared, exclusive=job.locks.exclusive, plan=plan)
        job, repeated = await self.engine.submitter.submit(operation, target, request, who=who.name, key=key)
        return Submission(job.number, job.summary, repeated, job.locks.shared, job.locks.exclusive)

    async def submit_internal(self, operation: str, target: str) -> int:
        """A job of the master's own loops."""
        self._check_leads()
        job, _ = await self.engine.submitter.submit(operation, target, {}, who="master")
        return job.number

    def _check_leads(self) -> None:
        if self._state.store.deposed:
            raise NotLeader("this master was deposed")

    async def cancel_job(self, job: int) -> None:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        await self.engine.cancel(job)

    async def resume_job(self, job: int, node_is_dead: str | None = None) -> None:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        if node_is_dead:
            node = self._state.store.find(Node, node_is_dead)
            await self._state.listen(node.id)
            if self.health.alive(node.id) or await self._answers(node.id):
                raise NodeAnswers(f"node {node.name} answers; it is not dead")
            if self._state.store.get(DeathProof, node.id) is None:
                self._state.check_silent(node.id)
                proof = DeathProof(id=node.id, method="human", who=f"resume of job {job}", at=self._state.clock.now())
                await self._state.store.write(put=[proof])
        await self.engine.resume(job)

    async def _answers(self, node: str) -> bool:
        try:
            await self.agents.ask(node, "guest.list", deadline=2.0)
        except AtollError:
            return False
        return True

    async def undo_job(self, job: int) -> None:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        await self.engine.resume(job, undo=True)

    async def wait_job(self, job: int, seconds: float) -> tuple[Job, Progress]:
        """See ``api.leader.Leader``."""
        return await self.engine.wait(job, seconds), self.engine.progress(job)

    def job_progress(self, job: int) -> Progress:
        """See ``api.leader.Leader``."""
        return self.engine.progress(job)

    async def verify(self) -> list[Finding]:
        """See ``api.leader.Leader``."""
        found = [*await self._verifier.look(), *(finding for more in self.more_findings for finding in more())]
        return sorted(found, key=lambda finding: SEVERITIES.get(finding.severity, 3))

    def facts(self, node: str) -> dict[str, Any]:
        """See ``api.leader.Leader``."""
        return self._inspector.facts(node)

    async def doctor(self) -> list[dict[str, Any]]:
        """See ``api.leader.Leader``."""
        return await self._inspector.look()

    async def logs(self, node: str) -> dict[str, str]:
        """See ``api.leader.Leader``."""
        return await self._inspector.logs(node)

    async def os_definitions(self) -> list[dict[str, Any]]:
        """See ``api.leader.Leader``."""
        return await definitions.collect(self._state, self.agents)

    # --- nodes ---

    async def report(self, node: str, report: NodeReport) -> dict[str, Any]:
        """See ``api.leader.Leader``. A node that was proved dead and answers is readmitted: it first refuses what others may run."""
        self._check_leads()
        if not self.health.alive(node):
            self.agents.forget(node)
        if report.term > self._state.store.term:
            here = self._state.store.term
            self._state.store.supersede(f"node {report.node} has heard a master with term {report.term}; this one has {here}")
            self._check_leads()
        self.health.hear(node, report)
        if not self._ready.is_set():
            if all(n.offline or self.health.alive(n.id) for n in self._state.store.all(Node)):
                self._all_heard.set()
            return await self._answer(node)
        record = self._state.store.require(Node, node)
        now = self._state.clock.monotonic()
        busy = self.engine.busy(record.resource)
        if self._state.proved_dead(node) and not busy and now >= self._readmitted.get(node, 0.0):
            self._readmitted[node] = now + READMIT_PAUSE
            await self.submit_internal("node.readmit", node)
        elif not record.ready and not busy and now >= self._welcomed.get(node, 0.0):
            self._welcomed[node] = now + READMIT_PAUSE
            await self.submit_internal("node.welcome", node)
        elif not busy and self.storage_nodes.may_join(record):
            await self.submit_internal("node.join-storage", node)
        return await self._answer(node)

    async def _answer(self, node: str) -> dict[str, Any]:
        """What the node learns: who leads, and whether it counts as dead. A proof that is just being written counts."""
        await self._state.store.landed(DeathProof, node)
        self._check_leads()
        return {"term": self._state.store.term, "dead": self._state.proved_dead(node)}

    async def storage_status(self, target: str) -> dict[str, Any]:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        return await storage_status(self._state, self.agents, target)

    async def pool_images(self, target: str) -> list[dict[str, Any]]:
        """See ``api.leader.Leader``."""
        await self._ready.wait()
        return await pool_images(self._state, self.agents, target)

    async def join_token(self, name: str, group: str | None, rejoin: bool = False) -> str:
        """See ``api.leader.Leader``."""
        return await self._gate().join_token(self._state, name, group, rejoin)

    async def api_token(self, name: str, role: str, days: int | None = None) -> str:
        """See ``api.leader.Leader``."""
        return await self._gate().api_token(self._state, name, role, days)

    def api_tokens(self) -> list[dict[str, Any]]:
        """See ``api.leader.Leader``."""
        return self._gate().api_tokens(self._state)

    async def revoke_token(self, name: str) -> None:
        """See ``api.leader.Leader``."""
        await self._gate().revoke_token(self._state, name)

    async def join(self, token: str, name: str, address: str, port: int, csr: str) -> JoinAnswer:
        """See ``api.leader.Leader``."""
        return await self._gate().join(self._state, token, name, address, port, csr)

    def caller_of_token(self, token: str) -> Caller:
        """See ``api.leader.Leader``."""
        return self._gate().caller_of_token(self._state, token)

    def node_of_serial(self, serial: str, ident: str = "", issued: float = 0.0) -> str:
        """See ``api.leader.Leader``."""
        return self._gate().node_of_serial(self._state, serial, ident, issued)

    def _gate(self) -> Admission:
        if self._admission is None:
            raise NotLeader("this master admits nobody")
        return self._admission

    # --- housekeeping ---

    async def _clean(self) -> None:
        """Forget the oldest ended jobs with their journals and keys."""
        while True:
            await asyncio.sleep(CLEAN_PERIOD)
            store = self._state.store
            ended = len(store.ids(Job)) - len(store.active(Job))
            try:
                for ident in store.ids(Job):
                    if ended <= KEEP_JOBS:
                        break
                    job = store.get(Job, ident)
                    if job is not None and job.over:
                        await self.engine.forget(job)
                        ended -= 1
            except NotLeader:
                return
            except AtollError as error:
                # Such as a full disk: there is another turn.
                log.warning("old jobs cannot be forgotten", error=error.message)

    def spaces(self) -> Mapping[tuple[str, str], Space]:
        """The newest known space of pools; see ``SpaceMonitor``."""
        return self._spaces.known()

    def _noticed(self, before: Stored | None, after: Stored | None) -> None:
        if isinstance(after or before, (Pool, Volume)):
            self._spaces.look_soon()

    def holds(self) -> list[Hold]:
        """What jobs that need attention hold."""
        return self._state.store.all(Hold)
