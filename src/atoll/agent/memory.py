"""What an agent must never forget (PROTOCOLS 2): the highest term, refused generations, and what it did for which job.

SQLite with synchronous=FULL: what a method has returned from survives a power cut.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from atoll.model.errors import HostError, StaleTerm, StaleTurn

log = structlog.get_logger()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS number (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS word (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS refused (instance TEXT PRIMARY KEY, generation INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS turn (instance TEXT PRIMARY KEY, term INTEGER NOT NULL, turn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS step (job INTEGER, step TEXT, state TEXT NOT NULL, result TEXT, PRIMARY KEY (job, step));
"""
#: Without its memory a node does not know what it has promised: it must not simply begin with an empty one.
_FORGETFUL = "on that node, as docs/howto/node-returns.md says under: The agent's memory is damaged"


def open_database(path: Path | str) -> sqlite3.Connection:
    """Open or make the file (``:memory:`` for simulations). Errors: HostError, also when it is damaged."""
    try:
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = sqlite3.connect(path, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            bad = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
            if bad != ["ok"]:
                raise HostError(f"this node's memory {path} is damaged: {bad[0]}", hint=_FORGETFUL)
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise _trouble(f"this node's memory {path} cannot be opened", error) from None
    return database


def _trouble(text: str, error: sqlite3.Error) -> HostError:
    code = int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return HostError(f"{text}: {error}", hint=_FORGETFUL)
    return HostError(f"{text}: {error}", hint="on that node: df -h /var/lib/atoll; make room, or look at the disk: dmesg")


class Memory:
    """An agent's memory. Small enough that every call answers at once."""

    def __init__(self, database: sqlite3.Connection, owner: str = "") -> None:
        """``owner``: the id of the node that remembers, which no other cluster has; empty: nobody has said.

        Errors: HostError for another node's memory.
        """
        self._db = database
        self._check_owner(owner)
        numbers = dict(self._do("SELECT name, value FROM number").fetchall())
        self._term: int = numbers.get("term", 0)
        self._oldest: int = numbers.get("oldest_job", 0)
        self._master: str = dict(self._do("SELECT name, value FROM word").fetchall()).get("master", "")
        self._written = self._oldest
        rows = self._do("SELECT instance, term, turn FROM turn").fetchall()
        self._turns: dict[str, tuple[int, int]] = {row[0]: (int(row[1]), int(row[2])) for row in rows}
        #: Instances whose turns are to be written with the next step.
        self._turned: set[str] = set()

    def _check_owner(self, owner: str) -> None:
        words = dict(self._do("SELECT name, value FROM word").fetchall())
        if owner and words.get("owner", owner) != owner:
            raise HostError(
                f"the agent's memory here is that of node {words['owner']}; this node is {owner}, and what it has promised is not in it",
                hint="put this node's own state directory back; if it is lost: docs/howto/node-returns.md",
            )
        if owner and "owner" not in words:
            # That of release 0.1.0, or a new one.
            self._do("INSERT INTO word VALUES ('owner', ?)", (owner,))

    @property
    def term(self) -> int:
        """The highest term seen."""
        return self._term

    @property
    def oldest_job(self) -> int:
        """Orders of jobs with smaller numbers are late copies."""
        return self._oldest

    def see_term(self, term: int, master: str = "") -> None:
        """A master speaks. A term belongs to the first master (a node's id) that named it here: two candidates may choose the same number.

        Errors: StaleTerm when a newer one has spoken before, or another with the same term.
        """
        if term < self._term:
            raise StaleTerm(f"this master's term is {term}, but term {self._term} has begun")
        if term == self._term and master and self._master and master != self._master:
            raise StaleTerm(f"term {term} belongs to the master on {self._master}, not to the one on {master}")
        if term > self._term or (master and not self._master):
            with self._writing():
                self._db.execute("INSERT OR REPLACE INTO number VALUES ('term', ?)", (term,))
                self._db.execute("INSERT OR REPLACE INTO word VALUES ('master', ?)", (master,))
            self._term, self._master = term, master

    def see_oldest_job(self, number: int) -> None:
        """Jobs before this one have ended: refuse late copies of their orders from now on, and forget their steps.

        This is written with the next step that begins. Whoever loses it before that still knows the steps, and refuses or joins by them.
        """
        self._oldest = max(self._oldest, number)

    def see_turn(self, instance: str, term: int, turn: int) -> None:
        """A job speaks that has the instance for itself; from now on earlier ones are refused. Written with the step that it begins.

        Errors: StaleTurn when a later one has spoken before.
        """
        known = self._turns.get(instance, (0, 0))
        if (term, turn) < known:
            raise StaleTurn(f"a later job has worked on {instance} here since (turn {known[1]}, this order has {turn})")
        if (term, turn) > known:
            self._turns[instance] = (term, turn)
            self._turned.add(instance)

    def refused(self, instance: str) -> int:
        """The highest generation of the instance that this node promised to refuse; 0 = none."""
        row = self._do("SELECT generation FROM refused WHERE instance = ?", (instance,)).fetchone()
        return int(row[0]) if row else 0

    def all_refused(self) -> dict[str, int]:
        """Instance -> the highest generation that this node promised to refuse."""
        return {row[0]: int(row[1]) for row in self._do("SELECT instance, generation FROM refused")}

    def highest_job(self) -> int:
        """The highest job number that this node has heard of; 0 = none."""
        row = self._do("SELECT max(job) FROM step").fetchone()
        return max(int(row[0] or 0), self._oldest)

    def refuse(self, instance: str, generation: int) -> None:
        """Promise to refuse this generation of the instance and all before it."""
        if generation > self.refused(instance):
            self._do("INSERT OR REPLACE INTO refused VALUES (?, ?)", (instance, generation))

    def step(self, job: int, step: str) -> tuple[str, Any] | None:
        """(``running`` | ``done`` | ``undoing`` | ``undone``, result), or None if it is not known."""
        row = self._do("SELECT state, result FROM step WHERE job = ? AND step = ?", (job, step)).fetchone()
        return (row[0], json.loads(row[1]) if row[1] else None) if row else None

    def set_step(self, job: int, step: str, state: str, result: Any = None) -> None:
        """Remember how far a step is."""
        self._do("INSERT OR REPLACE INTO step VALUES (?, ?, ?, ?)", (job, step, state, json.dumps(result)))

    def begin(self, job: int, step: str, state: str = "running") -> None:
        """Remember that a step runs, which jobs have ended and whose turn it is, with one write to the disk."""
        if self._oldest == self._written and not self._turned:
            self.set_step(job, step, state)
            return
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO number VALUES ('oldest_job', ?)", (self._oldest,))
            self._db.execute("DELETE FROM step WHERE job < ?", (self._oldest,))
            turns = [(instance, *self._turns[instance]) for instance in self._turned]
            self._db.executemany("INSERT OR REPLACE INTO turn VALUES (?, ?, ?)", turns)
            self.set_step(job, step, state)
        self._written = self._oldest
        self._turned.clear()

    def drop_step(self, job: int, step: str) -> None:
        """The step failed without effect: a repeat may try again. One that stays known as running is tried again just so."""
        try:
            self._do("DELETE FROM step WHERE job = ? AND step = ? AND state = 'running'", (job, step))
        except HostError as error:
            log.warning("a step that failed stays in the memory", job=job, step=step, error=error.message)

    def _do(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Errors: HostError; nothing was written then, or nobody may count on it."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise _trouble("this node cannot remember", error) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is done inside is written as one. Errors: HostError."""
        self._do("BEGIN IMMEDIATE")
        try:
            yield
            self._do("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise _trouble("this node cannot remember", error) from None
            raise

    def close(self) -> None:
        """Close the database."""
        self._db.close()
