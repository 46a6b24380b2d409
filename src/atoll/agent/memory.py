"""What an agent must never forget (PROTOCOLS 2): the highest term, refused generations, and what it did for which job.

SQLite with synchronous=FULL: what a method has returned from survives a power cut.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from atoll.model.errors import HostError, StaleTerm, StaleTurn

_SCHEMA = """
CREATE TABLE IF NOT EXISTS number (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS word (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS refused (instance TEXT PRIMARY KEY, generation INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS turn (instance TEXT PRIMARY KEY, term INTEGER NOT NULL, turn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS step (job INTEGER, step TEXT, state TEXT NOT NULL, result TEXT, PRIMARY KEY (job, step));
"""


def open_database(path: Path | str) -> sqlite3.Connection:
    """Open or make the file (``:memory:`` for simulations)."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.executescript(_SCHEMA)
    return database


class Memory:
    """An agent's memory. Small enough that every call answers at once."""

    def __init__(self, database: sqlite3.Connection, owner: str = "") -> None:
        """``owner``: the id of the node that remembers, which no other cluster has; empty: nobody has said.

        Errors: HostError for another node's memory.
        """
        self._db = database
        self._check_owner(owner)
        numbers = dict(database.execute("SELECT name, value FROM number").fetchall())
        self._term: int = numbers.get("term", 0)
        self._oldest: int = numbers.get("oldest_job", 0)
        self._master: str = dict(database.execute("SELECT name, value FROM word").fetchall()).get("master", "")
        self._written = self._oldest
        rows = database.execute("SELECT instance, term, turn FROM turn").fetchall()
        self._turns: dict[str, tuple[int, int]] = {row[0]: (int(row[1]), int(row[2])) for row in rows}
        #: Instances whose turns are to be written with the next step.
        self._turned: set[str] = set()

    def _check_owner(self, owner: str) -> None:
        words = dict(self._db.execute("SELECT name, value FROM word").fetchall())
        if owner and words.get("owner", owner) != owner:
            raise HostError(
                f"the agent's memory here is that of node {words['owner']}; this node is {owner}, and what it has promised is not in it",
                hint="put this node's own state directory back; if it is lost: docs/howto/node-returns.md",
            )
        if owner and "owner" not in words:
            # That of release 0.1.0, or a new one.
            self._db.execute("INSERT INTO word VALUES ('owner', ?)", (owner,))

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
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT OR REPLACE INTO number VALUES ('term', ?)", (term,))
            self._db.execute("INSERT OR REPLACE INTO word VALUES ('master', ?)", (master,))
            self._db.execute("COMMIT")
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
        row = self._db.execute("SELECT generation FROM refused WHERE instance = ?", (instance,)).fetchone()
        return int(row[0]) if row else 0

    def all_refused(self) -> dict[str, int]:
        """Instance -> the highest generation that this node promised to refuse."""
        return {row[0]: int(row[1]) for row in self._db.execute("SELECT instance, generation FROM refused")}

    def highest_job(self) -> int:
        """The highest job number that this node has heard of; 0 = none."""
        row = self._db.execute("SELECT max(job) FROM step").fetchone()
        return max(int(row[0] or 0), self._oldest)

    def refuse(self, instance: str, generation: int) -> None:
        """Promise to refuse this generation of the instance and all before it."""
        if generation > self.refused(instance):
            self._db.execute("INSERT OR REPLACE INTO refused VALUES (?, ?)", (instance, generation))

    def step(self, job: int, step: str) -> tuple[str, Any] | None:
        """(``running`` | ``done`` | ``undoing`` | ``undone``, result), or None if it is not known."""
        row = self._db.execute("SELECT state, result FROM step WHERE job = ? AND step = ?", (job, step)).fetchone()
        return (row[0], json.loads(row[1]) if row[1] else None) if row else None

    def set_step(self, job: int, step: str, state: str, result: Any = None) -> None:
        """Remember how far a step is."""
        self._db.execute("INSERT OR REPLACE INTO step VALUES (?, ?, ?, ?)", (job, step, state, json.dumps(result)))

    def begin(self, job: int, step: str, state: str = "running") -> None:
        """Remember that a step runs, which jobs have ended and whose turn it is, with one write to the disk."""
        if self._oldest == self._written and not self._turned:
            self.set_step(job, step, state)
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("INSERT OR REPLACE INTO number VALUES ('oldest_job', ?)", (self._oldest,))
            self._db.execute("DELETE FROM step WHERE job < ?", (self._oldest,))
            turns = [(instance, *self._turns[instance]) for instance in self._turned]
            self._db.executemany("INSERT OR REPLACE INTO turn VALUES (?, ?, ?)", turns)
            self.set_step(job, step, state)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._written = self._oldest
        self._turned.clear()

    def drop_step(self, job: int, step: str) -> None:
        """The step failed without effect: a repeat may try again."""
        self._db.execute("DELETE FROM step WHERE job = ? AND step = ? AND state = 'running'", (job, step))

    def close(self) -> None:
        """Close the database."""
        self._db.close()
