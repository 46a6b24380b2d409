"""A store in memory, for simulations and tests: plain asyncio, no threads, so it works under virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from atoll.model.errors import StoreError
from atoll.store.contract import Compacted, Entry, Event, Transaction
from atoll.store.rules import check_transaction, compare_failed

#: How many revisions a watch can look back.
KEEP_REVISIONS = 10_000


@dataclass
class Durable:
    """What survives a crash of the process. Several MemoryStore objects may share one: an old master's and a new one's."""

    entries: dict[str, Entry] = field(default_factory=dict)
    revision: int = 0
    log: deque[tuple[int, tuple[Event, ...]]] = field(default_factory=deque)
    compacted: int = 0
    waiters: set[asyncio.Event] = field(default_factory=set)


class MemoryStore:
    """A ``Store``. ``durable`` is what a crash leaves: give it to the next MemoryStore. ``on_commit`` sees each transaction once it is
    durable and before it is acknowledged; what it raises reaches the caller, as an error after the commit would."""

    def __init__(
        self,
        on_commit: Callable[[Transaction], None] | None = None,
        durable: Durable | None = None,
        *,
        keep_revisions: int = KEEP_REVISIONS,
    ) -> None:
        self.durable = Durable() if durable is None else durable
        self._on_commit = on_commit
        self._keep = keep_revisions
        self._refuse = ""

    def crash(self) -> None:
        """The process that had this store is gone: every call that is under way or comes later raises StoreError."""
        self._stop("the store's process crashed")

    async def close(self) -> None:
        self._stop("the store is closed")

    async def get(self, key: str) -> Entry | None:
        await self._turn()
        return self.durable.entries.get(key)

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        await self._turn()
        found = [entry for key, entry in self.durable.entries.items() if key.startswith(prefix)]
        return sorted(found, key=lambda entry: entry.key), self.durable.revision

    async def kinds(self) -> Sequence[str]:
        await self._turn()
        return sorted({key.partition("/")[0] for key in self.durable.entries})

    async def transact(self, transaction: Transaction) -> int:
        check_transaction(transaction)
        await self._turn()
        revision = self._commit(transaction)
        # The answer is a second moment: a crash may come between the commit and its acknowledgement.
        await self._turn()
        return revision

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Sequence[Event]]:
        changed = asyncio.Event()
        self.durable.waiters.add(changed)
        try:
            while True:
                changed.clear()
                self._check()
                if after < self.durable.compacted:
                    raise Compacted(f"changes up to revision {self.durable.compacted} are no longer kept; asked for those after {after}")
                for revision, events in [pair for pair in self.durable.log if pair[0] > after]:
                    after = revision
                    wanted = tuple(event for event in events if event.key.startswith(prefix))
                    if wanted:
                        yield wanted
                        self._check()
                if after >= self.durable.revision:
                    await changed.wait()
        finally:
            self.durable.waiters.discard(changed)

    def _commit(self, transaction: Transaction) -> int:
        durable = self.durable
        for key, wanted in transaction.compare.items():
            entry = durable.entries.get(key)
            found = entry.revision if entry else 0
            if found != wanted:
                raise compare_failed(key, wanted, found)
        revision = durable.revision + 1
        events = [Event(key, bytes(value), revision) for key, value in transaction.put.items()]
        events += [Event(key, None, revision) for key in transaction.delete if key in durable.entries]
        if events:
            durable.revision = revision
            for event in events:
                if event.value is None:
                    del durable.entries[event.key]
                else:
                    durable.entries[event.key] = Entry(event.key, event.value, revision)
            durable.log.append((revision, tuple(events)))
            while len(durable.log) > self._keep:
                durable.compacted = durable.log.popleft()[0]
            for waiter in durable.waiters:
                waiter.set()
        if self._on_commit is not None:
            self._on_commit(transaction)
        return durable.revision

    async def _turn(self) -> None:
        self._check()
        await asyncio.sleep(0)
        self._check()

    def _check(self) -> None:
        if self._refuse:
            raise StoreError(self._refuse)

    def _stop(self, why: str) -> None:
        self._refuse = self._refuse or why
        for waiter in self.durable.waiters:
            waiter.set()
