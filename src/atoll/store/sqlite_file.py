"""The database file of the SQLite store, and what is done with it in the store's one thread. Nothing here knows asyncio."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from atoll.model.errors import AtollError, StoreDamaged, StoreError, StoreFull, Unreachable
from atoll.store.contract import Compacted, Entry, Event, Transaction
from atoll.store.local import create_private
from atoll.store.position import Position
from atoll.store.rules import compare_failed
from atoll.store.sqlite_batch import BAD_DATA, LOOK_UP, Batch

SCHEMA = 1
#: Log rows are removed once so many revisions are too old, not one by one.
TRIM_EVERY = 256
#: How many keys' revisions are remembered.
RECENT = 20_000
#: Seconds to wait for another process that has the file locked.
LOCKED = 10.0

_TABLES = """
CREATE TABLE IF NOT EXISTS obj (key TEXT PRIMARY KEY, rev INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log (rev INTEGER NOT NULL, key TEXT NOT NULL, body BLOB, PRIMARY KEY (rev, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('rev', 0), ('compacted', 0);
"""
#: Tables of an older release: its number -> SQL that makes the next number's tables of them. (What objects look like: ``schema.py``.)
STEPS: dict[int, str] = {}


class Database:
    """One connection to the file, used by one thread. ``revision`` is that of the last commit."""

    def __init__(self, path: Path, keep_revisions: int) -> None:
        self.path = path
        self._keep = keep_revisions
        self.revision = 0
        self.compacted = 0
        #: COMMITs so far; less than the transactions when several share one.
        self.commits = 0
        self._connection: sqlite3.Connection | None = None
        self._broken = ""
        self._position = Position(path.with_name("position"))
        #: The revisions of keys that were written or compared lately; 0 = there is none. Saves looking them up.
        self._recent: dict[str, int] = {}

    # --- life ---

    def open(self) -> None:
        """Connect, check the file's integrity, make the tables. Errors: StoreDamaged; StoreError."""
        create_private(self.path)
        noted = self._position.open()
        try:
            if noted:
                # Before anything is written: what is left is kept as it is.
                self._refuse_older(noted)
            self._connect()
            bad = [row[0] for row in self._db.execute("PRAGMA quick_check(3)")]
            if bad != ["ok"]:
                raise StoreDamaged(f"{self.path} is damaged: {bad[0]}")
            self._bring_up()
            self._read_meta()
            self._position.note(self.revision)
        except sqlite3.DatabaseError as error:
            self.close()
            raise failure(f"cannot open {self.path}: {error}", error, self.path) from None
        except StoreError:
            self.close()
            raise

    def _refuse_older(self, noted: int) -> None:
        """Errors: StoreDamaged when the database lacks commits up to ``noted``; sqlite3.Error."""
        connection = _read_only(self.path)
        try:
            found = 0
            if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone():
                found = connection.execute("SELECT value FROM meta WHERE key = 'rev'").fetchone()[0]
        finally:
            connection.close()
        if found < noted:
            raise StoreDamaged(
                f"{self.path} lacks changes that were acknowledged: it ends with revision {found}, and revision {noted} was written at "
                f"{self._position.when()}; its log, {self.path.name}-wal, was removed, cut off or damaged, or this is an old copy"
            )

    def close(self) -> None:
        """Disconnect; the WAL is folded into the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._position.close()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(self._broken or f"{self.path} is closed")
        return self._connection

    def _connect(self) -> None:
        self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=LOCKED)
        mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(f"{self.path}: the file system does not allow a write-ahead log (journal mode {mode})")
        # FULL: each COMMIT waits for fsync. With less, a power cut loses what was acknowledged.
        self._db.execute("PRAGMA synchronous=FULL")

    def _bring_up(self) -> None:
        """Make the tables, or make the present ones of an older release's: all or nothing. Errors: StoreError for a newer release's."""
        found = SCHEMA
        if self._db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone():
            row = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
            found = row[0] if row else SCHEMA
        if found > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer Atoll (schema {found}, this one knows {SCHEMA})",
                hint="upgrade this master: docs/howto/upgrade.md",
            )
        steps = " ".join(STEPS[number] for number in range(found, SCHEMA))
        self._db.executescript(f"BEGIN IMMEDIATE; {steps or _TABLES} INSERT OR REPLACE INTO meta VALUES ('schema', {SCHEMA}); COMMIT;")

    def _read_meta(self) -> None:
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        self.revision, self.compacted = meta["rev"], meta["compacted"]

    # --- reading ---

    def get(self, key: str) -> Entry | None:
        row = self._db.execute("SELECT key, body, rev FROM obj WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def entries(self, prefix: str) -> tuple[list[Entry], int]:
        found = []
        # Keys with one prefix are neighbours in the index: stop at the first that has it not.
        for row in self._db.execute("SELECT key, body, rev FROM obj WHERE key >= ? ORDER BY key", (prefix,)):
            if not row[0].startswith(prefix):
                break
            found.append(Entry(*row))
        return found, self.revision

    def kinds(self) -> list[str]:
        """The first parts of the keys, from one jump in the index to the next."""
        found: set[str] = set()
        after = ""
        while row := self._db.execute("SELECT key FROM obj WHERE key >= ? ORDER BY key LIMIT 1", (after,)).fetchone():
            kind, slash, _ = row[0].partition("/")
            found.add(kind)
            after = kind + "0" if slash else row[0] + "\0"  # "0" is the character after "/"
        return sorted(found)

    def events(self, prefix: str, after: int, limit: int = 1000) -> tuple[list[list[Event]], int]:
        """The changes of at most ``limit`` revisions after ``after``, and the revision that they reach up to. Errors: Compacted."""
        if after < self.compacted:
            raise Compacted(f"changes up to revision {self.compacted} are no longer kept; asked for those after {after}")
        upto = min(self.revision, after + limit)
        batches: list[list[Event]] = []
        for key, body, revision in self._db.execute(
            "SELECT key, body, rev FROM log WHERE rev > ? AND rev <= ? ORDER BY rev, key", (after, upto)
        ):
            if key.startswith(prefix):
                if not batches or batches[-1][0].revision != revision:
                    batches.append([])
                batches[-1].append(Event(key, body, revision))
        return batches, max(upto, after)

    # --- writing ---

    def commit(self, transactions: Sequence[Transaction]) -> list[int | AtollError]:
        """All of them in one SQLite transaction, each whole or not at all; the new revision or the error of each.

        A failed COMMIT is StoreError when surely nothing was written (disk full), else Unreachable.
        """
        before = (self.revision, self.compacted)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            answers, seen = self._apply(transactions)
            if self.revision != before[0]:
                self._trim()
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'rev'", (self.revision,))
        except sqlite3.Error as error:
            self._forget(before)
            self._rollback()
            return [failure(f"nothing was written to {self.path}: {error}", error, self.path)] * len(transactions)
        try:
            self._db.execute("COMMIT")
            self.commits += 1
        except sqlite3.Error as error:
            self._forget(before)
            failed = _commit_error(self.path, error)
            self._rollback()
            if isinstance(failed, Unreachable):
                self._reopen()
            return [failed if isinstance(answer, int) else answer for answer in answers]
        if len(self._recent) > RECENT:
            self._recent.clear()
        self._recent.update(seen)
        if self.revision != before[0]:
            self._position.note(self.revision)
        return answers

    def _forget(self, before: tuple[int, int]) -> None:
        """What was to be written is not in the file, or nobody knows."""
        self.revision, self.compacted = before
        self._recent.clear()

    def _apply(self, transactions: Sequence[Transaction]) -> tuple[list[int | AtollError], dict[str, int]]:
        """The answers, and the revisions of the keys that were touched. sqlite3.Error when the whole group is lost."""
        batch = Batch(self.revision)
        wanted = batch.keys(transactions)
        if wanted is not None:
            known = {key: self._recent[key] for key in wanted if key in self._recent}
            missing = [key for key in wanted if key not in known]
            if missing:
                known.update(dict.fromkeys(missing, 0))
                known.update(self._db.execute(LOOK_UP, (json.dumps(missing),)).fetchall())
            answers = batch.decide(transactions, known)
            self._db.execute("SAVEPOINT all_of_them")
            try:
                batch.write(self._db)
                self._db.execute("RELEASE all_of_them")
                self.revision = batch.revision
                return answers, known
            except BAD_DATA:
                # Something is wrong with the data of one of them: one by one tells of which.
                self._db.execute("ROLLBACK TO all_of_them")
                self._db.execute("RELEASE all_of_them")
        self._recent.clear()
        return [self._try(transaction) for transaction in transactions], {}

    def _try(self, transaction: Transaction) -> int | AtollError:
        """Check and apply one under its savepoint. sqlite3.Error when the whole group is lost."""
        db, before = self._db, self.revision
        for key, wanted in transaction.compare.items():
            row = db.execute("SELECT rev FROM obj WHERE key = ?", (key,)).fetchone()
            found = row[0] if row else 0
            if found != wanted:
                return compare_failed(key, wanted, found)
        db.execute("SAVEPOINT one")
        try:
            revision = before + 1
            changed = [(revision, key, body) for key, body in transaction.put.items()]
            db.executemany("INSERT INTO obj VALUES (?2, ?1, ?3) ON CONFLICT (key) DO UPDATE SET rev = ?1, body = ?3", changed)
            gone = [(revision, key, None) for key in transaction.delete if db.execute("DELETE FROM obj WHERE key = ?", (key,)).rowcount]
            if changed or gone:
                db.executemany("INSERT INTO log VALUES (?, ?, ?)", [*changed, *gone])
                self.revision = revision
        except BAD_DATA as error:
            # Something is wrong with this one's data; the others of the group are not at fault.
            db.execute("ROLLBACK TO one")
            self.revision = before
            return StoreError(f"cannot store this: {error}", hint="the value is too large or not data")
        finally:
            if db.in_transaction:
                db.execute("RELEASE one")
        return self.revision

    def _trim(self) -> None:
        oldest = self.revision - self._keep
        if oldest - self.compacted >= min(TRIM_EVERY, self._keep):
            self._db.execute("DELETE FROM log WHERE rev <= ?", (oldest,))
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'compacted'", (oldest,))
            self.compacted = oldest

    def _rollback(self) -> None:
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error:
            self._reopen()

    def _reopen(self) -> None:
        """After an I/O error, ask the file what is true.

        Folding the WAL into the file writes again what an fsync may have failed to write, so that what is read from here on is
        durable. If that fails too, nothing can be trusted: the store refuses everything until it is opened anew.
        """
        known = self.revision
        try:
            self.close()
            self._connect()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._read_meta()
            if self.revision < known:
                raise StoreDamaged(f"it ends with revision {self.revision}, and revision {known} was acknowledged")
            self._position.open()
            self._position.note(self.revision)
        except (sqlite3.Error, StoreError) as error:
            self._connection = None
            self._position.close()
            self._broken = f"{self.path} failed and cannot be opened again: {error}"


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=LOCKED)


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _commit_error(path: Path, error: sqlite3.Error) -> AtollError:
    # The commit mark is the last thing written to the WAL: with no room for it there is no commit. After any other error it may be there.
    if _code(error) == sqlite3.SQLITE_FULL:
        return failure(f"nothing was written to {path}: {error}", error, path)
    return Unreachable(f"whether the change was written to {path} is not known: {error}", hint="look at the disk: dmesg, smartctl")


def failure(text: str, error: sqlite3.Error, path: Path) -> StoreError:
    """What SQLite says, with what to do about it."""
    code = _code(error)
    if code == sqlite3.SQLITE_FULL:
        return StoreFull(text, hint=f"make room: df {path.parent}")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreDamaged(text)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(text, hint=f"another program has it open; it is tried again. Which one: fuser -v {path}")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StoreError(text, hint=f"look at the disk: dmesg, smartctl, df -h -i {path.parent}")
    return StoreError(text)


def snapshot(source: Path) -> tuple[list[Entry], int]:
    """All entries and the revision of the database at ``source``, as of one moment. Writers are not held up. Errors: StoreError."""
    try:
        connection = _read_only(source)
        try:
            connection.execute("BEGIN")
            revision = connection.execute("SELECT value FROM meta WHERE key = 'rev'").fetchone()[0]
            return [Entry(*row) for row in connection.execute("SELECT key, body, rev FROM obj ORDER BY key")], int(revision)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreError(f"cannot read {source}: {error}", hint="restore a backup: atoll cluster restore FILE") from None


def backup(source: Path, target: Path) -> None:
    """A consistent copy of the database at ``source`` as one file with mode 0600, durable. Writers are not held up. Errors: StoreError."""
    partial = target.with_name(target.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        create_private(partial)
        origin, copy = sqlite3.connect(source, timeout=10), sqlite3.connect(partial)
        try:
            # All pages in one step: one read snapshot, which a writer cannot make begin again.
            origin.backup(copy, pages=-1)
            copy.execute("PRAGMA journal_mode=DELETE")
        finally:
            copy.close()
            origin.close()
        handle = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        partial.replace(target)
        create_private(target)
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"cannot back up the store to {target}: {error}", hint="choose a directory with room, on a local disk") from None
