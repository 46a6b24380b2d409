"""Upgrades: every released state is opened by the present code, agents may be one version behind, and jobs that an older version of an
operation began are undone by what they journaled."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from simsupport import Striker, background, bounce_master, check, finish, running, settle

from atoll.agent import service
from atoll.agent.memory import Memory
from atoll.lab.box import Box, simulate
from atoll.model.errors import NodeUnavailable, NotFound, StoreError, VersionMismatch
from atoll.model.messages import PROTOCOL, Call
from atoll.model.objects import KINDS, DeathProof, Hold, Instance, Job, JobState, Node, Pool, Step, Token, Volume
from atoll.model.units import GIB
from atoll.operations import registry
from atoll.storage import registry as registry_of_drivers
from atoll.store import schema, sqlite_file
from atoll.store.cache import LeaderStore
from atoll.store.contract import CompareFailed, Transaction
from atoll.store.memory import Durable, MemoryStore
from atoll.store.sqlite import SqliteStore

RELEASES = Path(__file__).parent.parent / "fixtures" / "releases"
STORES = sorted(RELEASES.glob("store-*.sql"))
AGENTS = sorted(RELEASES.glob("agent-*.sql"))


def laid_out(sql: Path, path: Path) -> Path:
    """The release's file as it lay on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(sql.read_text())
    connection.close()
    return path


async def durable_of(sql: Path, directory: Path) -> Durable:
    """Its content, for a simulated master."""
    laid_out(sql, directory / "atoll.db")
    store = await SqliteStore.open(directory)
    entries, revision = await store.list("")
    await store.close()
    return Durable(entries={entry.key: entry for entry in entries}, revision=revision, compacted=revision)


# --- released states ---


@pytest.mark.parametrize("sql", STORES, ids=lambda path: path.stem)
async def test_a_released_store_opens_with_everything_in_it(sql: Path, tmp_path: Path) -> None:
    kinds = Counter(key.split("/")[0] for key in _keys(sql))
    laid_out(sql, tmp_path / "atoll.db")
    store = await SqliteStore.open(tmp_path)
    leader = await LeaderStore.open(store)
    assert {cls.kind for cls in KINDS if cls.kind in kinds} == set(kinds) - {"meta"}
    for cls in KINDS:
        found = leader.all(cls) if cls is not Step else [step for job in leader.all(Job) for step in await leader.journal(job)]
        assert len(found) == kinds[cls.kind], cls
    mark = await store.get(schema.KEY)
    assert mark is not None
    assert int(mark.value) == schema.SCHEMA
    await store.close()


def _keys(sql: Path) -> list[str]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(sql.read_text())
    keys = [row[0] for row in connection.execute("SELECT key FROM obj")]
    connection.close()
    return keys


@pytest.mark.parametrize("sql", STORES, ids=lambda path: path.stem)
def test_a_released_cluster_goes_on_where_it_stood(sql: Path, tmp_path: Path) -> None:
    """Its jobs that were under way are taken up, and end; its held ones are released by a person; then it works."""
    durable = asyncio.run(durable_of(sql, tmp_path))

    async def story() -> None:
        box = Box()
        box.durable = durable
        probe = await LeaderStore.open(MemoryStore(durable=durable))
        box.nodes = {node.name: node.id for node in probe.all(Node)}
        for volume in probe.all(Volume):
            # The images are where the records say, as they are after an upgrade in place.
            place = f"{volume.pool}@node1" if volume.node else volume.pool
            if volume.logical_id:
                box.disks.images.setdefault(place, {})[volume.logical_id] = {"size": volume.size, "volume": volume.id}
        for pool in probe.all(Pool):
            local = registry_of_drivers.info(pool.driver).node_local
            box.disks.marks |= {f"{pool.id}@{name}" if local else pool.id: pool.id for name in box.nodes}
        await box.boot_master()
        for name in box.nodes:
            await box.boot_agent(name)
        open_jobs = [job.number for job in probe.all(Job) if not job.state.ended]
        assert len(open_jobs) == 4
        ended = [await finish(box, number) for number in open_jobs]
        assert all(job.state.ended for job in ended), ended
        await settle(box)
        store = box.master.state.store
        assert not store.all(Hold)
        assert not store.all(DeathProof), "the node answers"
        assert [token.name for token in store.all(Token)] == ["monitoring", "node4"]
        web1 = store.find(Instance, "web1")
        assert len(box.world.running(web1.id)) == 1
        await box.do("instance.stop", "web1", timeout=1.0)
        await box.do("instance.start", "web1")
        await box.do("volume.create", name="after", pool="shared", size=GIB)
        assert not box.world.violations
        await box.close()

    simulate(story)


