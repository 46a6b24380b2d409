"""What a disk can do to the SQLite store: it fills up at any write, fails at any byte, damages any page, and loses the log."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atoll.model.errors import AtollError, StoreDamaged, StoreError, StoreFull, Unreachable
from atoll.store import sqlite_file
from atoll.store.contract import Transaction
from atoll.store.sqlite import SqliteStore

#: Of the file system ``small``.
DISK = "2m"
PAGE = 4096
#: ``make faults`` tries every place, ``make test`` one in eight.
EVERY = 1 if os.environ.get("ATOLL_FAULT_STEPS") else 8


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is folded into the file every 20 pages, not every 1000: so that a short run meets it, too."""
    connect = sqlite_file.Database._connect

    def often(self: sqlite_file.Database) -> None:
        connect(self)
        self._db.execute("PRAGMA wal_autocheckpoint=20")

    monkeypatch.setattr(sqlite_file.Database, "_connect", often)


class Run:
    """A run of transactions, and what of it must be in the store."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        #: Acknowledged, and what nobody knows the outcome of: (the keys, before, after).
        self.sure: dict[str, bytes] = {}
        self.unknown: list[Transaction] = []
        self.errors: list[AtollError] = []
        self.revision = 0
        self._random = random.Random(7)

    def _some(self, number: int) -> list[Transaction]:
        """One to four transactions that are asked for together. Each changes a pair: half of it would be seen."""
        found = []
        for part in range(1 + number % 4):
            body = self._random.randbytes(self._random.choice((10, 300, 3000, 9000)))
            pair = (f"p/{(number * 4 + part) % 23}", f"q/{(number * 4 + part) % 23}")
            if number % 5 == 4 and all(key in self.sure for key in pair):
                found.append(Transaction(delete=pair))
            else:
                found.append(Transaction(put=dict.fromkeys(pair, body)))
        return found

    async def go(self, groups: int) -> None:
        """Until something is refused."""
        for number in range(groups):
            wanted = self._some(number)
            answers = await asyncio.gather(*(self.store.transact(one) for one in wanted), return_exceptions=True)
            for one, answer in zip(wanted, answers, strict=True):
                if isinstance(answer, int):
                    # Nothing that was refused has taken a number.
                    assert answer == self.revision + 1
                    self.revision = answer
                    self.done(one)
                else:
                    assert isinstance(answer, AtollError), answer
                    self.errors.append(answer)
                    if isinstance(answer, Unreachable):
                        self.unknown.append(one)
            if self.errors:
                return

    def done(self, one: Transaction) -> None:
        self.sure.update(one.put)
        for key in one.delete:
            self.sure.pop(key, None)

    async def check(self, store: SqliteStore) -> None:
        """All that was acknowledged, nothing that was refused; what is unknown is there whole or not at all, in its order."""
        entries, revision = await store.list("")
        assert self.revision <= revision <= self.revision + len(self.unknown)
        self.revision = revision
        found = {entry.key: entry.value for entry in entries}
        assert all(found.get("q" + key[1:]) == value for key, value in found.items() if key.startswith("p/"))
        possible = [dict(self.sure)]
        for one in self.unknown:
            self.done(one)
            possible.append(dict(self.sure))
        assert found in possible
        self.sure, self.unknown = found, []


def fill(path: Path, pages: int) -> Path:
    """Leave so many pages free."""
    filler = path / "filler"
    with filler.open("wb") as file:
        while (free := os.statvfs(path).f_bavail) > pages:
            file.write(bytes(PAGE * (free - pages)))
            file.flush()
    return filler


@pytest.mark.root
async def test_a_disk_that_is_full_at_every_write(small: Path, checkpoints: None) -> None:
    full = 0
    for pages in range(0, 400, EVERY):
        store = await SqliteStore.open(small / "s")
        run = Run(store)
        run.revision = await store.transact(Transaction(put={"p/a": b"1", "q/a": b"1"}))
        run.sure = {"p/a": b"1", "q/a": b"1"}
        filler = fill(small, pages)
        await run.go(60)
        if not run.errors:
            break
        full += 1
        assert {type(error) for error in run.errors} == {StoreFull}
        assert all("df" in error.hint and "nothing was written" in error.message for error in run.errors)
        # It reads, and refuses again.
        await run.check(store)
        big = Transaction(put={"p/big": bytes(PAGE * (pages + 2)), "q/big": bytes(PAGE * (pages + 2))})
        with pytest.raises(StoreFull):
            await store.transact(big)
        await run.check(store)
        filler.unlink()
        # Without being opened anew it goes on.
        run.errors.clear()
        await run.go(8)
        assert not run.errors
        await store.close()
        store = await SqliteStore.open(small / "s")
        await run.check(store)
        await store.close()
        shutil.rmtree(small / "s")
    else:
        pytest.fail("the run never came to its end")
    await store.close()
    assert full >= 60 // EVERY


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail with EFBIG, those across it are short. SQLite takes that for an I/O error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_an_io_error_at_every_write(tmp_path: Path) -> None:
    ended = {"unknown": 0, "refused": 0, "broken": 0}
    for size in range(33_000, 700_000, 1_777 * EVERY):
        place = tmp_path / "s"
        store = await SqliteStore.open(place)
        run = Run(store)
        with largest_file(size):
            await run.go(6)
            ended["unknown"] += bool(run.unknown)
            ended["refused"] += any(isinstance(error, StoreError) for error in run.errors)
            if not run.errors:
                break
            answer = await asyncio.gather(store.get("p/1"), return_exceptions=True)
            if isinstance(answer[0], StoreError):
                assert "cannot be opened again" in answer[0].message
                ended["broken"] += 1
        await store.close()
        store = await SqliteStore.open(place)
        await run.check(store)
        run.store = store
        run.errors.clear()
        await run.go(8)
        assert not run.errors
        await store.close()
        shutil.rmtree(place)
    else:
        pytest.fail("the run never came to its end")
    await store.close()
    assert ended["unknown"] >= 5


# --- damage ---


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a store that was killed leaves behind: a file of many pages, and a log that has more than the file."""
    place = tmp_path_factory.mktemp("killed")

    async def live() -> None:
        store = await SqliteStore.open(place / "live")
        await asyncio.gather(*(store.transact(Transaction(put={f"k/{n:04d}": os.urandom(900)})) for n in range(1500)))
        await asyncio.to_thread(_checkpoint, place / "live" / "atoll.db")
        for n in range(12):
            await store.transact(Transaction(put={f"late/{n}": b"%d" % n}))
        shutil.copytree(place / "live", place / "left")
        await store.close()

    asyncio.run(live())
    (place / "left" / "atoll.db-shm").unlink()
    return place / "left"


