"""What only the SQLite store promises: durability against kill -9 and full disks, its lock, group commit."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.model.errors import StoreError, StoreLocked, Unreachable
from atoll.store.contract import CompareFailed, Transaction
from atoll.store.local import NETWORK_FILE_SYSTEMS, file_system_type
from atoll.store.sqlite import SqliteStore

#: Of the file system ``small``.
DISK = "1m"


def put(**pairs: str) -> Transaction:
    return Transaction(put={key: value.encode() for key, value in pairs.items()})


_WRITER = """
import asyncio, sys
from pathlib import Path
from atoll.store.contract import Transaction
from atoll.store.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    async def write(who):
        n = 0
        while True:
            n += 1
            await store.transact(Transaction(put={f"w/{who}": b"%d" % n, f"v/{who}": b"%d" % n}))
            sys.stdout.write(f"{who} {n}\\n")
            sys.stdout.flush()
    await asyncio.gather(*(write(who) for who in range(8)))

asyncio.run(main())
"""


def _child(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("lines", [1, 100, 1000])
async def test_sqlite_kill_9_loses_nothing_acknowledged(tmp_path: Path, lines: int) -> None:
    acknowledged: dict[str, int] = {}
    with _child(_WRITER, str(tmp_path / "s")) as writer:
        assert writer.stdout is not None
        for _ in range(lines):
            who, n = writer.stdout.readline().split()
            acknowledged[who] = int(n)
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:
            if line.endswith("\n"):
                acknowledged[line.split()[0]] = int(line.split()[1])
    store = await SqliteStore.open(tmp_path / "s")
    found = {entry.key: int(entry.value) for entry in (await store.list(""))[0]}
    for who, n in acknowledged.items():
        assert found[f"w/{who}"] >= n
    assert all(found[f"v/{key[2:]}"] == value for key, value in found.items() if key.startswith("w/"))
    await store.close()


async def test_sqlite_second_opener_is_told_who_has_it(tmp_path: Path) -> None:
    with _child(_WRITER, str(tmp_path / "s")) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            with pytest.raises(StoreLocked, match=str(writer.pid)):
                await SqliteStore.open(tmp_path / "s")
        finally:
            writer.kill()
    await (await SqliteStore.open(tmp_path / "s")).close()


async def test_sqlite_second_opener_in_the_same_process_is_refused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        await SqliteStore.open(tmp_path)
    await store.transact(put(a="1"))
    await store.close()


@pytest.mark.parametrize("magic", NETWORK_FILE_SYSTEMS)
async def test_sqlite_refuses_network_file_systems(tmp_path: Path, magic: int) -> None:
    with pytest.raises(StoreError, match="network file system"):
        await SqliteStore.open(tmp_path / "s", statfs=lambda _: magic)
    assert not (tmp_path / "s" / "atoll.db").exists()


def test_file_system_type_is_the_one_that_stat_tells(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc"), Path("/dev/shm")):
        told = subprocess.run(["stat", "-f", "-c", "%t", str(path)], capture_output=True, text=True, check=True).stdout
        assert file_system_type(path) == int(told, 16)


async def test_sqlite_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "s").mkdir(mode=0o755)
        store = await SqliteStore.open(tmp_path / "s")
        await store.transact(put(a="1"))
        await store.backup(tmp_path / "copy.db")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*(tmp_path / "s").iterdir(), tmp_path / "copy.db"]}
    await store.close()
    assert {"atoll.db", "atoll.db-wal", "atoll.db-shm", "lock", "copy.db"} <= set(modes)
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


async def test_sqlite_groups_commits_of_concurrent_transactions(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    for n in range(5):
        await store.transact(put(a=str(n)))
    assert store.commits == 5
    await asyncio.gather(*(store.transact(Transaction(put={f"k/{n}": b"x"})) for n in range(200)))
    assert store.commits < 5 + 50
    assert (await store.list(""))[1] == 205
    await store.close()


async def test_sqlite_a_bad_transaction_does_not_take_its_group_along(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await store.transact(put(a="1"))
    good = [store.transact(Transaction(put={f"k/{n}": b"x"})) for n in range(10)]
    stale = [store.transact(Transaction(put={f"s/{n}": b"x", "a": b"2"}, compare={"a": 77})) for n in range(10)]
    unfit = [store.transact(Transaction(put={"u/1": b"x", "\ud800": b"x"}))]
    answers = await asyncio.gather(*good, *stale, *unfit, return_exceptions=True)
    assert sorted(answer for answer in answers if isinstance(answer, int)) == list(range(2, 12))
    assert sum(isinstance(answer, CompareFailed) for answer in answers) == 10
    assert isinstance(answers[-1], StoreError)
    assert [entry.key for entry in (await store.list(""))[0]] == ["a", *sorted(f"k/{n}" for n in range(10))]
    await store.close()


async def test_sqlite_damage_is_found_at_open(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await asyncio.gather(*(store.transact(Transaction(put={f"k/{n}": os.urandom(500)})) for n in range(200)))
    await store.close()
    with open(tmp_path / "atoll.db", "r+b") as file:
        # A page of data that opening does not read by itself.
        file.seek(-2 * 4096, os.SEEK_END)
        file.write(os.urandom(4096))
    with pytest.raises(StoreError, match=r"damaged|malformed") as found:
        await SqliteStore.open(tmp_path)
    assert "restore" in found.value.hint
    (tmp_path / "atoll.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(StoreError) as found:
        await SqliteStore.open(tmp_path)
    assert "restore" in found.value.hint


async def test_sqlite_newer_schema_is_refused(tmp_path: Path) -> None:
    await (await SqliteStore.open(tmp_path)).close()
    with sqlite3.connect(tmp_path / "atoll.db") as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    db.close()
    with pytest.raises(StoreError, match="newer"):
        await SqliteStore.open(tmp_path)


async def test_sqlite_backup_opens_as_a_store(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "s")
    await store.transact(put(a="1"))

    async def write() -> None:
        for n in range(200):
            await store.transact(Transaction(put={"x": b"%d" % n, "y": b"%d" % n}))

    writing = asyncio.create_task(write())
    (tmp_path / "t").mkdir()
    await store.backup(tmp_path / "t" / "atoll.db")
    await writing
    await store.close()
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["atoll.db"]
    # Not in WAL mode: SQLite can read it on a read-only medium, where it cannot make a log.
    assert (tmp_path / "t" / "atoll.db").read_bytes()[18:20] == b"\1\1"
    copy = await SqliteStore.open(tmp_path / "t")
    entries, _ = await copy.list("")
    found = {entry.key: entry.value for entry in entries}
    assert found["a"] == b"1"
    assert found.get("x") == found.get("y")
    await copy.close()


@pytest.mark.root
async def test_sqlite_full_disk_refuses_whole_transactions_and_recovers(small: Path) -> None:
    store = await SqliteStore.open(small / "s")
    filler = small / "filler"
    await store.transact(put(before="1"))
    stored: dict[str, bytes] = {}
    refused = ""
    for n in range(60):
        pair = {f"p/{n}": os.urandom(20_000), f"q/{n}": os.urandom(20_000)}
        try:
            await store.transact(Transaction(put=pair))
            stored.update(pair)
        except StoreError as error:
            refused = error.hint
            break
    assert "df" in refused
    entries, revision = await store.list("")
    assert {entry.key: entry.value for entry in entries} == {"before": b"1", **stored}
    assert revision == 1 + len(stored) // 2
    await store.close()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
    store = await SqliteStore.open(small / "s")
    assert {entry.key: entry.value for entry in (await store.list(""))[0]} == {"before": b"1", **stored}
    # The same without closing: full, refused, room again, accepted.
    filler.write_bytes(b"x" * (os.statvfs(small).f_bavail * 4096 - 40_960))
    answers = await asyncio.gather(
        *(store.transact(Transaction(put={f"big/{n}": os.urandom(60_000)})) for n in range(10)), return_exceptions=True
    )
    assert any(isinstance(answer, StoreError) for answer in answers)
    done = [n for n, answer in enumerate(answers) if isinstance(answer, int)]
    filler.unlink()
    assert [entry.key for entry in (await store.list("big/"))[0]] == [f"big/{n}" for n in done]
    assert await store.transact(put(after="1")) == revision + len(done) + 1
    await store.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail with EFBIG, which SQLite takes for an I/O error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_sqlite_io_error_at_commit_is_an_unknown_outcome_and_the_store_goes_on(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    for n in range(100):
        await store.transact(put(a=str(n)))
    wal = tmp_path / "atoll.db-wal"
    # The file itself is far smaller than its log: what is done after the error has room.
    assert wal.stat().st_size > 2 * (tmp_path / "atoll.db").stat().st_size
    with largest_file(wal.stat().st_size):
        with pytest.raises(Unreachable):
            await store.transact(put(a="lost"))
        entry = await store.get("a")
        assert entry is not None
        assert (entry.value, entry.revision) in ((b"99", 100), (b"lost", 101))
        assert await store.transact(put(b="1")) == entry.revision + 1
    await store.close()
    store = await SqliteStore.open(tmp_path)
    assert [e.revision for e in (await store.list(""))[0]] == [entry.revision, entry.revision + 1]
    await store.close()


async def test_sqlite_that_cannot_be_opened_again_refuses_everything(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await store.transact(put(a="1"))
    with largest_file(1):
        with pytest.raises(Unreachable):
            await store.transact(put(a="2"))
        for call in (store.get("a"), store.list(""), store.transact(put(a="3"))):
            with pytest.raises(StoreError, match="cannot be opened again"):
                await call
    with pytest.raises(StoreError):
        await store.get("a")
    await store.close()
    store = await SqliteStore.open(tmp_path)
    entry = await store.get("a")
    assert entry is not None
    assert entry.value in (b"1", b"2")
    await store.close()
