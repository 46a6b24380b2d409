"""A cluster that lives through random operations and faults, and the reference model of what should exist then.

The model is a function of the jobs that were done, in the order of their ends: it shares no code with operations. Whatever happened,
once everything is healed the cluster must be what the model says, and ``simsupport.check`` must hold.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from simsupport import Ticking, check, jobs, never
from test_succession import succeed

from atoll.lab.box import ROOT, Box
from atoll.master.leader import MasterLeader
from atoll.model.errors import AtollError, GuestError, NotLeader, PoolFull, PoolUnavailable, StaleTerm, Unreachable
from atoll.model.messages import Call
from atoll.model.objects import DeathProof, Instance, Job, JobState, Node, Volume
from atoll.model.units import GIB
from atoll.rpc import inprocess
from atoll.rpc.agents import quiet
from atoll.runtime import faults
from atoll.runtime.clock import VirtualLoop

T = TypeVar("T")
#: Virtual seconds that one action may take, and all jobs may take to end once everything is healed.
LIMIT, PATIENCE = 300.0, 4000.0


# --- the reference model ---


@dataclass
class Machine:
    """An instance as it should be."""

    name: str
    memory: int
    running: bool
    disks: list[str]


@dataclass
class Model:
    """What should exist: instances, and volumes (id -> bytes)."""

    machines: dict[str, Machine] = field(default_factory=dict)
    volumes: dict[str, int] = field(default_factory=dict)

    def apply(self, job: Job) -> None:
        """A job was done."""
        noun, verb = job.operation.split(".")
        effect = getattr(self, f"_{noun}_{verb}".replace("-", "_"), None)
        if effect is not None:
            effect(job.request, job.result)

    def _instance_add(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        sizes = [disk["size"] for disk in request["disks"]]
        self.volumes.update(zip(result["volumes"], sizes, strict=True))
        self.machines[result["instance"]] = Machine(request["name"], request["memory"], request["start"], list(result["volumes"]))

    def _instance_remove(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        gone = self.machines.pop(request["id"])
        for volume in () if request["keep_disks"] else gone.disks:
            del self.volumes[volume]

    def _instance_start(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].running = True

    _instance_failover = _instance_start

    def _instance_stop(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].running = False

    def _instance_powered_off(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        if result.get("done") != "nothing":
            self.machines[request["id"]].running = False

    def _instance_rename(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].name = request["new_name"]

    def _instance_modify(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].memory = request["memory"]

    def _instance_grow_disk(self, request: dict[str, Any], result: Any) -> None:
        self.volumes[request["volume"]] += request["increment"]

    def _instance_add_disk(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        self.volumes[result["volume"]] = request["disk"]["size"]
        self.machines[request["id"]].disks.append(result["volume"])

    def _instance_attach_disk(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].disks.append(request["volume"])

    def _instance_detach_disk(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].disks.remove(request["volume"])

    def _instance_remove_disk(self, request: dict[str, Any], result: Any) -> None:
        self.machines[request["id"]].disks.remove(request["volume"])
        del self.volumes[request["volume"]]

    def _volume_create(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        self.volumes[result["volume"]] = request["size"]

    def _volume_delete(self, request: dict[str, Any], result: Any) -> None:
        del self.volumes[request["id"]]

    def _volume_grow(self, request: dict[str, Any], result: Any) -> None:
        self.volumes[request["id"]] += request["increment"]


def compare(box: Box, model: Model) -> None:
    """The cluster is what the model says."""
    store = box.master.state.store
    assert {v.id: v.size for v in store.all(Volume)} == model.volumes
    found = {i.id: Machine(i.name, i.memory, i.desired == "running", [disk.volume for disk in i.disks]) for i in store.all(Instance)}
    assert found == model.machines


# --- the cluster and its faults ---


@dataclass
class Request:
    """What a client asked for; it asks again with the same key until it is answered."""

    operation: str
    target: str
    fields: dict[str, Any]
    key: str
    job: int | None = None


class Walk:
    """One cluster in its own virtual time. Actions are coroutines; ``do`` runs one."""

    def __init__(self, seed: int = 0, *, locking: bool = True) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.log: list[str] = []
        self.requests: list[Request] = []
        self.model = Model()
        self._applied: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._old: list[MasterLeader] = []
        self._down: set[str] = set()
        self._armed: Callable[[str], Awaitable[None]] | None = None
        self.box: Box = self.do(self._begin(seed, locking))

    def do(self, work: Coroutine[Any, Any, T], limit: float = LIMIT) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, limit))

    async def _begin(self, seed: int, locking: bool) -> Box:
        box = await Box.make(seed=seed, locking=locking)
        await box.add_pool()
        await box.add_pool("local", "file")
        for name, pool, disks in (("vm0", "shared", 2), ("vm1", "shared", 1), ("vm2", "local", 1)):
            await box.do("instance.add", name=name, template=pool, disks=[{"size": GIB}] * disks, memory=GIB)
        await box.do("volume.create", name="data0", pool="shared", size=GIB)
        self._ticking = Ticking(box)
        await self._ticking.__aenter__()
        faults.handler = self._point
        return box

    def close(self) -> None:
        """Everything ends, whatever has happened."""
        faults.handler = None
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        asyncio.set_event_loop(None)
        self.loop.close()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _point(self, name: str) -> None:
        if self._armed is not None:
            await self._armed(name)

    @property
    def dead(self) -> list[str]:
        """Nodes without power."""
        return sorted(self._down)

    @property
    def no_power(self) -> bool:
        """Whether a node has no power."""
        return bool(self._down)

    def note(self, text: str) -> None:
        self.log.append(f"{self.loop.time():.1f} {text}")

    # --- requests ---

    def names(self, kind: type[Instance] | type[Volume]) -> list[str]:
        return [item.name for item in self.box.leader.state.store.all(kind)] if self.box.leader else []

    async def ask(self, operation: str, target: str = "", /, **fields: Any) -> None:
        """Ask for something. A refusal, or no answer, is no failure."""
        request = Request(operation, target, fields, f"key {len(self.requests)}")
        self.note(f"{operation} {target} {fields}")
        if await self._send(request, 8.0):
            self.requests.append(request)

    async def _send(self, request: Request, seconds: float) -> bool:
        """False: it was refused."""
        if self.box.leader is None:
            return True
        try:
            async with asyncio.timeout(seconds):
                leader = self.box.leader
                found = await leader.submit(request.operation, request.target, request.fields, who=ROOT, key=request.key)
        except TimeoutError:
            return True
        except AtollError as error:
            self.note(f"  {type(error).__name__}: {error.message}")
            return error.code in ("store_error", "not_leader", "deadline_exceeded", "unreachable")
        self.note(f"  job {found.job}")
        assert request.job in (None, found.job), "the same key gives another job"
        request.job = found.job
        return True

    async def steer(self, what: str, which: int) -> None:
        """Cancel, resume or undo a job."""
        leader = self.box.leader
        wanted = JobState.active.fget if what == "cancel" else (lambda state: state is JobState.NEEDS_ATTENTION)  # type: ignore[attr-defined]
        found = [job for job in jobs(self.box) if wanted(job.state)] if leader else []
        if leader is None or not found:
            return
        number = found[which % len(found)].number
        self.note(f"{what} {number}")
        dead = min(self._down, default=None) if what == "resume" else None
        try:
            async with asyncio.timeout(8.0):
                if what == "cancel":
                    await leader.cancel_job(number)
                elif what == "undo":
                    await leader.undo_job(number)
                else:
                    await leader.resume_job(number, dead)
        except (AtollError, TimeoutError) as error:
            self.note(f"  {type(error).__name__}: {error}")

    # --- faults ---

    async def bounce_master(self, pause: float) -> None:
        if self.box.leader is None:
            return
        self.note("the master dies")
        await self.box.crash_master()
        await asyncio.sleep(pause)
        await self.box.boot_master()

    async def bounce_agents(self, names: list[str], pause: float) -> None:
        names = [name for name in names if name in self.box.agents]
        self.note(f"agents die: {names}")
        for name in names:
            await self.box.crash_agent(name)
        await asyncio.sleep(pause)
        for name in names:
            if name not in self._down and name not in self.box.agents:
                await self.box.boot_agent(name)

    async def crash(self, who: str, node: str, pause: float) -> None:
        if who in ("master", "both"):
            self._later(self.bounce_master(pause))
        if who in ("agent", "both"):
            self._later(self.bounce_agents([node] if who == "agent" else list(self.box.agents), pause))
        await asyncio.sleep(0)

    async def arm(self, visits: int, who: str, pause: float) -> None:
        """At the n-th fault point from now on somebody dies there."""
        self.note(f"arm {visits} {who}")
        left = visits

        async def strike(name: str) -> None:
            nonlocal left
            left -= 1
            if left:
                return
            self._armed = None
            self.note(f"strike at {name}")
            at_agent = name.startswith("agent:")
            await self.crash(who, inprocess.here.get() if at_agent else "node1", pause)
            if who == "both" or at_agent == (who == "agent"):
                await never()

        self._armed = strike

    async def power_cut(self, node: str) -> None:
        if self._down:
            return
        self.note(f"power cut of {node}")
        self._down.add(node)
        await self.box.power_cut(node)

    async def power_on(self) -> None:
        for node in sorted(self._down):
            self.note(f"power for {node}")
            self._down.discard(node)
            if node not in self.box.agents:
                await self.box.boot_agent(node)

    async def cut(self, node: str, seconds: float) -> None:
        """The node's link to the master."""
        self.note(f"cut {node} for {seconds}")

        async def heal() -> None:
            await asyncio.sleep(seconds)
            self.box.cut.discard(node)

        self.box.cut.add(node)
        self._later(heal())

    async def bad_network(self, loss: float, doubled: float, slow: float, seed: int) -> None:
        """Orders and answers get lost, come late, come twice, and come again much later."""
        self.note(f"bad network {loss} {doubled} {slow}")
        rng = random.Random(seed)

        async def again(node: str, call: Call, after: float) -> None:
            await asyncio.sleep(after)
            agent = self.box.agents.get(node)
            try:
                if agent is not None:
                    await agent.service.handle(call, quiet)
            except AtollError:
                return

        async def fault(phase: str, node: str, call: Call) -> None:
            if rng.random() < doubled and phase == "request":
                self._later(again(node, call, rng.choice((0.0, 0.1, 3.0, 40.0))))
            if rng.random() < slow:
                await asyncio.sleep(rng.choice((0.05, 0.5, 3.0, 15.0)))
            if rng.random() < loss:
                raise Unreachable(f"the {phase} is lost")

        self.box.link_fault = fault if loss or doubled or slow else None

    async def failing(self, where: str, visits: int, times: int) -> None:
        """The n-th effect from now on fails, perhaps again and again."""
        self.note(f"{where} fails at {visits} x{times}")
        count = 0

        async def fault(node: str, method: str, phase: str) -> None:
            nonlocal count
            count += 1
            if visits <= count < visits + times:
                self.note(f"  {method} fails on {node} ({phase})")
                raise GuestError("it fails") if where == "guest" else (PoolFull("full") if visits % 2 else PoolUnavailable("away"))

        if where == "guest":
            self.box.world.fault = fault
        else:
            self.box.disks.fault = fault

    async def lose_guest(self, which: int, how: str) -> None:
        """A guest's process is killed, or it powers itself off."""
        found = sorted(key for key, guest in self.box.world.guests.items() if guest.state == "running")
        if not found:
            return
        node, instance = found[which % len(found)]
        self.note(f"{how} {instance} on {node}")
        (self.box.world.kill_guest if how == "kill" else self.box.world.end_guest)(instance, node)

    async def jump(self, seconds: float) -> None:
        self.note(f"the clock jumps by {seconds}")
        self.box.clock.offset += seconds

    async def depose(self) -> None:
        """Another master leads, and the old one goes on."""
        if self.box.leader is None:
            return
        self.note("another master leads")
        self._old.append(self.box.leader)
        self.box.leader = self.box.store = None
        await self.box.boot_master()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    # --- what must hold ---

    def quiesce(self) -> None:
        """Heal everything, let a person end what needs attention, and check everything."""
        self.do(self._quiesce(), PATIENCE)

    async def _quiesce(self) -> None:
        box = self.box
        self.note("all is healed")
        self._armed = None
        box.link_fault = box.world.fault = box.disks.fault = None
        box.cut.clear()
        await self.power_on()
        while self._background:
            await asyncio.wait(set(self._background))
        for request in self.requests:
            assert await self._send(request, 60.0) or request.job is None, f"{request} was accepted, and is refused now"
        await self._all_end()
        await self._refused()
        for node in box.master.state.store.all(Node):
            if node.drained:
                await box.do("node.modify", node.name, drained=False)
        await asyncio.sleep(45.0)
        await self._all_end()
        check(box)
        assert not box.master.state.store.all(DeathProof), "a node that answers counts as dead"
        self._replay()
        compare(box, self.model)
        for request in self.requests:
            if request.job is not None:
                await self._send(request, 60.0)
        await asyncio.sleep(1.0)
        compare(box, self.model)
        self.requests.clear()

    async def _refused(self) -> None:
        """Masters that were replaced have no effect any more."""
        for old in self._old:
            for node in self.box.agents:
                await self.box.master.agents.ask(self.box.nodes[node], "guest.list")
                try:
                    await old.agents.ask(self.box.nodes[node], "guest.list")
                except (NotLeader, StaleTerm, AtollError):
                    continue
                raise AssertionError(f"{node} obeys a master that was replaced")
            await old.stop()
        self._old.clear()

    async def _all_end(self) -> None:
        """Every job ends; those that need attention by a person's word."""
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE / 3
        while loop.time() < end:
            await asyncio.sleep(2.0)
            found = [job for job in jobs(self.box) if not job.state.ended]
            if not found:
                return
            for job in found:
                if job.state is JobState.NEEDS_ATTENTION:
                    self.note(f"{job.number} {job.operation} needs attention: {job.reason}")
                    try:
                        await (self.box.master.resume_job if job.committed else self.box.master.undo_job)(job.number)
                    except AtollError as error:
                        self.note(f"  {error.message}")
        engine = self.box.master.engine
        words = [
            (j.number, j.operation, str(j.state), j.reason, engine.progress(j.number).text, j.locks, j.parent)
            for j in jobs(self.box)
            if not j.state.ended
        ]
        raise AssertionError(f"jobs never end: {words}")

    def _replay(self) -> None:
        entries = self.box.durable.entries
        done = [(entries[f"jobs/{job.id}"].revision, job) for job in jobs(self.box) if job.state.ended and job.id not in self._applied]
        for _, job in sorted(done, key=lambda found: found[0]):
            self._applied.add(job.id)
            if job.state is JobState.DONE:
                self.model.apply(job)

    def fail_over_master(self, lag: int = 0) -> None:
        """The master's machine is lost once all is quiet; a candidate takes over with its copy of the store."""
        self.quiesce()

        async def work() -> None:
            copy = dict(self.box.durable.entries)
            await self.box.crash_master()
            await asyncio.sleep(1.0)
            self.note("a candidate takes over")
            await succeed(self.box, copy)
            self._applied |= {job.id for job in jobs(self.box)}
            await asyncio.sleep(10.0)

        self.do(work())
        self.quiesce()


def sizes(number: int) -> int:
    """A size for a small number."""
    return (number % 4 + 1) * GIB
