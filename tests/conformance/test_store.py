"""One suite for every store: what the contract in store/contract.py promises."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.model.errors import InvalidInput, StoreError
from atoll.store.contract import Compacted, CompareFailed, Entry, Event, Store, Transaction
from atoll.store.memory import Durable, MemoryStore
from atoll.store.sqlite import SqliteStore

KEEP = 50


class MemoryKind:
    """Opens memory stores that share what is durable."""

    def __init__(self, directory: Path) -> None:
        self.durable = Durable()

    async def open(self) -> Store:
        return MemoryStore(durable=self.durable, keep_revisions=KEEP)


class SqliteKind:
    """Opens the same SQLite store again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "store"

    async def open(self) -> Store:
        return await SqliteStore.open(self.directory, keep_revisions=KEEP)


#: Add a store here and it must keep the whole contract.
STORES: dict[str, Callable[[Path], Any]] = {"memory": MemoryKind, "sqlite": SqliteKind}


@pytest.fixture(params=list(STORES))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return STORES[request.param](tmp_path)


@pytest.fixture
async def store(kind: Any) -> AsyncIterator[Store]:
    opened: Store = await kind.open()
    yield opened
    await opened.close()


def put(**pairs: str) -> Transaction:
    return Transaction(put={key.replace("_", "/"): value.encode() for key, value in pairs.items()})


async def take(store: Store, prefix: str, after: int, count: int) -> list[Sequence[Event]]:
    batches: list[Sequence[Event]] = []
    async with asyncio.timeout(20), aclosing(store.watch(prefix, after)) as changes:  # type: ignore[type-var]
        async for batch in changes:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


# --- reading and writing ---


async def test_a_missing_key_is_none_and_an_empty_store_has_revision_zero(store: Store) -> None:
    assert await store.get("a") is None
    entries, revision = await store.list("")
    assert (list(entries), revision) == ([], 0)


async def test_what_was_put_is_read_with_the_revision_of_its_transaction(store: Store) -> None:
    assert await store.transact(put(a="1", b="2")) == 1
    assert await store.transact(put(a="3")) == 2
    assert await store.get("a") == Entry("a", b"3", 2)
    assert await store.get("b") == Entry("b", b"2", 1)


async def test_values_are_any_bytes(store: Store) -> None:
    values = {"empty": b"", "zeros": b"\0\0", "high": bytes(range(256)), "large": os.urandom(1 << 20)}
    await store.transact(Transaction(put=values))
    for key, value in values.items():
        entry = await store.get(key)
        assert entry is not None
        assert entry.value == value


async def test_list_takes_the_prefix_literally_and_sorts_by_key(store: Store) -> None:
    keys = ["a", "a/1", "a/10", "a/2", "a0", "a%", "a_", "b/1", "a/\U0010ffff", "a/ü", "A/1"]
    await store.transact(Transaction(put={key: b"x" for key in keys}))
    for prefix in ["", "a", "a/", "a/1", "a%", "a_", "b", "z", "a/\U0010ffff", "A"]:
        entries, revision = await store.list(prefix)
        assert [entry.key for entry in entries] == sorted(key for key in keys if key.startswith(prefix)), prefix
        assert revision == 1


async def test_kinds_are_what_stands_before_the_first_slash(store: Store) -> None:
    assert list(await store.kinds()) == []
    keys = ("b/1", "b/2", "b/2/3", "a/1", "meta/term", "b.c/1", "b0/1", "meta", "meta!x/1")
    await store.transact(Transaction(put=dict.fromkeys(keys, b"x")))
    assert list(await store.kinds()) == sorted({"a", "b", "b.c", "b0", "meta", "meta!x"})


async def test_list_is_one_snapshot(store: Store) -> None:
    """A transaction moves one token between two keys: no list may see none or two of them."""
    await store.transact(put(t_0="x"))

    async def move() -> None:
        for turn in range(60):
            await store.transact(Transaction(put={f"t/{turn + 1}": b"x"}, delete=[f"t/{turn}"]))

    mover = asyncio.create_task(move())
    while not mover.done():
        entries, revision = await store.list("t/")
        assert len(entries) == 1
        assert entries[0].revision == revision
    await mover


async def test_delete(store: Store) -> None:
    await store.transact(put(a="1", b="2"))
    assert await store.transact(Transaction(delete=["a"])) == 2
    assert await store.get("a") is None
    assert [entry.key for entry in (await store.list(""))[0]] == ["b"]


async def test_a_transaction_that_changes_nothing_takes_no_revision(store: Store) -> None:
    await store.transact(put(a="1"))
    assert await store.transact(Transaction(delete=["missing"])) == 1
    assert await store.transact(Transaction(compare={"a": 1})) == 1
    assert (await store.list(""))[1] == 1
    assert await store.transact(put(a="1")) == 2, "the same value again is a change"


