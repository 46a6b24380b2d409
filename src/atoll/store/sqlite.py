"""The store of a single master: one SQLite file, one thread that does all I/O, many transactions in one fsync."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from atoll.model.errors import AtollError, DeadlineExceeded, StoreError
from atoll.store.contract import Entry, Event, Transaction
from atoll.store.local import file_system_type, lock_directory, prepare_directory
from atoll.store.memory import KEEP_REVISIONS
from atoll.store.rules import check_transaction
from atoll.store.sqlite_file import Database, backup, failure, snapshot

T = TypeVar("T")
#: Seconds to wait for the disk; a disk that takes longer hangs.
DEADLINE = 30.0
#: The most transactions that share one fsync.
GROUP = 512


@dataclass(slots=True)
class _Order:
    """Work for the thread: a transaction, or a function to call."""

    future: asyncio.Future[Any]
    transaction: Transaction | None = None
    call: Callable[[], Any] | None = None


class SqliteStore:
    """A ``Store`` in ``<directory>/atoll.db``. Transactions that wait while one is written are committed together."""

    def __init__(self, directory: Path, keep_revisions: int = KEEP_REVISIONS) -> None:
        """Use ``open``."""
        self.directory = directory
        self._file = Database(directory / "atoll.db", keep_revisions)
        self._queue: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._refuse = ""
        self._lock = -1
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)

    @classmethod
    async def open(
        cls, directory: Path, *, statfs: Callable[[Path], int] = file_system_type, keep_revisions: int = KEEP_REVISIONS
    ) -> SqliteStore:
        """Open or make the store.

        Errors: StoreLocked when another process has it; StoreDamaged; StoreFull; StoreError for a network file system.
        """
        prepare_directory(directory, statfs)
        store = cls(directory, keep_revisions)
        store._lock = lock_directory(directory)
        store._thread.start()
        try:
            await store._call(store._file.open)
        except BaseException:
            await store.close()
            raise
        return store

    @property
    def commits(self) -> int:
        """COMMITs (each one fsync) since the store was opened."""
        return self._file.commits

    async def get(self, key: str) -> Entry | None:
        return await self._call(lambda: self._file.get(key))

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        return await self._call(lambda: self._file.entries(prefix))

    async def kinds(self) -> Sequence[str]:
        return await self._call(self._file.kinds)

    async def transact(self, transaction: Transaction) -> int:
        check_transaction(transaction)
        revision: int = await self._wait(_Order(self._loop.create_future(), transaction=transaction))
        return revision

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Sequence[Event]]:
        while True:
            # Taken before reading: a commit after the read sets this very event.
            changed, start = self._changed, after
            batches, after = await self._call(functools.partial(self._file.events, prefix, start))
            for batch in batches:
                yield batch
            if after == start:
                await changed.wait()

    async def snapshot(self) -> tuple[Sequence[Entry], int]:
        """All entries and the store's revision at that moment, read beside running transactions. Errors: StoreError."""
        self._check()
        return await asyncio.to_thread(snapshot, self._file.path)

    async def backup(self, path: Path) -> None:
        """Write a consistent copy to ``path`` (0600, durable), beside running transactions. Errors: StoreError."""
        self._check()
        await asyncio.to_thread(backup, self._file.path, path)

    async def close(self) -> None:
        if self._refuse:
            return
        self._refuse = f"the store in {self.directory} is closed"
        self._changed.set()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, DEADLINE)
        if self._thread.is_alive():
            # The lock stays: the thread may still write. It goes with the process.
            raise DeadlineExceeded(f"the disk of {self.directory} did not answer within {DEADLINE:g} s; the store could not be closed")
        os.close(self._lock)

    # --- the loop's side ---

    async def _call(self, call: Callable[[], T]) -> T:
        answer: T = await self._wait(_Order(self._loop.create_future(), call=call))
        return answer

    async def _wait(self, order: _Order) -> Any:
        self._check()
        self._queue.put(order)
        try:
            async with asyncio.timeout(DEADLINE):
                return await order.future
        except TimeoutError:
            raise DeadlineExceeded(
                f"the disk of {self.directory} did not answer within {DEADLINE:g} s", hint="look at the disk: dmesg"
            ) from None

    def _check(self) -> None:
        if self._refuse:
            raise StoreError(self._refuse)

    def _answer(self, answers: Sequence[tuple[asyncio.Future[Any], Any]], changed: bool) -> None:
        for future, answer in answers:
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        if changed:
            self._changed.set()
            self._changed = asyncio.Event()

    # --- the thread's side ---

    def _work(self) -> None:
        try:
            while self._round():
                pass
        finally:
            self._file.close()
            self._refuse_rest()

    def _round(self) -> bool:
        """Take what has come in the meantime and do it; False when the store is to be closed."""
        orders: list[_Order] = []
        first = self._queue.get()
        more = first is not None
        while first is not None:
            orders.append(first)
            if len(orders) == GROUP:
                break
            try:
                first = self._queue.get_nowait()
                more = first is not None
            except queue.Empty:
                break
        before = self._file.revision
        writes = [(order, order.transaction) for order in orders if order.transaction is not None]
        try:
            answers = self._file.commit([transaction for _, transaction in writes]) if writes else []
        except StoreError as error:
            answers = [error] * len(writes)
        done: list[tuple[asyncio.Future[Any], Any]] = [(order.future, answer) for (order, _), answer in zip(writes, answers, strict=True)]
        # Reads come after the group's commit: they may see more than was acknowledged before them, never less.
        for order in orders:
            if order.call is not None:
                try:
                    done.append((order.future, order.call()))
                except (AtollError, UnicodeError) as error:
                    done.append((order.future, error))
                except sqlite3.Error as error:
                    done.append((order.future, failure(f"cannot read {self._file.path}: {error}", error, self._file.path)))
        self._tell(done, self._file.revision != before)
        return more

    def _refuse_rest(self) -> None:
        self._refuse = self._refuse or f"the store in {self.directory} has stopped"
        rest: list[tuple[asyncio.Future[Any], Any]] = []
        while True:
            try:
                order = self._queue.get_nowait()
            except queue.Empty:
                break
            if order is not None:
                rest.append((order.future, StoreError(self._refuse)))
        self._tell(rest, True)

    def _tell(self, answers: Sequence[tuple[asyncio.Future[Any], Any]], changed: bool) -> None:
        try:
            self._loop.call_soon_threadsafe(self._answer, answers, changed)
        except RuntimeError:
            # The loop is closed: nobody waits for answers any more.
            return
