"""The store reaches the master candidates: through gaps, absences, losses of power and new masters; and it never waits for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from atoll.lab.box import Box, simulate
from atoll.master import shipping
from atoll.model.errors import AtollError, StaleTerm
from atoll.model.messages import Call
from atoll.model.objects import Group, Node
from atoll.model.units import GIB
from atoll.store import image

pytestmark = pytest.mark.timeout(300)


async def make(home: Path) -> Box:
    box = await Box.make(home=home, candidates=("node1", "node2", "node3"))
    await box.add_pool()
    return box


def copy_of(box: Box, name: str) -> dict[str, bytes]:
    """The store, built from what lies on the node's disk."""
    _, base, changes = box.replica(name).read()
    return image.unpack(base, [change.data for change in changes])


def truth(box: Box) -> dict[str, bytes]:
    return {key: entry.value for key, entry in box.durable.entries.items()}


async def in_step(box: Box, *names: str, seconds: float = 60.0) -> None:
    """Until these candidates have everything, as the master sees it and as it lies there."""
    rows: Any = None
    for _ in range(int(seconds * 10)):
        state = box.master.state
        now = state.clock.monotonic()
        rows = [state.replication.row(box.nodes[name], state.store.revision, now) for name in names]
        if all(row and row["state"] == "in step" and not row["behind"] for row in rows):
            for name in names:
                assert copy_of(box, name) == truth(box)
            return
        await asyncio.sleep(0.1)
    raise AssertionError(rows)


async def changes(box: Box, count: int = 5) -> None:
    for number in range(count):
        ident = f"vol{box.durable.revision}-{number}"
        await box.do("volume.create", name=ident, pool="shared", size=GIB)
        if number % 2:
            await box.do("volume.delete", ident)


def row(box: Box, name: str) -> dict[str, Any]:
    state = box.master.state
    found = state.replication.row(box.nodes[name], state.store.revision, state.clock.monotonic())
    assert found is not None
    return found


def test_candidates_follow_every_change(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await changes(box)
        await in_step(box, "node2", "node3")
        assert box.nodes["node1"] not in box.master.state.replication.candidates
        assert not (tmp_path / "node1" / "replica").exists()
        await changes(box, 3)
        await in_step(box, "node2", "node3")
        await box.close()

    simulate(story)


def test_one_that_is_away_holds_up_nobody_and_gets_the_rest_later(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node2", "node3")
        box.cut.add("node3")
        began = box.clock.monotonic()
        await changes(box, 6)
        assert box.clock.monotonic() - began < 6.0, "changes have waited for a candidate that is away"
        await in_step(box, "node2")
        assert row(box, "node3")["state"] == "behind"
        await asyncio.sleep(60)
        old = [f for f in await box.master.verify() if f.what == "a master candidate's copy of the store is old"]
        assert [f.about for f in old] == ["node3"]
        assert (old[0].since or 0) > 30
        box.cut.clear()
        await in_step(box, "node3")
        await box.close()

    simulate(story)


def test_one_that_was_away_longer_than_the_log_reaches_gets_a_new_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "QUEUE", 3)

    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node2")
        assert box.store is not None
        box.store._keep = 5
        box.cut.add("node2")
        await changes(box, 6)
        base = (tmp_path / "node2" / "replica" / "base").read_bytes()
        box.cut.clear()
        await in_step(box, "node2")
        assert (tmp_path / "node2" / "replica" / "base").read_bytes() != base
        await box.close()

    simulate(story)


def test_a_queue_that_is_full_stops_the_reader_of_the_log_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "QUEUE", 3)

    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node2")
        box.cut.add("node2")
        await changes(box, 6)
        box.cut.clear()
        await in_step(box, "node2")
        await box.close()

    simulate(story)


@pytest.mark.parametrize("lost", ["everything", "the log", "its end", "the base"])
def test_a_candidate_that_lost_something_gets_it_again(tmp_path: Path, lost: str) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await changes(box, 2)
        await in_step(box, "node2")
        await box.crash_agent("node2")
        place = tmp_path / "node2" / "replica"
        match lost:
            case "everything":
                for path in place.iterdir():
                    path.unlink()
            case "the log":
                (place / "log").unlink()
            case "the base":
                (place / "base").write_bytes(b"{}\n")
            case _:
                log = (place / "log").read_bytes()
                (place / "log").write_bytes(log[:-40])
        await box.boot_agent("node2")
        await changes(box, 2)
        await in_step(box, "node2")
        await box.close()

    simulate(story)


def test_a_log_that_has_grown_is_replaced_by_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "LOG", 2000)

    async def story() -> None:
        box = await make(tmp_path)
        await changes(box, 30)
        await in_step(box, "node2")
        state = box.replica("node2").state
        assert state.log_size <= max(2000, 2 * state.base_size) + 8000
        await box.close()

    simulate(story)


