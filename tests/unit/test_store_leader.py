"""The leader's view of the store: terms, memory that follows what is durable, and lost answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model.errors import InvalidInput, NotFound, NotLeader, StoreError, Unreachable
from atoll.model.objects import Job, JobState, Node, Step, Stored, Volume
from atoll.runtime.clock import VirtualLoop
from atoll.store.cache import PATIENCE, LeaderStore
from atoll.store.contract import CompareFailed, Transaction
from atoll.store.kinds import WHOLE, Shelf
from atoll.store.memory import MemoryStore
from atoll.store.sqlite import SqliteStore


def volume(number: int, name: str = "", **fields: Any) -> Volume:
    return Volume(id=f"vol-{number:017x}", name=name or f"v{number}", pool="p", size=1, **fields)


class LossyStore(MemoryStore):
    """Loses the answers of transactions: ``lose`` says how many, ``lands`` what becomes of the transaction itself."""

    lose = 0
    silent = False
    lands: Callable[[Transaction], Awaitable[Any]] | None = None

    async def get(self, key: str) -> Any:
        if self.silent:
            raise Unreachable("no answer")
        return await super().get(key)

    async def transact(self, transaction: Transaction) -> int:
        if self.silent:
            raise Unreachable("no answer")
        if not self.lose:
            return await super().transact(transaction)
        self.lose -= 1
        if self.lands is not None:
            await self.lands(transaction)
        raise Unreachable("no answer")


async def test_each_opening_is_a_new_term_with_the_same_objects() -> None:
    store = MemoryStore()
    first = await LeaderStore.open(store)
    step = Step(id="0000000001/0000", key="k", what="read", result={"a": [1, None]})
    await first.write(put=[volume(1), volume(2), job(1, JobState.RUNNING), step])
    second = await LeaderStore.open(store)
    assert (first.term, second.term) == (1, 2)
    for cls in (Volume, Step):
        assert second.all(cls) == first.all(cls) != []
    assert second.revision_of(volume(1)) == first.revision_of(volume(1)) == 2


async def test_finding() -> None:
    leader = await LeaderStore.open(MemoryStore())
    await leader.write(put=[volume(2, "b"), volume(1, "a"), volume(3, "c")])
    assert [item.name for item in leader.all(Volume)] == ["a", "b", "c"]
    assert leader.get(Volume, volume(2).id) == volume(2, "b")
    assert leader.by_name(Volume, "b") == leader.find(Volume, "b") == leader.find(Volume, volume(2).id) == volume(2, "b")
    assert leader.get(Volume, "b") is None
    assert leader.by_name(Volume, volume(2).id) is None
    assert leader.get(Node, volume(2).id) is None
    for call in (leader.find, leader.require):
        with pytest.raises(NotFound, match="no volume 'x'"):
            call(Volume, "x")


async def test_names_follow_renames_and_removals() -> None:
    leader = await LeaderStore.open(MemoryStore())
    await leader.write(put=[volume(1, "a")])
    await leader.write(put=[volume(1, "b")])
    assert leader.by_name(Volume, "a") is None
    assert leader.by_name(Volume, "b") == volume(1, "b")
    await leader.write(delete=[volume(1, "b")])
    assert leader.by_name(Volume, "b") is None
    assert leader.all(Volume) == []
    assert leader.revision_of(volume(1)) == 0


async def test_prefix_gives_the_steps_of_one_job_in_order() -> None:
    leader = await LeaderStore.open(MemoryStore())
    steps = [Step(id=f"{job:010d}/{index:04d}", key=str(index), what="read") for job in (1, 2, 12) for index in range(12)]
    await leader.write(put=reversed(steps))
    assert leader.prefix(Step, "0000000002/") == steps[12:24]
    assert leader.prefix(Step, "0000000003/") == []


def job(number: int, state: JobState = JobState.DONE) -> Job:
    return Job(id=f"{number:010d}", operation="volume.create", request={"name": f"v{number}"}, state=state, summary="make it")


def journal(number: int, steps: int = 3) -> list[Step]:
    return [Step(id=f"{number:010d}/{index:04d}", key=str(index), what="read", result={"n": index}) for index in range(steps)]


async def test_jobs_that_have_ended_read_the_same_packed_and_after_opening_again() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    jobs = [job(number, JobState.RUNNING if number % 10 == 0 else JobState.DONE) for number in range(1, 3 * WHOLE)]
    for item in jobs:
        await leader.write(put=[item])
    packed = sum(isinstance(item, bytes) for item in leader._shelf(Job)._objects.values())
    assert packed == sum(item.over for item in jobs) - WHOLE
    for found in (leader, await LeaderStore.open(store)):
        assert found.all(Job) == jobs
        assert [found.get(Job, item.id) for item in jobs] == jobs
        assert found.active(Job) == [item for item in jobs if not item.over]
        assert found.ids(Job) == [item.id for item in jobs]
        assert found.prefix(Job, "0000000") == jobs
        assert found.states(Job) == Counter(item.state.value for item in jobs)
        assert found.revision_of(jobs[0]) == leader.revision_of(jobs[0])


async def test_a_journal_leaves_memory_when_its_job_has_ended_and_can_be_read_all_the_same() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    await leader.write(put=[job(1, JobState.RUNNING), *journal(1), job(2, JobState.NEEDS_ATTENTION), *journal(2)])
    assert leader.prefix(Step, "0000000001/") == await leader.journal(leader.require(Job, "0000000001")) == journal(1)
    last = journal(1, 4)[-1]
    await leader.write(put=[job(1), last])
    assert leader.prefix(Step, "0000000001/") == journal(1, 4), "who waits for it asks at once"
    for number in range(3, 3 + WHOLE):
        await leader.write(put=[job(number)])
    for found in (leader, await LeaderStore.open(store)):
        assert found.all(Step) == journal(2)
        assert await found.journal(found.require(Job, "0000000001")) == journal(1, 4)
        assert await found.journal(found.require(Job, "0000000002")) == journal(2)


async def test_a_job_is_forgotten_with_the_journal_that_is_not_in_memory() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    await leader.write(put=[job(1, JobState.RUNNING), *journal(1), job(2, JobState.RUNNING), *journal(2)])
    await leader.write(put=[job(1)])
    await leader.write(put=[job(2)])
    leader = await LeaderStore.open(store)
    await leader.forget(job(1))
    assert [entry.key for entry in (await store.list("steps/"))[0]] == [f"steps/{step.id}" for step in journal(2)]
    assert leader.all(Step) == []
    assert leader.all(Job) == [job(2)]


async def test_a_deposed_leader_cannot_write_and_knows_it() -> None:
    store = MemoryStore()
    old = await LeaderStore.open(store)
    await old.write(put=[volume(1)])
    new = await LeaderStore.open(store)
    for _ in range(2):
        with pytest.raises(NotLeader, match="term 2"):
            await old.write(put=[volume(2)])
    assert old.deposed
    assert old.deposed_event.is_set()
    assert old.all(Volume) == new.all(Volume) == [volume(1)]
    assert not new.deposed
    await new.write(put=[volume(2)])


async def test_of_two_who_take_a_term_at_once_only_one_leads() -> None:
    store = MemoryStore()
    answers = await asyncio.gather(*(LeaderStore.open(store) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(answer, LeaderStore) for answer in answers) == 1
    assert sum(isinstance(answer, NotLeader) for answer in answers) == 4


async def test_expect_and_absent() -> None:
    leader = await LeaderStore.open(MemoryStore())
    await leader.write(put=[volume(1)])
    with pytest.raises(CompareFailed, match="changed"):
        await leader.write(put=[volume(2)], expect=[volume(1, "other")])
    with pytest.raises(CompareFailed, match="changed"):
        await leader.write(put=[volume(2)], expect=[volume(9)])
    with pytest.raises(CompareFailed, match="exists"):
        await leader.write(put=[volume(2)], absent=[volume(1)])
    with pytest.raises(CompareFailed, match="deleted"):
        await leader.write(put=[volume(2)], delete=[volume(9)])
    assert leader.all(Volume) == [volume(1)]
    await leader.write(put=[volume(2)], expect=[volume(1)], absent=[volume(9)])
    # What is expected must also hold at the moment of the commit.
    change = asyncio.create_task(leader.write(put=[volume(1, "new")]))
    await asyncio.sleep(0)
    with pytest.raises(CompareFailed):
        await leader.write(put=[volume(3)], expect=[volume(1)])
    await change
    assert leader.get(Volume, volume(3).id) is None
    assert not leader.deposed


async def test_one_object_twice_in_one_write_is_refused() -> None:
    leader = await LeaderStore.open(MemoryStore())
    with pytest.raises(InvalidInput):
        await leader.write(put=[volume(1), volume(1, "b")])
    await leader.write(put=[volume(1)])
    with pytest.raises(InvalidInput):
        await leader.write(put=[volume(1)], delete=[volume(1)])


async def test_the_second_of_two_writes_of_one_object_is_refused() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    answers = await asyncio.gather(
        *(leader.write(put=[volume(1, name), volume(n + 2)]) for n, name in enumerate("abc")), return_exceptions=True
    )
    assert answers[0] is None
    assert [type(answer) for answer in answers[1:]] == [CompareFailed, CompareFailed]
    assert leader.all(Volume) == [volume(1, "a"), volume(2)]
    await leader.write(put=[volume(1, "d")])
    assert (await LeaderStore.open(store)).all(Volume) == [volume(1, "d"), volume(2)]


async def test_change_loses_no_update() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    await leader.write(put=[volume(1)])
    await asyncio.gather(
        *(leader.change(Volume, volume(1).id, lambda old: old.model_copy(update={"generation": old.generation + 1})) for _ in range(30))
    )
    assert (await LeaderStore.open(store)).require(Volume, volume(1).id).generation == 31


async def test_memory_changes_only_after_the_commit() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    seen: list[tuple[Stored | None, Stored | None]] = []
    leader.listeners.append(lambda before, after: seen.append((before, after)))
    write = asyncio.create_task(leader.write(put=[volume(1)]))
    for _ in range(2):
        await asyncio.sleep(0)
        assert leader.all(Volume) == []
        assert seen == []
    await write
    await leader.write(put=[volume(1, "b")])
    await leader.write(delete=[volume(1)])
    assert seen == [(None, volume(1)), (volume(1), volume(1, "b")), (volume(1, "b"), None)]


async def test_a_write_goes_on_when_its_caller_is_cancelled() -> None:
    leader = await LeaderStore.open(MemoryStore())
    write = asyncio.create_task(leader.write(put=[volume(1)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await leader.settle()
    assert leader.all(Volume) == [volume(1)]
    await leader.write(put=[volume(1, "b")])


async def test_memory_holds_what_a_later_leader_reads() -> None:
    store = MemoryStore()
    leader = await LeaderStore.open(store)
    await leader.write(put=[Job(id="0000000001", operation="x", result={"pair": (1, 2), 3: "three"})])
    assert leader.all(Job) == (await LeaderStore.open(store)).all(Job)
    with pytest.raises(StoreError, match="created"):
        await leader.write(put=[volume(1, created=float("nan"))])
    assert (await LeaderStore.open(store)).all(Volume) == []


@pytest.mark.parametrize(("key", "value"), [("comets/1", b"{}"), ("volumes/vol-1", b'{"id": "vol-1"}'), ("volumes/vol-1", b"\xff"),
                                            ("keys/a", b'{"id": "b", "job": 1, "digest": ""}')])  # fmt: skip
async def test_what_cannot_be_read_keeps_the_leader_from_leading(key: str, value: bytes) -> None:
    store = MemoryStore()
    await store.transact(Transaction(put={key: value}))
    with pytest.raises(StoreError, match=key):
        await LeaderStore.open(store)


# --- lost answers ---


async def test_a_lost_answer_of_a_write_that_landed() -> None:
    store = LossyStore()
    leader = await LeaderStore.open(store)
    await leader.write(put=[volume(1)])
    store.lands = lambda transaction: MemoryStore.transact(store, transaction)
    for change in ({"put": [volume(2)], "delete": [volume(1)]}, {"delete": [volume(2)]}, {"put": [volume(3)]}):
        before, store.lose = store.durable.revision, 1
        await leader.write(**change)
        assert store.durable.revision == before + 1, "it must not be done twice"
    assert leader.all(Volume) == [volume(3)]
    assert leader.revision_of(volume(3)) == store.durable.entries["volumes/" + volume(3).id].revision
    await leader.write(put=[volume(3, "x")])
    assert not leader.deposed


async def test_a_lost_write_is_repeated() -> None:
    store = LossyStore()
    leader = await LeaderStore.open(store)
    store.lose = 1
    await leader.write(put=[volume(1)])
    store.lose = 1
    await leader.write(delete=[volume(1)], put=[volume(2)])
    assert (await LeaderStore.open(store)).all(Volume) == leader.all(Volume) == [volume(2)]


async def test_a_lost_write_that_lands_late_is_done_once() -> None:
    store = LossyStore()
    leader = await LeaderStore.open(store)
    late: list[Transaction] = []

    async def keep(transaction: Transaction) -> None:
        late.append(transaction)

    original = store._commit

    def commit(transaction: Transaction) -> int:
        # The lost transaction arrives just before its repetition.
        if late:
            original(late.pop())
        return original(transaction)

    store.lose, store.lands, store._commit = 1, keep, commit  # type: ignore[method-assign]
    before = store.durable.revision
    await leader.write(put=[volume(1)])
    assert store.durable.revision == before + 1
    assert leader.all(Volume) == [volume(1)]
    await leader.write(put=[volume(1, "b")])


async def test_a_lost_write_of_a_leader_deposed_meanwhile() -> None:
    store = LossyStore()
    old = await LeaderStore.open(store)

    async def depose(_: Transaction) -> None:
        await LeaderStore.open(MemoryStore(durable=store.durable))

    store.lose, store.lands = 1, depose
    with pytest.raises(NotLeader):
        await old.write(put=[volume(1)])
    assert old.deposed
    assert (await LeaderStore.open(store)).all(Volume) == []


def test_a_store_that_stays_silent_makes_the_leader_step_down() -> None:
    async def play() -> None:
        store = LossyStore()
        leader = await LeaderStore.open(store)
        store.silent = True
        start = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable):
            await leader.write(put=[volume(1)])
        assert PATIENCE <= asyncio.get_running_loop().time() - start < 2 * PATIENCE
        assert leader.deposed_event.is_set()
        store.silent = False
        with pytest.raises(NotLeader):
            await leader.write(put=[volume(2)])

    loop = VirtualLoop()
    try:
        loop.run_until_complete(play())
    finally:
        loop.close()


async def test_a_store_that_fails_after_a_lost_answer_makes_the_leader_step_down() -> None:
    store = LossyStore()
    leader = await LeaderStore.open(store)

    async def die(_: Transaction) -> None:
        store.crash()

    store.lose, store.lands = 1, die
    with pytest.raises(Unreachable):
        await leader.write(put=[volume(1)])
    assert leader.deposed


async def test_a_plain_failure_changes_nothing_and_the_leader_leads_on() -> None:
    def refuse(transaction: Transaction) -> None:
        if "volumes/" + volume(1).id in transaction.put and store.durable.revision < 3:
            raise StoreError("disk full")

    store = MemoryStore()
    leader = await LeaderStore.open(store)
    store._commit, original = (lambda transaction: (refuse(transaction), original(transaction))[1]), store._commit  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="disk full"):
        await leader.write(put=[volume(1)])
    assert leader.all(Volume) == []
    assert not leader.deposed
    await leader.write(put=[volume(2)])
    await leader.write(put=[volume(3)])
    await leader.write(put=[volume(1)])


# --- on SQLite, and size ---


async def test_concurrent_writes_share_commits(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    leader = await LeaderStore.open(store)
    before = store.commits
    await asyncio.gather(*(leader.write(put=[volume(n)]) for n in range(300)))
    assert store.commits - before < 100
    assert (await LeaderStore.open(store)).all(Volume) == [volume(n) for n in range(300)]
    await store.close()


async def test_ten_thousand_objects_load_within_a_second() -> None:
    store = MemoryStore()
    bodies = {f"volumes/{volume(n).id}": volume(n).model_dump_json().encode() for n in range(10_000)}
    await store.transact(Transaction(put=bodies))
    start = time.process_time()
    leader = await LeaderStore.open(store)
    assert time.process_time() - start < 1
    assert len(leader.all(Volume)) == 10_000


IDS = st.sampled_from(["a", "a/1", "a/2", "b", "c/1"])


@given(st.lists(st.tuples(IDS, st.one_of(st.none(), st.sampled_from(["x", "y"]))), max_size=30))
def test_a_shelf_behaves_as_a_dict(changes: list[tuple[str, str | None]]) -> None:
    shelf = Shelf(Volume)
    model: dict[str, Volume] = {}
    for ident, name in changes:
        if name is None:
            assert shelf.remove(ident) == model.pop(ident, None)
        else:
            item = Volume(id=ident, name=name, pool="p", size=1)
            assert shelf.put(item) == model.get(ident)
            model[ident] = item
        ordered = [model[key] for key in sorted(model)]
        assert shelf.all() == ordered
        for prefix in ("", "a", "a/", "c", "d"):
            assert shelf.prefix(prefix) == [item for item in ordered if item.id.startswith(prefix)]
        for wanted in ("x", "y"):
            assert shelf.by_name(wanted) == next((item for item in ordered if item.name == wanted), None)
