"""A whole cluster in one process: memory store, in-process orders, guests in memory, virtual time.

Everything above the transports is the real code. Crashes are simulated: ``crash_master`` and ``crash_agent`` drop the object, and what
it had not made durable, on the floor; ``boot_master`` and ``boot_agent`` make another from what is durable.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from atoll.agent.certificates import CertificateOrders
from atoll.agent.memory import Memory, open_database
from atoll.agent.node import Agent
from atoll.agent.replica import Replica
from atoll.agent.standby import StandbyOrders
from atoll.api.leader import Caller, Submission
from atoll.hypervisor.memory import MemoryHypervisor, World
from atoll.lab.boxceph import BoxCeph, BoxCephSteps
from atoll.lab.boxos import BoxOs
from atoll.lab.boxstorage import BoxStorage, SharedDisks
from atoll.master.admission import Admission
from atoll.master.authority import CertificateAuthority, sealed
from atoll.master.leader import MasterLeader
from atoll.model.errors import AtollError, Unreachable, from_wire
from atoll.model.messages import PROTOCOL, NodeReport
from atoll.model.objects import Cluster, Group, Job, JobState, Node, Stored
from atoll.rpc.inprocess import InProcessTransport, LinkFault
from atoll.runtime import certs
from atoll.runtime.clock import LoopClock, VirtualLoop
from atoll.runtime.keeping import Keeping, KeptInMemory
from atoll.runtime.secrets import SecretBox
from atoll.store.cache import LeaderStore
from atoll.store.contract import Store
from atoll.store.memory import Durable, MemoryStore

T = TypeVar("T")
ROOT = Caller("root", "admin")
#: Memory of a simulated node, in bytes.
NODE_MEMORY = 64 << 30


def simulate(story: Callable[[], Awaitable[T]], *, limit: float = 4 * 3600.0) -> T:
    """Run a story in virtual time. ``limit``: virtual seconds after which it counts as hung; a job may wait an hour for its storage."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(asyncio.wait_for(story(), limit))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        asyncio.set_event_loop(None)
        loop.close()


async def at_once(work: Callable[[], Any]) -> Any:
    """Instead of a thread, of which virtual time knows nothing."""
    return work()