@pytest.fixture
def crashed(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    shutil.copytree(killed, tmp_path / "crashed")
    return tmp_path / "crashed"


def _checkpoint(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def page_kinds(path: Path) -> dict[str, list[int]]:
    """b-tree pages by kind: numbers from 0. Not those of which the log has a newer form, which is the one that counts."""
    data, log = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()
    newer = {int.from_bytes(log[at : at + 4], "big") - 1 for at in range(32, len(log), PAGE + 24)}
    kinds: dict[str, list[int]] = {"interior": [], "leaf": []}
    for number in range(1, len(data) // PAGE):
        kind = {2: "interior", 5: "interior", 10: "leaf", 13: "leaf"}.get(data[number * PAGE])
        if kind and number not in newer:
            kinds[kind].append(number)
    return kinds


async def refused(place: Path) -> StoreDamaged:
    with pytest.raises(StoreDamaged) as found:
        await SqliteStore.open(place)
    assert "master-failover" in found.value.hint
    assert "restore" in found.value.hint
    return found.value


async def test_a_store_that_was_killed_has_everything(crashed: Path) -> None:
    store = await SqliteStore.open(crashed)
    assert len((await store.list("late/"))[0]) == 12
    await store.close()


@pytest.mark.parametrize("harm", ["random", "zeros"])
@pytest.mark.parametrize("kind", ["header", "schema", "interior", "leaf"])
async def test_a_damaged_page_of_each_kind_is_refused(crashed: Path, tmp_path: Path, kind: str, harm: str) -> None:
    kinds = page_kinds(crashed / "atoll.db")
    assert kinds["interior"]
    assert len(kinds["leaf"]) > 100
    some = {"header": [(0, 100)], "schema": [(100, PAGE - 100)]}.get(kind) or [(page * PAGE, PAGE) for page in kinds[kind]][:: 12 * EVERY]
    for start, length in some:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(crashed, tmp_path / "c")
        with open(tmp_path / "c" / "atoll.db", "r+b") as file:
            file.seek(start)
            file.write(os.urandom(length) if harm == "random" else bytes(length))
        await refused(tmp_path / "c")


async def test_a_page_that_goes_bad_under_a_running_store(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    # More than SQLite keeps in memory.
    await asyncio.gather(*(store.transact(Transaction(put={f"k/{n:04d}": os.urandom(3000)})) for n in range(1500)))
    await asyncio.to_thread(_checkpoint, tmp_path / "atoll.db")
    with open(tmp_path / "atoll.db", "r+b") as file:
        for page in page_kinds(tmp_path / "atoll.db")["leaf"][::2]:
            file.seek(page * PAGE)
            file.write(os.urandom(PAGE))
    errors = []
    for call in (store.list(""), *(store.transact(Transaction(put={f"k/{n:04d}": b"new"})) for n in range(0, 1500, 100))):
        try:
            await call
        except StoreError as error:
            errors.append(error)
    assert len(errors) > 5
    assert {type(error) for error in errors} == {StoreDamaged}
    await store.close()
    await refused(tmp_path)


LOG_HARMS = ("deleted", "emptied", *(f"cut {n}" for n in range(1, 12)), *(f"frame {n}" for n in range(12)), "header")


def harm_log(path: Path, harm: str) -> None:
    """The log has a header of 32 bytes, and frames of a page with 24 bytes before it. Each late transaction has the same number of them."""
    data = bytearray(path.read_bytes())
    frames = (len(data) - 32) // (PAGE + 24)
    share = frames // 12
    word, _, number = harm.partition(" ")
    if word == "deleted":
        path.unlink()
        return
    if word == "emptied":
        data.clear()
    elif word == "cut":
        del data[32 + int(number) * share * (PAGE + 24) - 700 :]
    elif word == "frame":
        data[32 + (int(number) * share + share - 1) * (PAGE + 24) + 24 + 1000] ^= 1
    else:
        data[17] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", LOG_HARMS)
async def test_a_log_that_was_lost_or_damaged_is_noticed(crashed: Path, harm: str) -> None:
    wal = crashed / "atoll.db-wal"
    harm_log(wal, harm)
    left = wal.read_bytes() if wal.exists() else None
    for _ in range(2):
        error = await refused(crashed)
        assert "revision 1512" in error.message
        # What is left stays as it is, for those who can read it.
        assert (wal.read_bytes() if left is not None else None) == left
    # It can still be read, for `atoll cluster restore`.
    entries, revision = sqlite_file.snapshot(crashed / "atoll.db")
    assert 1500 <= revision < 1512
    assert sum(entry.key.startswith("late/") for entry in entries) == revision - 1500


async def test_an_old_copy_in_its_place_and_a_missing_file_are_noticed(crashed: Path, tmp_path: Path) -> None:
    (crashed / "atoll.db-wal").unlink()
    old = crashed / "old.db"
    shutil.copy(crashed / "atoll.db", old)
    for content in (old.read_bytes(), b""):
        (crashed / "atoll.db").write_bytes(content)
        assert "old copy" in (await refused(crashed)).message


@pytest.mark.parametrize("note", [None, b"", b"00000000000000001400\n", bytes(21), b"not a number at all \n"])
async def test_a_note_that_is_old_or_unreadable_refuses_nothing(crashed: Path, note: bytes | None) -> None:
    """A power cut may leave any of these: the note is not synced."""
    if note is None:
        (crashed / "position").unlink()
    else:
        (crashed / "position").write_bytes(note)
    store = await SqliteStore.open(crashed)
    assert (await store.list("late/"))[1] == 1512
    await store.close()
    assert int((crashed / "position").read_bytes()) == 1512


async def test_a_program_that_locks_the_file_is_named_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "LOCKED", 0.3)
    store = await SqliteStore.open(tmp_path)
    await store.transact(Transaction(put={"a": b"1"}))
    other: Any = sqlite3.connect(tmp_path / "atoll.db", isolation_level=None)
    # Who only reads, as a backup does, holds up nobody.
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM obj").fetchone()
    assert await store.transact(Transaction(put={"a": b"2"})) == 2
    other.execute("COMMIT")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as found:
        await store.transact(Transaction(put={"a": b"3"}))
    assert "locked" in found.value.message
    assert "fuser" in found.value.hint
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"2"
    other.execute("ROLLBACK")
    assert await store.transact(Transaction(put={"a": b"3"})) == 3
    other.close()
    await store.close()