async def test_a_key_changed_twice_is_refused(store: Store) -> None:
    for bad in (Transaction(put={"a": b"1"}, delete=["a"]), Transaction(delete=["a", "a"]), Transaction(put={"": b"1"})):
        with pytest.raises(InvalidInput):
            await store.transact(bad)
    assert (await store.list(""))[1] == 0


# --- comparing ---


async def test_compare_refuses_another_revision(store: Store) -> None:
    await store.transact(put(a="1"))
    await store.transact(put(a="2"))
    with pytest.raises(CompareFailed) as failed:
        await store.transact(Transaction(put={"a": b"3"}, compare={"a": 1}))
    assert failed.value.details["key"] == "a"
    assert await store.transact(Transaction(put={"a": b"3"}, compare={"a": 2})) == 3


async def test_compare_with_zero_means_must_not_exist(store: Store) -> None:
    assert await store.transact(Transaction(put={"a": b"1"}, compare={"a": 0})) == 1
    with pytest.raises(CompareFailed):
        await store.transact(Transaction(put={"a": b"2"}, compare={"a": 0}))
    with pytest.raises(CompareFailed):
        await store.transact(Transaction(put={"b": b"2"}, compare={"b": 7}))
    await store.transact(Transaction(delete=["a"]))
    assert await store.transact(Transaction(put={"a": b"2"}, compare={"a": 0})) == 3


async def test_a_failed_compare_changes_nothing(store: Store) -> None:
    await store.transact(put(a="1", b="1"))
    with pytest.raises(CompareFailed):
        await store.transact(Transaction(put={"c": b"2", "a": b"2"}, delete=["b"], compare={"a": 1, "b": 9}))
    entries, revision = await store.list("")
    assert [(entry.key, entry.value) for entry in entries] == [("a", b"1"), ("b", b"1")]
    assert revision == 1


async def test_only_one_of_many_takes_a_free_key(store: Store) -> None:
    tries = [store.transact(Transaction(put={"k": str(n).encode()}, compare={"k": 0})) for n in range(20)]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(answer == 1 for answer in answers) == 1
    assert sum(isinstance(answer, CompareFailed) for answer in answers) == 19


async def test_concurrent_counters_lose_no_increment(store: Store) -> None:
    async def count() -> None:
        for _ in range(10):
            while True:
                entry = await store.get("n")
                value, revision = (int(entry.value), entry.revision) if entry else (0, 0)
                try:
                    await store.transact(Transaction(put={"n": str(value + 1).encode()}, compare={"n": revision}))
                    break
                except CompareFailed:
                    continue

    await asyncio.gather(*(count() for _ in range(20)))
    entry = await store.get("n")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"200", 200)


async def test_concurrent_transactions_get_revisions_without_gaps(store: Store) -> None:
    revisions = await asyncio.gather(*(store.transact(Transaction(put={f"k/{n}": b"x"})) for n in range(100)))
    assert sorted(revisions) == list(range(1, 101))
    for entry in (await store.list("k/"))[0]:
        assert revisions[int(entry.key[2:])] == entry.revision