def test_orders_that_come_late_twice_or_not_at_all(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        tally = 0

        async def fault(phase: str, node: str, call: Call) -> None:
            nonlocal tally
            if not call.method.startswith("replica."):
                return
            tally += 1
            if phase == "request" and tally % 3 == 0:
                agent, late = box.agents["node2"], call.model_copy()

                async def again() -> None:
                    await asyncio.sleep(4.0)
                    try:
                        await agent.service.handle(late, lambda progress: None)
                    except AtollError:
                        return

                tasks.append(asyncio.ensure_future(again()))
            if tally % 7 == 0:
                await asyncio.sleep(call.deadline + 1)

        tasks: list[Any] = []
        box.link_fault = fault
        await changes(box, 10)
        await asyncio.sleep(30)
        await changes(box, 10)
        box.link_fault = None
        await asyncio.gather(*tasks)
        await changes(box, 1)
        await in_step(box, "node2", "node3", seconds=200)
        await box.close()

    simulate(story)


def test_the_next_term_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await changes(box, 2)
        for _ in range(3):
            await box.crash_master()
            await box.boot_master()
            await changes(box, 2)
            await in_step(box, "node2", "node3")
        await box.close()

    simulate(story)


def test_the_role_taken_away_takes_the_copy_away(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node2", "node3")
        box.cut.add("node3")
        await box.do("node.modify", "node2", roles=["vm"])
        await box.do("node.modify", "node3", roles=["vm"])
        await asyncio.sleep(60)
        store = box.master.state.store
        assert not (tmp_path / "node2" / "replica").exists()
        assert not store.find(Node, "node2").holds_keys
        assert store.find(Node, "node3").holds_keys
        assert any(f.what == "a node may hold the keys of a master" and f.about == "node3" for f in await box.master.verify())
        # Also by the next master, and however long it takes.
        await box.crash_master()
        await box.boot_master()
        box.cut.clear()
        await asyncio.sleep(90)
        assert not (tmp_path / "node3" / "replica").exists()
        assert not box.master.state.store.find(Node, "node3").holds_keys
        await box.do("node.modify", "node2", roles=["vm", "master-candidate"])
        await in_step(box, "node2")
        await box.close()

    simulate(story)


def test_an_older_master_ships_nothing_any_more_and_knows_that_it_was_deposed(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node2")
        leader = box.master
        before = copy_of(box, "node2")
        other = box.agents["node3"]
        await other.service.handle(Call(term=99, method="hello", master="x"), lambda progress: None)
        await box.agents["node2"].service.handle(Call(term=99, method="hello", master="x"), lambda progress: None)
        store = leader.state.store
        await store.write(put=[Group(id="group-2", name="more")])
        await asyncio.sleep(10)
        assert store.deposed
        assert store.superseded
        with pytest.raises(AtollError, match="99"):
            await store.write(put=[Group(id="group-3", name="more still")])
        assert copy_of(box, "node2") == before
        # A term belongs to one master.
        with pytest.raises(StaleTerm, match="belongs to"):
            await other.service.handle(Call(term=99, method="hello", master="y"), lambda progress: None)
        await box.close()

    simulate(story)


def test_nothing_is_begun_while_a_candidate_may_have_taken_over(tmp_path: Path) -> None:
    """The old master comes back, and can reach its own node only: it must not start what may run elsewhere by now."""

    async def story() -> None:
        box = await make(tmp_path)
        await box.do("instance.add", name="web1", disks=[{"size": GIB}], memory=GIB, node="node1", template="shared")
        await in_step(box, "node2", "node3")
        await box.crash_master()
        await box.power_cut("node1")
        box.cut |= {"node2", "node3"}
        await box.boot_master()
        await box.boot_agent("node1")
        await asyncio.sleep(120)
        assert box.world.running(box.master.state.store.all(Node) and next(iter(box.world.acknowledged), "")) == []
        assert not [guest for guest in box.world.guests.values() if guest.state == "running"]
        stuck = [f for f in await box.master.verify() if f.what == "a master candidate has not acknowledged this master"]
        assert {f.about for f in stuck} == {"node2", "node3"}
        # A person's word is enough, and so is the candidates' own.
        await box.do("node.declare-dead", "node2")
        box.cut.discard("node3")
        await asyncio.sleep(180)
        assert [guest.node for guest in box.world.guests.values() if guest.state == "running"] == ["node1"]
        await box.close()

    simulate(story)


def test_a_candidate_cannot_be_removed_with_its_keys(tmp_path: Path) -> None:
    async def story() -> None:
        box = await make(tmp_path)
        await in_step(box, "node3")
        with pytest.raises(AtollError, match="is a master candidate"):
            await box.do("node.remove", "node3")
        with pytest.raises(AtollError, match="the master works on"):
            await box.do("node.remove", "node1")
        box.cut.add("node3")
        await box.do("node.modify", "node3", roles=["vm"])
        with pytest.raises(AtollError, match="has not said yet"):
            await box.do("node.remove", "node3")
        await box.do("node.remove", "node3", keys_are_lost=True)
        await box.close()

    simulate(story)
