"""What the model of the protocol found (docs/explanation/model.md): late orders of earlier jobs, a new master that takes a person's word
too soon, nodes that are readmitted in the middle of a start, and two jobs on one instance."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from simsupport import EXPORT, check, exported, finish, missing, running, settle

from atoll.agent.contact import Contact
from atoll.agent.memory import Memory, open_database
from atoll.agent.service import Service
from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, HostError, StaleTurn, Unreachable, WrongState
from atoll.model.messages import Call
from atoll.model.objects import Instance, JobState
from atoll.model.units import GIB
from atoll.rpc.agents import quiet
from atoll.runtime import certs


class Lost:
    """Orders of one method to one node (empty: to any) are lost, until ``through`` is set; the first of them may be delivered later."""

    def __init__(self, box: Box, node: str, method: str) -> None:
        self.box, self.node, self.method = box, node, method
        self.call: Call | None = None
        self.through = False
        self.sent = asyncio.Event()
        #: Nodes that the master cannot reach at all, though their reports come.
        self.deaf: set[str] = set()
        box.link_fault = self.fault

    async def fault(self, phase: str, node: str, call: Call) -> None:
        if node in self.deaf:
            raise Unreachable("no way there")
        if not self.through and phase == "request" and call.method == self.method and node in (self.node or node):
            self.call = self.call or call
            self.sent.set()
            raise Unreachable("lost")

    async def deliver(self) -> Any:
        assert self.call is not None
        return await self.box.agents[self.node].service.handle(self.call, quiet)


@pytest.mark.parametrize("word", ["declare-dead", "resume"])
def test_a_new_master_listens_before_it_takes_a_persons_word(word: str) -> None:
    """node1 is answered by the old master a moment ago, and its start order is on its way. The new master has never heard of it."""

    async def run() -> None:
        box = await Box.make(locking=False)
        await box.add_pool()
        await running(box, start=False)
        web1 = box.master.state.store.find(Instance, "web1").id
        lost = Lost(box, "node1", "guest.start")
        number = (await box.submit("instance.start", "web1", node="node1")).job
        assert number is not None
        await lost.sent.wait()
        await box.settle_reports()
        lost.deaf.add("node1")
        box.mute.add("node1")
        await box.crash_master()
        await box.boot_master()
        if word == "declare-dead":
            await box.do("node.declare-dead", "node1")
        else:
            # The job is taken up, and waits for node1; any job that a person resumes with the word will do.
            await box.master._ready.wait()
            with pytest.raises(AtollError):
                await box.master.resume_job(number, node_is_dead="node1")
        assert box.master.state.proved_dead(box.nodes["node1"])
        with pytest.raises(Unreachable):
            await lost.deliver()
        assert box.world.running(web1) == []
        await finish(box, number)
        await box.do("instance.start", "web1", node="node2")
        lost.deaf.clear()
        lost.through = True
        box.mute.clear()
        await settle(box)
        assert box.world.running(web1) == ["node2"]
        check(box)
        await box.close()

    simulate(run)


def test_a_late_order_of_an_earlier_job_is_refused_in_the_middle_of_a_later_one() -> None:
    """The order to complete a migration is lost, so that migration ends at the source. It comes when the next one pauses the guest for its
    switchover: the source would complete, while the job can still be undone, which kills the target."""

    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await running(box)
        web1 = box.master.state.store.find(Instance, "web1").id
        # A job that stays open for long, so that the numbers of jobs alone refuse nothing.
        other = Lost(box, "", "volume.create")
        older = (await box.submit("instance.add", name="slow", disks=[{"size": GIB}], memory=GIB, node="node3")).job
        assert older is not None
        await asyncio.sleep(1)
        lost = Lost(box, "node1", "guest.migrate_continue")

        async def both(phase: str, node: str, call: Call) -> None:
            await other.fault(phase, node, call)
            await lost.fault(phase, node, call)

        box.link_fault = both
        first = (await box.submit("instance.migrate", "web1", node="node2")).job
        assert first is not None
        assert (await box.end_of(first)).state is JobState.UNDONE
        assert box.world.running(web1) == ["node1"]
        lost.through = True
        errors: list[AtollError] = []

        async def late(phase: str, node: str, call: Call) -> None:
            await other.fault(phase, node, call)
            if phase == "reply" and call.method == "guest.migrate_out" and not errors:
                assert lost.call is not None
                assert lost.call.job != call.job
                with pytest.raises(StaleTurn) as refused:
                    await lost.deliver()
                errors.append(refused.value)

        box.link_fault = late
        await box.do("instance.migrate", "web1", node="node2")
        assert len(errors) == 1
        assert "later job" in errors[0].message
        assert box.world.running(web1) == ["node2"]
        other.through = True
        await finish(box, older)
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_turns_survive_a_power_cut_and_begin_anew_with_a_term(tmp_path: Path) -> None:
    memory = Memory(open_database(tmp_path / "agent.db"))
    memory.see_turn("i-1", 3, 7)
    memory.begin(1, "a step")
    memory.see_turn("i-1", 3, 7)
    memory.close()
    memory = Memory(open_database(tmp_path / "agent.db"))
    with pytest.raises(StaleTurn):
        memory.see_turn("i-1", 3, 6)
    memory.see_turn("i-2", 3, 6)
    memory.see_turn("i-1", 4, 1)
    with pytest.raises(StaleTurn):
        memory.see_turn("i-1", 3, 8)
    memory.close()


def test_a_node_is_not_readmitted_in_the_middle_of_a_start() -> None:
    """The reconcile loop starts a missing guest on its node, whose order hangs; the node is called dead and comes back. Were it readmitted
    now, it would promise nothing, for the claim is its own; and the start would be taken for undone, for the node was dead."""

    async def run() -> None:
        box = await Box.make(locking=False)
        await box.add_pool()
        await missing(box)
        lost = Lost(box, "node1", "guest.start")
        number = await box.master.submit_internal("instance.restart-missing", "web1")
        await lost.sent.wait()
        lost.deaf.add("node1")
        box.mute.add("node1")
        await asyncio.sleep(10)
        assert box.master.engine.job(number).state is JobState.RUNNING
        await box.master.state.store.write(put=[_proof(box, "node1")])
        readmission = await box.master.submit_internal("node.readmit", "node1")
        assert box.master.engine._locks.blockers(readmission) == [number]
        box.mute.clear()
        lost.deaf.clear()
        lost.through = True
        await finish(box, number)
        await settle(box)
        web1 = box.master.state.store.find(Instance, "web1").id
        here = box.world.running(web1)
        with pytest.raises(AtollError):
            await lost.deliver()
        assert box.world.running(web1) == here
        check(box)
        await box.close()

    simulate(run)


def _proof(box: Box, node: str) -> Any:
    from atoll.model.objects import DeathProof

    return DeathProof(id=box.nodes[node], method="human", who="test", at=box.clock.now())


def test_nobody_else_works_on_an_instance_that_is_being_added() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        lost = Lost(box, "node1", "guest.start")
        adding = (await box.submit("instance.add", name="new", disks=[{"size": GIB}], memory=GIB, node="node1")).job
        await lost.sent.wait()
        starting = (await box.submit("instance.start", "new", node="node2")).job
        assert adding is not None
        assert starting is not None
        await asyncio.sleep(5)
        assert box.master.engine.job(starting).state is JobState.QUEUED
        lost.through = True
        assert (await finish(box, adding)).state is JobState.DONE
        error = (await finish(box, starting)).error
        assert error is not None
        assert error["code"] == WrongState.code
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_nobody_else_works_on_an_instance_that_is_being_imported() -> None:
    async def run() -> None:
        box = await Box.make()
        await box.add_pool()
        await exported(box)
        lost = Lost(box, "", "export.read")
        importing = (await box.submit("instance.import", name="new", **EXPORT, template="shared")).job
        await lost.sent.wait()
        removing = (await box.submit("instance.remove", "new")).job
        assert importing is not None
        assert removing is not None
        await asyncio.sleep(5)
        assert box.master.engine.job(removing).state is JobState.QUEUED
        lost.through = True
        assert (await finish(box, importing)).state is JobState.DONE
        assert (await finish(box, removing)).state is JobState.DONE
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("again", [False, True])
async def test_a_start_that_took_its_time_does_not_begin_for_a_master_of_the_past(again: bool) -> None:
    """Attaching its disks took so long that another master leads now, which has not asked for it (``again``: it has)."""
    memory = Memory(open_database(":memory:"))
    contact = Contact(memory, lambda: 0.0)
    contact.heard(0.0, 1, False)
    attached, begun, done = asyncio.Event(), asyncio.Event(), []

    async def start(args: dict[str, Any], report: Any) -> None:
        begun.set()
        await attached.wait()
        contact.check_again("guest.start")
        done.append(args)

    service = Service("node1", memory, {"guest.start": start}, contact)
    order = Call(term=1, job=7, step="start", method="guest.start")
    asked = [asyncio.ensure_future(service.handle(order, quiet))]
    await begun.wait()
    await service.handle(Call(term=2, method="hello"), quiet)
    contact.heard(0.0, 2, False)
    if again:
        asked.append(asyncio.ensure_future(service.handle(order.model_copy(update={"term": 2}), quiet)))
        await asyncio.sleep(0)
    attached.set()
    if again:
        assert await asyncio.gather(*asked) == [None, None]
        assert len(done) == 1
        return
    with pytest.raises(Unreachable, match="term 2 leads now"):
        await asked[0]
    assert done == []
    # Nothing of it is remembered: the new master may ask for it.
    assert memory.step(7, "start") is None


def test_another_nodes_memory_is_refused(tmp_path: Path) -> None:
    Memory(open_database(tmp_path / "agent.db"), "node-1").close()
    Memory(open_database(tmp_path / "agent.db"), "node-1").close()
    with pytest.raises(HostError, match=r"that of node node-1; this node is node-2") as refused:
        Memory(open_database(tmp_path / "agent.db"), "node-2")
    assert "node-returns" in refused.value.hint


async def test_an_agent_does_not_begin_with_another_nodes_memory(tmp_path: Path) -> None:
    from atoll.agent.daemon import run
    from atoll.runtime.config import Config

    config = Config(node="node2", hypervisor="fake", etc_dir=tmp_path / "etc", state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    pair = certs.issue(certs.create_ca("test"), "node", "node-2", "node2")
    certs.save(config.tls_dir, pair.cert_pem, pair.cert_pem, pair.key_pem)
    Memory(open_database(config.state_dir / "agent.db"), "node-1").close()
    with pytest.raises(HostError, match="that of node node-1"):
        await asyncio.wait_for(run(config), 30)