class Box:
    """The cluster. Use ``await Box.make(...)``."""

    def __init__(self, seed: int = 0, *, locking: bool = True, home: Path | None = None) -> None:
        self.rng = random.Random(seed)
        self.clock = LoopClock()
        self.durable = Durable()
        self.world = World(locking=locking)
        self.disks = SharedDisks(self.world)
        self.ceph = BoxCeph(self.clock)
        self.transport = InProcessTransport()
        self.nodes: dict[str, str] = {}
        self.agents: dict[str, Agent] = {}
        self._databases: dict[str, Any] = {}
        #: What each node has in its run directory about attached disks.
        self._attached: dict[str, dict[str, Any]] = {}
        self._beats: dict[str, asyncio.Task[None]] = {}
        self.store: MemoryStore | None = None
        self.leader: MasterLeader | None = None
        #: Nodes whose link is cut: they and the master hear nothing of each other.
        self.cut: set[str] = set()
        #: Nodes whose heartbeats do not arrive, though their agents answer.
        self.mute: set[str] = set()
        #: What else a test does to orders ("request") and answers ("reply"): may wait, or raise Unreachable.
        self.link_fault: LinkFault | None = None
        #: The protocol that an agent's reports tell, where it is not ours; seconds by which a node's clock is ahead.
        self.protocols: dict[str, int] = {}
        self.clock_skew: dict[str, float] = {}
        self.transport.fault = self._link
        self.world.image = self.disks.image
        self.loops = True
        #: With certificates: where each node, and the master (``master``), keeps its own.
        self.kept: dict[str, Keeping] = {}
        self.secrets = SecretBox([bytes(range(32))], Path("memory"))
        #: Where nodes keep their copies of the store; None: they take none.
        self.home = home
        #: The name of the node whose master leads; empty: on a machine of its own.
        self.seat = ""

    @classmethod
    async def make(
        cls,
        nodes: int = 3,
        seed: int = 0,
        *,
        locking: bool = True,
        loops: bool = True,
        home: Path | None = None,
        candidates: Collection[str] = (),
        certificates: bool = False,
    ) -> Box:
        """A running cluster with nodes node1..N in one group, and no pool yet. ``candidates``: nodes that get copies of the store, which
        lie in ``home``; then node1 has the master. ``certificates``: with a CA, which no transport asks for."""
        box = cls(seed, locking=locking, home=home)
        box.seat = "node1" if candidates else ""
        box.loops = loops
        leader = await LeaderStore.open(await box.open_store())
        group = Group(id="group-00000000000000001", name="default")
        put: list[Stored] = [Cluster(id="cluster", name="box", ca_fingerprint="box", hypervisor="fake"), group]
        for number in range(1, nodes + 1):
            ident = f"node-{number:017x}"
            box.nodes[f"node{number}"] = ident
            roles = ("vm", "master-candidate") if f"node{number}" in candidates else ("vm",)
            put.append(Node(id=ident, name=f"node{number}", group=group.id, address="127.0.0.1", ready=True, roles=roles))
        await leader.write(put=put)
        if certificates:
            await box._certify(leader)
        await box.boot_master()
        for name in box.nodes:
            await box.boot_agent(name)
        await box.settle_reports()
        return box

    async def _certify(self, leader: LeaderStore) -> None:
        now = self.clock.now()
        ca = certs.create_ca("box", now=now)
        self.kept["master"] = KeptInMemory(ca.cert_pem, certs.issue(ca, "master", "master", "node1", now=now))
        changed: list[Stored] = [sealed(self.secrets, ca)]
        changed.append(leader.require(Cluster, "cluster").model_copy(update={"ca_fingerprint": certs.fingerprint(ca.cert_pem)}))
        for node in leader.all(Node):
            pair = certs.issue(ca, "node", node.id, node.name, [node.address], now=now)
            self.kept[node.name] = KeptInMemory(ca.cert_pem, pair)
            changed.append(
                node.model_copy(
                    update={"certificate_serial": certs.serial(pair.cert_pem), "certificate_issued": certs.issued(pair.cert_pem)}
                )
            )
        await leader.write(put=changed)

    async def open_store(self) -> Store:
        """The store that a new master finds."""
        self.store = MemoryStore(durable=self.durable)
        return self.store

    # --- life of processes ---

    async def boot_master(self) -> None:
        """A new master takes a new term from the durable store."""
        store = await LeaderStore.open(await self.open_store())
        admission = None
        if self.kept:
            authority = CertificateAuthority(store, self.secrets, self.clock, self.kept["master"], ("node1", "127.0.0.1"))
            admission = Admission(authority, ("https://127.0.0.1:7770",))
        rng = random.Random(self.rng.random())
        self.leader = MasterLeader(
            store, self.transport, self.clock, admission=admission, rng=rng, node=self.seat, run=at_once, secrets=self.secrets
        )
        await self.leader.start(loops=self.loops)

    async def crash_master(self) -> None:
        """The master's process dies."""
        leader, self.leader = self.leader, None
        if self.store is not None:
            self.store.crash()
        if leader is not None:
            await leader.stop()

    async def boot_agent(self, name: str) -> None:
        """A new agent process on a node; it finds the guests that are there."""
        database = self._databases.setdefault(name, open_database(":memory:"))
        hypervisor = MemoryHypervisor(self.world, name)
        storage = BoxStorage(self.disks, name)
        agent = Agent(
            name,
            hypervisor,
            storage,
            Memory(database),
            None,
            {**storage.copy_handlers(), **BoxOs(self.disks, name).handlers(), **BoxCephSteps(self.ceph, name).handlers()},
            kept=self._attached.setdefault(name, {}),
            now=self.clock.monotonic,
            certificates=CertificateOrders(self.kept[name], name, "127.0.0.1") if name in self.kept else None,
            standby=self.standby(name),
        )
        self.agents[name] = agent
        self.transport.agents[self.nodes[name]] = agent.service
        self._beats[name] = asyncio.get_running_loop().create_task(self._beat(name, agent))

    def replica(self, name: str) -> Replica:
        """A node's copy of the store."""
        assert self.home is not None
        return Replica(self.home / name / "replica")

    def standby(self, name: str) -> StandbyOrders | None:
        """What makes a node fit to become the master."""
        if self.home is None:
            return None
        (self.home / name).mkdir(exist_ok=True)
        return StandbyOrders(self.replica(name), self.home / name / "keys", (), self.home / name, (), run=at_once)

    async def crash_agent(self, name: str) -> None:
        """The agent's process dies; guests go on."""
        agent = self.agents.pop(name, None)
        self.transport.agents.pop(self.nodes[name], None)
        if agent is not None:
            self._beats.pop(name).cancel()
            await agent.service.stop()

    async def power_cut(self, name: str) -> None:
        """Everything on the node is gone at once."""
        self.world.power_cut(name)
        self.ceph.node(name).running.clear()
        await self.crash_agent(name)
        self._attached.pop(name, None)
        self.disks.forget_node(name)

    async def close(self) -> None:
        """End everything."""
        for name in list(self.agents):
            await self.crash_agent(name)
        if self.leader is not None:
            await self.leader.stop()
        for database in self._databases.values():
            database.close()

    async def _link(self, phase: str, node: str, call: Any) -> None:
        if self.link_fault is not None:
            await self.link_fault(phase, node, call)
        if node in self.cut:
            await asyncio.sleep(call.deadline + 1)
            raise Unreachable(f"the link to {node} is cut")

    async def _beat(self, name: str, agent: Agent) -> None:
        while True:
            await self._report(name, agent)
            await asyncio.sleep(1.0)

    async def _report(self, name: str, agent: Agent) -> None:
        if self.leader is None or name in self.cut or name in self.mute:
            return
        guests = [agent.attachments.seen(guest) for guest in await agent.hypervisor.guests()]
        used = sum(g.memory for g in guests)
        report = NodeReport(
            node=name,
            term=agent.memory.term,
            protocol=self.protocols.get(name, PROTOCOL),
            clock=self.clock.now() + self.clock_skew.get(name, 0.0),
            memory_total=NODE_MEMORY,
            memory_free=NODE_MEMORY - used,
            cpus=8,
            guests=guests,
            stalled_pools=agent.storage.stalled(),
            stalled_for=agent.storage.stalled_for(),
            **(agent.certificates.facts() if agent.certificates else {}),
        )
        sent = self.clock.monotonic()
        try:
            said = await self.leader.report(self.nodes[name], report)
        except AtollError:
            return  # no master takes it: the next beat tries again
        if name not in self.cut:
            agent.contact.heard(sent, said["term"], said["dead"])

    async def settle_reports(self) -> None:
        """Let every agent report once."""
        for name, agent in list(self.agents.items()):
            await self._report(name, agent)

    # --- asking ---

    @property
    def master(self) -> MasterLeader:
        """The master that leads now."""
        assert self.leader is not None
        return self.leader

    async def submit(self, operation: str, target: str = "", /, *, key: str = "", **request: Any) -> Submission:
        """Submit a request as root."""
        return await self.master.submit(operation, target, request, who=ROOT, key=key)

    async def end_of(self, number: int) -> Job:
        """The job when it has ended or needs attention, across crashes of the master."""
        while True:
            leader = self.leader
            if leader is not None:
                job = await leader.engine.wait(number, 1.0)
                if job.state.ended or job.state is JobState.NEEDS_ATTENTION:
                    return job
            else:
                await asyncio.sleep(0.5)

    async def do(self, operation: str, target: str = "", /, **request: Any) -> Any:
        """Submit, wait, and give the result; raises the job's error."""
        submission = await self.submit(operation, target, **request)
        assert submission.job is not None
        job = await self.end_of(submission.job)
        if job.state is JobState.DONE:
            await self.settle_reports()
            return job.result
        if job.error:
            raise from_wire(job.error)
        raise AtollError(f"job {job.number} is {job.state}: {job.reason}")

    async def add_pool(self, name: str = "shared", driver: str = "sharedfile", **options: str) -> None:
        """A pool in memory."""
        await self.do("pool.add", name=name, driver=driver, options={"path": f"/box/{name}", "mount": "none", **options})