@pytest.mark.parametrize("sql", AGENTS, ids=lambda path: path.stem)
def test_a_released_agents_memory_is_remembered(sql: Path, tmp_path: Path) -> None:
    from atoll.agent.memory import open_database

    database = open_database(laid_out(sql, tmp_path / "agent.db"))
    numbers = dict(database.execute("SELECT name, value FROM number"))
    memory = Memory(database)
    assert (memory.term, memory.oldest_job) == (numbers["term"], numbers["oldest_job"])
    for job, step, state in database.execute("SELECT job, step, state FROM step").fetchall():
        found = memory.step(job, step)
        assert found is not None
        assert found[0] == state
    memory.close()


# --- layouts ---


def renames(objects: schema.Objects) -> None:
    """A step as a release may have it: a field gets another name, and a kind goes."""
    for key in list(objects):
        if key.startswith("volumes/"):
            objects[key]["label"] = objects[key].pop("name")
        elif key.startswith("tokens/"):
            del objects[key]


async def _old(durable: Durable, store: MemoryStore) -> None:
    put = {"volumes/a": b'{"id":"a","name":"x"}', "volumes/b": b'{"id":"b","name":"y"}', "tokens/t": b'{"id":"t"}', "meta/term": b"7"}
    await store.transact(Transaction(put=put))


async def test_steps_bring_an_old_layout_up_in_one_transaction() -> None:
    durable = Durable()
    store = MemoryStore(durable=durable)
    await _old(durable, store)
    seen: list[tuple[int, int]] = []

    async def before(old: int, new: int) -> None:
        assert json.loads(durable.entries["volumes/a"].value) == {"id": "a", "name": "x"}, "the backup comes first"
        seen.append((old, new))

    revision = durable.revision
    steps = {1: renames, 2: lambda objects: objects.update({"volumes/c": {"id": "c", "label": "z"}})}
    await schema.bring_up(store, {"meta/term": 1}, before, schema=3, steps=steps)
    assert seen == [(1, 3)]
    assert durable.revision == revision + 1
    found = {key: json.loads(entry.value) for key, entry in durable.entries.items()}
    assert found == {
        "meta/schema": 3,
        "meta/term": 7,
        "volumes/a": {"id": "a", "label": "x"},
        "volumes/b": {"id": "b", "label": "y"},
        "volumes/c": {"id": "c", "label": "z"},
    }
    await schema.bring_up(store, {"meta/term": 1}, before, schema=3, steps=steps)
    assert seen == [(1, 3)], "a second opening changes nothing"


async def test_a_deposed_master_changes_no_layout() -> None:
    durable = Durable()
    store = MemoryStore(durable=durable)
    await _old(durable, store)
    await store.transact(Transaction(put={"meta/term": b"8"}))
    with pytest.raises(CompareFailed):
        await schema.bring_up(store, {"meta/term": 1}, schema=2, steps={1: renames})
    assert b"name" in durable.entries["volumes/a"].value


async def test_a_failed_backup_changes_nothing() -> None:
    durable = Durable()
    store = MemoryStore(durable=durable)
    await _old(durable, store)
    entries = dict(durable.entries)

    async def before(old: int, new: int) -> None:
        raise StoreError("no room for the backup")

    with pytest.raises(StoreError, match="no room"):
        await schema.bring_up(store, {}, before, schema=2, steps={1: renames})
    assert durable.entries == entries