async def test_a_cancelled_caller_does_not_disturb_others(store: Store) -> None:
    tasks = [asyncio.create_task(store.transact(Transaction(put={f"k/{n}": b"x"}))) for n in range(20)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [n for n, answer in enumerate(answers) if isinstance(answer, BaseException)] in ([3], [])
    assert await store.get("k/19") is not None


# --- watching ---


async def test_watch_gives_whole_revisions_in_order(store: Store) -> None:
    await store.transact(put(a_1="1", a_2="1", b="1"))
    await store.transact(put(b="2"))
    await store.transact(Transaction(put={"a/3": b"3"}, delete=["a/1"]))
    batches = await take(store, "a/", 0, 2)
    assert [{event.revision for event in batch} for batch in batches] == [{1}, {3}]
    assert sorted((event.key, event.value) for event in batches[0]) == [("a/1", b"1"), ("a/2", b"1")]
    assert {event.key: event.value for event in batches[1]} == {"a/1": None, "a/3": b"3"}


async def test_watch_gives_old_values_of_keys_that_changed_since(store: Store) -> None:
    for value in "123":
        await store.transact(put(a=value))
    assert [batch[0].value for batch in await take(store, "", 1, 2)] == [b"2", b"3"]


async def test_watch_waits_for_what_comes(store: Store) -> None:
    await store.transact(put(a="1"))
    watching = asyncio.create_task(take(store, "a", 1, 3))
    await asyncio.sleep(0.05)
    assert not watching.done()
    for value in "234":
        await store.transact(put(other=value))
        await store.transact(put(a=value))
    assert [(batch[0].value, batch[0].revision) for batch in await watching] == [(b"2", 3), (b"3", 5), (b"4", 7)]


async def test_many_watchers_miss_nothing_while_many_write(store: Store) -> None:
    watchers = [asyncio.create_task(take(store, "k/", 0, 40)) for _ in range(5)]
    await asyncio.gather(*(store.transact(Transaction(put={f"k/{n}": b"x", f"l/{n}": b"x"})) for n in range(40)))
    for seen in await asyncio.gather(*watchers):
        assert [batch[0].revision for batch in seen] == list(range(1, 41))
        assert all(len(batch) == 1 for batch in seen)


async def test_watch_from_a_revision_no_longer_kept_is_refused(store: Store) -> None:
    for n in range(3 * KEEP):
        await store.transact(put(a=str(n)))
    with pytest.raises(Compacted):
        await take(store, "", 1, 1)
    seen = await take(store, "", 2 * KEEP, KEEP)
    assert [batch[0].revision for batch in seen] == list(range(2 * KEEP + 1, 3 * KEEP + 1))


async def test_closing_ends_calls_and_watches(kind: Any) -> None:
    store = await kind.open()
    watching = asyncio.create_task(take(store, "", 0, 1))
    await asyncio.sleep(0.02)
    await store.close()
    calls: list[Awaitable[Any]] = [watching, store.get("a"), store.list(""), store.transact(put(a="1")), take(store, "", 0, 1)]
    for call in calls:
        with pytest.raises(StoreError):
            await asyncio.wait_for(call, 10)
    await store.close()


# --- durability ---


async def test_everything_is_there_after_opening_again(kind: Any) -> None:
    store = await kind.open()
    await store.transact(put(a="1", b="1"))
    await store.transact(Transaction(put={"a": b"2"}, delete=["b"]))
    await store.close()
    store = await kind.open()
    entries, revision = await store.list("")
    assert list(entries) == [Entry("a", b"2", 2)]
    assert revision == 2
    assert [{event.key: event.value for event in batch} for batch in await take(store, "", 0, 2)] == [
        {"a": b"1", "b": b"1"},
        {"a": b"2", "b": None},
    ]
    assert await store.transact(put(c="3")) == 3
    await store.close()


KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "b/1", "ü"])
STEP = st.tuples(
    st.dictionaries(KEYS, st.binary(max_size=3), max_size=3),
    st.lists(KEYS, max_size=2, unique=True),
    st.dictionaries(KEYS, st.one_of(st.none(), st.integers(0, 5)), max_size=2),
    st.booleans(),
)


@pytest.mark.parametrize("name", list(STORES))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEP, max_size=12))
def test_it_behaves_as_a_dict_with_a_counter(name: str, steps: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    async def play() -> None:
        kind = STORES[name](tmp_path_factory.mktemp("store"))
        store = await kind.open()
        model: dict[str, tuple[bytes, int]] = {}
        revision = 0
        history: list[dict[str, bytes | None]] = []
        for puts, deletes, wanted, reopen in steps:
            if reopen:
                await store.close()
                store = await kind.open()
            deletes = [key for key in deletes if key not in puts]
            # None: the revision that the key really has.
            compare = {key: model.get(key, (b"", 0))[1] if value is None else value for key, value in wanted.items()}
            holds = all(model.get(key, (b"", 0))[1] == value for key, value in compare.items())
            try:
                answer = await store.transact(Transaction(put=puts, delete=deletes, compare=compare))
                assert holds
            except CompareFailed:
                assert not holds
                continue
            changes: dict[str, bytes | None] = {**puts, **{key: None for key in deletes if key in model}}
            if changes:
                revision += 1
                history.append(changes)
            for key, value in changes.items():
                if value is None:
                    del model[key]
                else:
                    model[key] = (value, revision)
            assert answer == revision
            for prefix in ("", "a", "a/"):
                entries, seen = await store.list(prefix)
                assert seen == revision
                assert [(e.key, e.value, e.revision) for e in entries] == [
                    (key, *model[key]) for key in sorted(model) if key.startswith(prefix)
                ]
        seen_changes = await take(store, "", 0, len(history)) if history else []
        assert [{event.key: event.value for event in batch} for batch in seen_changes] == history
        await store.close()

    asyncio.run(play())


# --- the memory store ---


async def test_memory_crash_refuses_but_keeps_what_was_committed() -> None:
    seen: list[Transaction] = []
    store = MemoryStore(seen.append)
    await store.transact(put(a="1"))
    late = asyncio.create_task(store.transact(put(a="2")))
    await asyncio.sleep(0)
    store.crash()
    with pytest.raises(StoreError):
        await late
    again = MemoryStore(durable=store.durable)
    entry = await again.get("a")
    assert entry is not None
    assert entry.value == seen[-1].put["a"]
    with pytest.raises(StoreError):
        await store.get("a")
