"""Several transactions as few SQL statements.

Each call into SQLite gives up the interpreter, and gets it back only when the busy event loop lets go: the number of statements, not the
rows in them, decides how long a group of transactions takes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from atoll.model.errors import AtollError
from atoll.store.contract import Transaction
from atoll.store.rules import compare_failed

#: The revisions of the keys in a JSON list, of those that exist.
LOOK_UP = "SELECT key, rev FROM obj WHERE key IN (SELECT value FROM json_each(?))"
_DELETE = "DELETE FROM obj WHERE key IN (SELECT value FROM json_each(?))"
#: What SQLite says of values that it cannot store, as opposed to a disk that cannot.
BAD_DATA = (sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError, UnicodeError, OverflowError)
#: Rows of one statement: few different statements, so that they stay prepared.
_CHUNKS = (64, 16, 4, 1)


def _insert(table: str, rows: int, tail: str) -> str:
    return f"INSERT INTO {table} VALUES {', '.join(['(?, ?, ?)'] * rows)}{tail}"


_PUT = {rows: _insert("obj", rows, " ON CONFLICT (key) DO UPDATE SET rev = excluded.rev, body = excluded.body") for rows in _CHUNKS}
_LOG = {rows: _insert("log", rows, "") for rows in _CHUNKS}


class Batch:
    """A group of transactions after one another, from ``revision`` on."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self._put: dict[str, tuple[int, bytes]] = {}
        self._gone: set[str] = set()
        self._log: list[tuple[int, str, bytes | None]] = []

    @staticmethod
    def keys(transactions: Sequence[Transaction]) -> set[str] | None:
        """The keys whose revisions must be known; None when one cannot be asked for in JSON."""
        found: set[str] = set()
        for transaction in transactions:
            found.update(transaction.compare, transaction.delete)
        return None if any("\0" in key for key in found) else found

    def decide(self, transactions: Sequence[Transaction], known: dict[str, int]) -> list[int | AtollError]:
        """The answer to each. ``known``: the revisions of ``keys``; those after the group when this returns."""
        return [self._one(transaction, known) for transaction in transactions]

    def _one(self, transaction: Transaction, known: dict[str, int]) -> int | AtollError:
        for key, wanted in transaction.compare.items():
            if known[key] != wanted:
                return compare_failed(key, wanted, known[key])
        gone = [key for key in transaction.delete if known[key]]
        if not transaction.put and not gone:
            return self.revision
        self.revision += 1
        for key, body in transaction.put.items():
            self._put[key] = (self.revision, body)
            self._gone.discard(key)
            known[key] = self.revision
            self._log.append((self.revision, key, body))
        for key in gone:
            self._put.pop(key, None)
            self._gone.add(key)
            known[key] = 0
            self._log.append((self.revision, key, None))
        return self.revision

    def write(self, db: sqlite3.Connection) -> None:
        """Write what was decided. Errors: sqlite3.Error, and the other ``BAD_DATA``."""
        if self._gone:
            db.execute(_DELETE, (json.dumps(sorted(self._gone)),))
        _many(db, _PUT, [(key, revision, body) for key, (revision, body) in self._put.items()])
        _many(db, _LOG, self._log)


def _many(db: sqlite3.Connection, statements: dict[int, str], rows: Sequence[tuple[object, object, object]]) -> None:
    at = 0
    for size in _CHUNKS:
        while len(rows) - at >= size:
            db.execute(statements[size], [value for row in rows[at : at + size] for value in row])
            at += size