async def test_a_newer_layout_is_refused_before_a_term_is_taken() -> None:
    durable = Durable()
    store = MemoryStore(durable=durable)
    await LeaderStore.open(store)
    await store.transact(Transaction(put={schema.KEY: str(schema.SCHEMA + 1).encode()}))
    entries = dict(durable.entries)
    with pytest.raises(StoreError, match="newer Atoll") as refused:
        await LeaderStore.open(store)
    assert "docs/howto/upgrade.md" in refused.value.hint
    assert durable.entries == entries


def test_there_is_a_step_from_every_layout() -> None:
    assert sorted(schema.STEPS) == list(range(1, schema.SCHEMA))
    assert sorted(sqlite_file.STEPS) == list(range(1, sqlite_file.SCHEMA))


async def test_the_tables_of_an_older_release_are_brought_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await SqliteStore.open(tmp_path)
    await store.transact(Transaction(put={"a": b"1"}))
    await store.close()
    monkeypatch.setattr(sqlite_file, "SCHEMA", 2)
    monkeypatch.setattr(sqlite_file, "STEPS", {1: "ALTER TABLE log ADD COLUMN who TEXT; INSERT INTO nowhere VALUES (1);"})
    with pytest.raises(StoreError, match="nowhere"):
        await SqliteStore.open(tmp_path)
    monkeypatch.setattr(sqlite_file, "STEPS", {1: "ALTER TABLE obj RENAME TO thing; CREATE VIEW obj AS SELECT key, rev, body FROM thing;"})
    store = await SqliteStore.open(tmp_path)
    entry = await store.get("a")
    assert entry is not None
    await store.close()
    with sqlite3.connect(tmp_path / "atoll.db") as database:
        assert database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (2,)
        assert "who" not in [row[1] for row in database.execute("PRAGMA table_info(log)")], "the failed step has left nothing"


# --- jobs of an older version of an operation ---


