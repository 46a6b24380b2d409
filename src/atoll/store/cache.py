"""What the leading master works with: every object in memory, every change a transaction that only the leader can commit.

Only the journals of jobs that have ended stay in the store, which has most of its objects there: nothing is decided by them any more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import structlog
from pydantic import ValidationError

from atoll.model.errors import UNKNOWN_OUTCOME, AtollError, InvalidInput, NotFound, NotLeader, StoreError
from atoll.model.objects import KINDS, Job, Step, Stored
from atoll.store import schema
from atoll.store.contract import CompareFailed, Store, Transaction
from atoll.store.kinds import WHOLE, Shelf

log = structlog.get_logger()
T = TypeVar("T", bound=Stored)
#: Seconds in which a write whose outcome is unknown must be cleared up; after that this master steps down.
PATIENCE = 10.0
#: Seconds between attempts to clear it up.
PAUSE = 0.2
_FIELDS: dict[type[Stored], set[str]] = {cls: set(cls.model_fields) for cls in KINDS}


@dataclass
class _Change:
    """A prepared write: the objects as they will be in memory, and the transaction."""

    transaction: Transaction
    put: dict[str, Stored] = field(default_factory=dict)
    delete: dict[str, Stored] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return {*self.put, *self.delete}


class LeaderStore:
    """The objects of one term. Reads come from memory and are never older than the last acknowledged write.

    ``term`` is this leader's. Once ``deposed`` is true (``deposed_event`` tells it) every write raises NotLeader, and memory may be
    old: open another one. ``listeners`` are called with (before, after) for each object changed, after the change is durable; they
    must not raise.
    """

    def __init__(self, store: Store, term_key: str, term: int, term_revision: int) -> None:
        """Use ``open``."""
        self.store, self.term = store, term
        self.deposed = False
        self.deposed_event = asyncio.Event()
        self.listeners: list[Callable[[Stored | None, Stored | None], None]] = []
        #: The revision of the newest transaction of this leader; what the store holds beyond it nobody has been told of.
        self.revision = term_revision
        #: How many transactions were told of later than newer ones: their answers had been lost at first.
        self.late = 0
        #: Whether agents have told of a newer master: then this store must never lead again.
        self.superseded = False
        self._why = ""
        self._term_key, self._term_revision = term_key, term_revision
        self._shelves: dict[type[Stored], Shelf[Any]] = {cls: Shelf(cls) for cls in KINDS}
        self._in_flight: dict[str, asyncio.Task[None]] = {}
        #: The newest jobs that have ended.
        self._closed: deque[str] = deque()

    @classmethod
    async def open(cls, store: Store, term_key: str = "meta/term", *, before_upgrade: schema.Before | None = None) -> LeaderStore:
        """Begin a new term and read everything. From then on no older leader can commit.

        A store of an older version is brought up to this one's layout; ``before_upgrade`` (old layout, new layout) may make a backup first.

        Errors: NotLeader when another took the term meanwhile; StoreError when an object cannot be read, or a newer version has written
        the store; those of the store.
        """
        await schema.layout_of(store)
        entry = await store.get(term_key)
        term = int(entry.value) + 1 if entry else 1
        compare = {term_key: entry.revision if entry else 0}
        put = {term_key: str(term).encode()}
        if entry is None:
            # A new store has the present layout from its first moment.
            put[schema.KEY] = str(schema.SCHEMA).encode()
            compare[schema.KEY] = 0
        try:
            revision = await store.transact(Transaction(put=put, compare=compare))
            upgraded = await schema.bring_up(store, {term_key: revision}, before_upgrade)
        except CompareFailed:
            raise NotLeader(f"another master took term {term} at the same moment") from None
        leader = cls(store, term_key, term, revision)
        leader.revision = max(revision, upgraded)
        known = {kind.kind: kind for kind in KINDS}
        for kind in await store.kinds():
            if kind != "meta" and kind not in known:
                entries, _ = await store.list(kind)
                raise StoreError(f"the store has {entries[0].key}, which this version does not know", hint="run the version that wrote it")
        # Nobody else can write any more: several reads see one state.
        for each in KINDS:
            if each is not Step:
                await leader._read(each, "")
        for job in leader._shelves[Job].active():
            await leader._read(Step, f"{job.id}/")
        return leader

    async def _read(self, cls: type[T], prefix: str) -> None:
        """Objects of the store into memory."""
        shelf = self._shelf(cls)
        entries, _ = await self.store.list(f"{cls.kind}/{prefix}")
        for entry in entries:
            shelf.put(_parse(cls, entry.key.partition("/")[2], entry.value), entry.revision)

    # --- reading ---

    def get(self, cls: type[T], ident: str) -> T | None:
        """The object with this id."""
        return self._shelf(cls).get(ident)

    def require(self, cls: type[T], ident: str) -> T:
        """The object with this id. Errors: NotFound."""
        found = self._shelf(cls).get(ident)
        if found is None:
            raise _not_found(cls, ident)
        return found

    def all(self, cls: type[T]) -> list[T]:
        """All objects of the class, by id."""
        return self._shelf(cls).all()

    def active(self, cls: type[T]) -> list[T]:
        """Those that are not over, by id: of jobs those that have not ended. ``all`` makes the others again for each call."""
        return self._shelf(cls).active()

    def ids(self, cls: type[Stored]) -> list[str]:
        """The ids of all, in order."""
        return self._shelf(cls).ids()

    def states(self, cls: type[Stored]) -> Mapping[str, int]:
        """How many objects are in which state."""
        return self._shelf(cls).states()

    def prefix(self, cls: type[T], prefix: str) -> list[T]:
        """The objects whose id starts with the prefix, by id. Steps of jobs that have ended are not in memory: see ``journal``."""
        return self._shelf(cls).prefix(prefix)

    async def journal(self, job: Job) -> list[Step]:
        """The steps of a job in their order; those of one that has ended are read from the store. Errors: those of the store."""
        found = self.prefix(Step, f"{job.id}/")
        if found or not job.over:
            return found
        entries, _ = await self.store.list(f"{Step.kind}/{job.id}/")
        return [_parse(Step, entry.key.partition("/")[2], entry.value) for entry in entries]

    def _let_go(self, job: Job) -> None:
        """Its journal may leave memory; those of the newest stay for those who wait for them."""
        self._closed.append(job.id)
        if len(self._closed) > WHOLE:
            self._shelf(Step).drop(f"{self._closed.popleft()}/")

    async def forget(self, job: Job, others: Iterable[Stored] = ()) -> None:
        """Delete a job that has ended with its steps, and ``others``. Errors: those of ``write``."""
        await self._read(Step, f"{job.id}/")
        try:
            await self.write(delete=[job, *self.prefix(Step, f"{job.id}/"), *others])
        finally:
            self._shelf(Step).drop(f"{job.id}/")

    def by_name(self, cls: type[T], name: str) -> T | None:
        """The object with this name."""
        return self._shelf(cls).by_name(name)

    def find(self, cls: type[T], name_or_id: str) -> T:
        """The object with this id or name. Errors: NotFound."""
        shelf = self._shelf(cls)
        found = shelf.get(name_or_id) or shelf.by_name(name_or_id)
        if found is None:
            raise _not_found(cls, name_or_id)
        return found

    def revision_of(self, item: Stored) -> int:
        """The revision of the transaction that wrote the object; 0 when there is none with its id."""
        return self._shelf(type(item)).revision(item.id)

    def _shelf(self, cls: type[T]) -> Shelf[T]:
        return cast(Shelf[T], self._shelves[cls])

    # --- writing ---

    async def write(
        self, put: Iterable[Stored] = (), delete: Iterable[Stored] = (), expect: Iterable[Stored] = (), absent: Iterable[Stored] = ()
    ) -> None:
        """One transaction: durable, and in memory, when it returns. It goes on to its end even if the caller is cancelled.

        ``expect``: objects that must still be what is given; ``absent``: objects whose ids must be free. Many writes may be under way
        together, but of each object only one. Errors: CompareFailed for the second of those, and when ``expect`` or ``absent`` do not
        hold; NotLeader when deposed; StoreError when nothing was written; Unreachable or DeadlineExceeded when that is not known
        (this master then steps down).
        """
        change = self._prepare(put, delete, expect, absent)
        if not change.keys:
            return
        task = asyncio.get_running_loop().create_task(self._commit(change))
        for key in change.keys:
            self._in_flight[key] = task
        # A task that nobody waits for any more may fail: look at its error, so that asyncio does not complain.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def change(self, cls: type[T], ident: str, function: Callable[[T], T]) -> T:
        """Replace the object by what ``function`` makes of its newest form; waits for writes of it that are under way.

        Errors: NotFound; those of ``write``.
        """
        await self.landed(cls, ident)
        before = self.require(cls, ident)
        after = function(before)
        if after != before:
            await self.write(put=[after])
        return after

    async def landed(self, cls: type[Stored], ident: str) -> None:
        """Wait until no write of this object is under way."""
        key = f"{cls.kind}/{ident}"
        while key in self._in_flight:
            await asyncio.wait({self._in_flight[key]})

    async def settle(self) -> None:
        """Wait until no write is under way."""
        while self._in_flight:
            await asyncio.wait(set(self._in_flight.values()))

    def _prepare(self, put: Iterable[Stored], delete: Iterable[Stored], expect: Iterable[Stored], absent: Iterable[Stored]) -> _Change:
        self._check()
        bodies: dict[str, bytes] = {}
        compare = {self._term_key: self._term_revision}
        change = _Change(Transaction())
        for item in put:
            key = self._claim(item, change)
            bodies[key] = item.model_dump_json().encode()
            # Memory keeps what a later leader will read, and nothing becomes durable that cannot be read.
            change.put[key] = _parse(type(item), item.id, bodies[key])
            compare[key] = self.revision_of(item)
        for item in delete:
            key = self._claim(item, change)
            if not self.revision_of(item):
                raise CompareFailed(f"{item.resource} was deleted by somebody else", key=key)
            change.delete[key] = item
            compare[key] = self.revision_of(item)
        for item in expect:
            key = _key(item)
            if self.get(type(item), item.id) != item:
                raise CompareFailed(f"{item.resource} was changed by somebody else", key=key)
            compare[key] = self.revision_of(item)
        for item in absent:
            key = _key(item)
            if self.revision_of(item):
                raise CompareFailed(f"{item.resource} exists already", key=key)
            compare[key] = 0
        change.transaction = Transaction(put=bodies, delete=tuple(change.delete), compare=compare)
        return change

    def _claim(self, item: Stored, change: _Change) -> str:
        key = _key(item)
        if key in change.put or key in change.delete:
            raise InvalidInput(f"one transaction changes {item.resource} twice")
        if key in self._in_flight:
            raise CompareFailed(f"{item.resource} is being changed by somebody else", key=key)
        return key

    async def _commit(self, change: _Change) -> None:
        try:
            revision = await self._land(change.transaction)
            pairs = [(self._shelf(type(item)).put(item, revision), item) for item in change.put.values()]
            gone = [(self._shelf(type(item)).remove(item.id), None) for item in change.delete.values()]
            for item in change.put.values():
                if isinstance(item, Job) and item.over:
                    self._let_go(item)
            self.late += revision < self.revision
            self.revision = max(self.revision, revision)
        finally:
            for key in change.keys:
                del self._in_flight[key]
        for before, after in [*pairs, *gone]:
            for listener in tuple(self.listeners):
                listener(before, after)

    async def _land(self, transaction: Transaction) -> int:
        """Commit it; when the answer is lost, find out. Repeating is safe: it compares every key that it changes."""
        try:
            return await self.store.transact(transaction)
        except CompareFailed as error:
            try:
                await self._check_term()
            except UNKNOWN_OUTCOME:
                log.warning("cannot see who leads", term=self.term)
            raise error
        except UNKNOWN_OUTCOME as error:
            lost = error
        log.warning("the outcome of a write is not known; repeating it", error=lost.message)
        end = asyncio.get_running_loop().time() + PATIENCE
        try:
            while asyncio.get_running_loop().time() < end:
                try:
                    return await self._land_again(transaction)
                except UNKNOWN_OUTCOME as error:
                    lost = error
                await asyncio.sleep(PAUSE)
        except StoreError as error:
            self._depose(f"the store failed while a write's outcome was unknown: {error.message}")
            raise lost from None
        self._depose(f"the store did not tell the outcome of a write within {PATIENCE:g} s")
        raise lost

    async def _land_again(self, transaction: Transaction) -> int:
        try:
            # Only a repetition tells for ever: what is not there yet might land later, but not after this.
            return await self.store.transact(transaction)
        except CompareFailed as error:
            await self._check_term()
            landed = await self._landed(transaction)
            if landed is None:
                raise error
            return landed

    async def _landed(self, transaction: Transaction) -> int | None:
        """The revision at which it is in the store; None: it is not there. Errors: CompareFailed when another change is there."""
        for key in (*transaction.put, *transaction.delete):
            entry = await self.store.get(key)
            found = entry.revision if entry else 0
            if found == transaction.compare[key]:
                return None
            if entry and entry.value != transaction.put.get(key):
                raise CompareFailed(f"{key} was changed by somebody else", key=key)
            if entry:
                return found
        # Deletions only: all are gone. Their revision is of no use to anybody; it must only be true.
        return max(transaction.compare.values())

    async def _check_term(self) -> None:
        entry = await self.store.get(self._term_key)
        if entry is None or entry.revision != self._term_revision:
            self._depose(f"another master leads with term {entry.value.decode() if entry else 'unknown'}; this one had term {self.term}")
        self._check()

    def _check(self) -> None:
        if self.deposed:
            raise NotLeader(self._why)

    @property
    def why_deposed(self) -> str:
        """In words; empty while it leads."""
        return self._why

    def supersede(self, why: str) -> None:
        """An agent has heard a newer master, which has a store of its own."""
        self.superseded = True
        self._depose(why)

    def _depose(self, why: str) -> None:
        if not self.deposed:
            log.warning("deposed", why=why, term=self.term)
            self._why = why
        self.deposed = True
        self.deposed_event.set()


def _key(item: Stored) -> str:
    return f"{item.kind}/{item.id}"


def _parse(cls: type[T], ident: str, body: bytes) -> T:
    try:
        item = cls.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{cls.kind}/{ident} cannot be read: {where}: {first['msg']}", hint="run the version that wrote it, or restore a backup"
        ) from None
    if item.id != ident:
        raise StoreError(f"{cls.kind}/{ident} says that its id is {item.id}", hint="restore a backup: docs/howto/restore-the-master.md")
    # pydantic keeps for each object which fields were given: 700 bytes. Nothing asks for that, so all objects of a class share it.
    object.__setattr__(item, "__pydantic_fields_set__", _FIELDS[cls])
    return item


def _not_found(cls: type[Stored], name: str) -> AtollError:
    return NotFound(f"there is no {cls.noun} {name!r}", hint=f"atoll {cls.noun} list")