@pytest.mark.parametrize("point", ["agent:volume.create:after", "master:instance.add:12:after-write"])
def test_a_job_of_an_older_operation_is_undone_by_its_journal(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await running(box)

        async def upgrade(box: Box, name: str) -> None:
            newer = dataclasses.replace(registry.OPERATIONS["instance.add"], version=2, run=never_run)
            monkeypatch.setitem(registry.OPERATIONS, "instance.add", newer)
            background(bounce_master(box))
            await asyncio.Event().wait()

        with Striker(box, point, upgrade) as striker:
            number = (await box.submit("instance.add", name="new", disks=[{"size": GIB}] * 2, memory=GIB, node="node1")).job
            assert number is not None
            job = await finish(box, number)
        assert striker.struck == 1
        assert job.state is JobState.UNDONE
        assert job.error is not None
        assert "another version" in job.error["message"]
        await settle(box)
        check(box)
        assert [i.name for i in box.master.state.store.all(Instance)] == ["web1"]
        await box.close()

    async def never_run(job: Any, request: Any) -> Any:
        raise AssertionError("the new code must not run the old job")

    simulate(story)


# --- protocols ---


class Older:
    """An agent of an older release: it tells its protocol, and does not know newer orders."""

    def __init__(self, agent: service.Service, protocol: int, unknown: tuple[str, ...] = ()) -> None:
        self.agent, self.protocol = agent, protocol
        for method in unknown:
            agent._handlers.pop(method, None)

    async def handle(self, call: Call, report: Any) -> Any:
        # 0.1.0 knows no such field, and ignores it.
        answer = await self.agent.handle(call.model_copy(update={"protocol": PROTOCOL}), report)
        if call.method == "hello":
            answer = {key: value for key, value in answer.items() if key != "protocol"}
            if self.protocol != 1:
                answer["protocol"] = self.protocol
        return answer


async def with_old_agent(box: Box, name: str, protocol: int) -> None:
    box.protocols[name] = protocol
    box.transport.agents[box.nodes[name]] = Older(box.agents[name].service, protocol, ("node.look", "node.logs", "node.remains"))
    box.master.agents.forget(box.nodes[name])
    await box.settle_reports()


def test_an_agent_one_version_behind_works() -> None:
    async def story() -> None:
        box = await Box.make()
        await with_old_agent(box, "node2", PROTOCOL - 1)
        await box.add_pool()
        await running(box, node="node2")
        await box.do("instance.migrate", "web1", node="node1")
        await box.do("instance.migrate", "web1", node="node2")
        assert [f.about for f in await box.master.verify() if f.what == "agent is one version behind"] == ["node2"]
        # It does not know the questions about itself, and that is said.
        looked = [f for f in await box.master.doctor() if f["node"] == "node2"]
        assert [(f["level"], f["about"], f["what"]) for f in looked] == [("warning", "agent", "it was not looked at")]
        with pytest.raises(NotFound, match="does not know the order"):
            await box.master.logs(box.nodes["node2"])
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize("distance", [-2, 2])
def test_an_agent_two_versions_away_is_refused_and_said_so(distance: int) -> None:
    async def story() -> None:
        box = await Box.make()
        await box.add_pool()
        await running(box, node="node1")
        await with_old_agent(box, "node2", PROTOCOL + distance)
        with pytest.raises(NodeUnavailable, match="more than one version away"):
            await box.do("instance.migrate", "web1", node="node2")
        with pytest.raises(VersionMismatch, match=r"node2 has version .* more than one step apart") as refused:
            await box.master.agents.ask(box.nodes["node2"], "guest.list")
        assert "upgrade" in refused.value.hint
        # Without a wish, it is not chosen.
        await box.do("instance.migrate", "web1")
        assert box.world.running(box.master.state.store.find(Instance, "web1").id) == ["node3"]
        found = [f for f in await box.master.verify() if f.about == "node2"]
        assert [f.severity for f in found if "version" in f.what] == ["error"]
        await box.close()

    simulate(story)


def test_an_agent_refuses_a_master_two_versions_away() -> None:
    async def story() -> None:
        box = await Box.make()
        call = Call(term=99, protocol=PROTOCOL + 2, method="guest.list")
        with pytest.raises(VersionMismatch, match="protocol") as refused:
            await box.agents["node1"].service.handle(call, lambda progress: None)
        assert "upgrade this agent" in refused.value.hint
        await box.close()

    simulate(story)


def test_a_job_waits_for_an_agent_that_is_too_old_to_tell_what_it_does() -> None:
    """The master was upgraded too far ahead: what the agent's steps have become is asked once the agent is upgraded, too."""

    async def story() -> None:
        box = await Box.make()
        await box.add_pool()

        async def crash(box: Box, name: str) -> None:
            background(box.crash_master()).add_done_callback(lambda task: gone.set())
            await asyncio.Event().wait()

        gone = asyncio.Event()
        with Striker(box, "agent:volume.create:before", crash):
            number = (await box.submit("instance.add", name="new", disks=[{"size": GIB}], memory=GIB, node="node1")).job
            assert number is not None
            await gone.wait()
        for name in box.nodes:
            box.protocols[name] = PROTOCOL - 2
            box.transport.agents[box.nodes[name]] = Older(box.agents[name].service, PROTOCOL - 2)
        await box.boot_master()
        await asyncio.sleep(60)
        assert box.master.engine.job(number).state is JobState.RUNNING
        assert "more than one step apart" in box.master.engine.progress(number).text
        for name in box.nodes:
            await box.crash_agent(name)
            box.protocols.clear()
            await box.boot_agent(name)
        job = await finish(box, number)
        assert job.state is JobState.DONE
        await settle(box)
        check(box)
        await box.close()

    simulate(story)


@pytest.mark.parametrize(("skew", "severity"), [(0.5, None), (-60.0, "warning"), (3600.0, "error")])
def test_a_clock_that_differs_is_found(skew: float, severity: str | None) -> None:
    async def story() -> None:
        box = await Box.make()
        box.clock_skew["node3"] = skew
        await box.settle_reports()
        await asyncio.sleep(2)
        found = [f for f in await box.master.verify() if f.what == "clock differs"]
        assert [(f.about, f.severity) for f in found] == ([("node3", severity)] if severity else [])
        await box.close()

    simulate(story)
