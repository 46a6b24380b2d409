"""Ships the store to the master candidates, as it changes. Commits never wait for it.

Each candidate has a task that reads the store's own log of changes (``Store.watch``) through a bounded queue. When a candidate was away
for longer than the log reaches back, or lacks a change, it gets a base copy, and changes again from there. A new term begins with one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from atoll.model.errors import UNKNOWN_OUTCOME, AtollError, NotLeader, StaleTerm
from atoll.model.messages import ReplicaState
from atoll.model.objects import Node, Stored
from atoll.operations.replication import Candidate
from atoll.operations.state import State
from atoll.rpc.agents import Agents
from atoll.store import image
from atoll.store.contract import Event

log = structlog.get_logger()
Run = Callable[[Callable[[], Any]], Awaitable[Any]]
#: The role of nodes that get a copy.
ROLE = "master-candidate"
#: Revisions that wait for a candidate in memory; what comes after stays in the store's log until there is room.
QUEUE = 1000
#: Bytes of values in one order, and of a base copy's part.
BATCH, PART = 1 << 20, 1 << 20
#: A log grows to this many bytes, or to twice the base copy, before a new base copy takes its place.
LOG = 8 << 20
#: Seconds between looks at a candidate when nothing changes, that an order may take, and between attempts.
LOOK, DEADLINE, PAUSES = 5.0, 30.0, (0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Batch:
    """Changes from revision ``after`` up to ``number``."""

    after: int
    number: int
    revisions: list[Sequence[Event]]


class Shipper:
    """``keyring``: the keys that candidates get, by file name. ``run`` carries out what takes the processor for long."""

    def __init__(self, state: State, agents: Agents, keyring: Callable[[], dict[str, str]], run: Run = asyncio.to_thread) -> None:
        self._state, self._agents, self._keyring, self._run = state, agents, keyring, run
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def _known(self) -> dict[str, Candidate]:
        found: dict[str, Candidate] = self._state.replication.candidates
        return found

    async def run(self) -> None:
        """Keep a task for each candidate, for ever."""
        self._state.store.listeners.append(self._noticed)
        try:
            while True:
                self._changed.clear()
                self._arrange()
                await self._changed.wait()
        finally:
            self._state.store.listeners.remove(self._noticed)
            for task in self._tasks.values():
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks.values())

    def _noticed(self, before: Stored | None, after: Stored | None) -> None:
        now = self._state.clock.monotonic()
        for found in self._known.values():
            if found.behind_since is None:
                found.behind_since = now
        if isinstance(after or before, Node):
            self._changed.set()

    def _arrange(self) -> None:
        store = self._state.store
        self._tasks = {node: task for node, task in self._tasks.items() if not task.done()}
        wanted = {n.id for n in store.all(Node) if n.id != self._state.replication.master and (ROLE in n.roles or n.holds_keys)}
        for node in set(self._tasks) - wanted:
            self._tasks.pop(node).cancel()
            self._known.pop(node, None)
        for node in wanted - set(self._tasks):
            self._tasks[node] = asyncio.get_running_loop().create_task(self._serve(node))

    # --- one candidate ---

    async def _serve(self, node: str) -> None:
        """Ship to a node while it has the role; then take everything back from it. Ends when it is no node any more."""
        failures = 0
        while (record := self._state.store.get(Node, node)) is not None:
            try:
                if ROLE in record.roles:
                    found = self._known.setdefault(node, Candidate(node, behind_since=self._state.clock.monotonic()))
                    keys = await self._give_keys(node)
                    await self._ship(node, found, keys)
                    failures = 0
                    continue
                self._known.pop(node, None)
                if record.holds_keys:
                    await self._take_back(node)
                return
            except StaleTerm as error:
                self._state.store.supersede(error.message)
                return
            except NotLeader:
                return
            except AtollError as error:
                if node in self._known:
                    self._known[node].problem = error.message
                if not failures:
                    log.warning("a candidate's copy of the store falls behind", node=record.name, error=error.message)
                pause = PAUSES[min(failures, len(PAUSES) - 1)]
                failures += 1
                await asyncio.sleep(pause)

    async def _give_keys(self, node: str) -> dict[str, str]:
        # Written first: from now on this node may become the master, and nobody may forget that.
        await self._state.store.change(Node, node, lambda n: n.model_copy(update={"holds_keys": True}))
        keyring = self._keyring()
        if keyring:
            await self._agents.ask(node, "replica.keys", {"keyring": keyring}, deadline=DEADLINE)
        return keyring

    async def _take_back(self, node: str) -> None:
        """Until the node has said that keys and copy are gone; it may be away for long."""
        await self._agents.ask(node, "replica.forget", deadline=DEADLINE)
        await self._state.store.change(Node, node, lambda n: n.model_copy(update={"holds_keys": False}))

    async def _ship(self, node: str, found: Candidate, keys: dict[str, str]) -> None:
        """A base copy, then changes, until something is missing there, the log is long, or the role is gone or the keys are others."""
        number, state = await self._copy(node)
        self._arrived(found, number)
        look = self._state.clock.monotonic() + LOOK
        queue: asyncio.Queue[Sequence[Event]] = asyncio.Queue(QUEUE)
        pump = asyncio.get_running_loop().create_task(self._pump(number, queue))
        try:
            while True:
                batch = await self._next(number, queue, pump)
                state = await self._append(node, batch, found, pump)
                if (state.stream, state.number) != (self._state.store.term, batch.number):
                    log.info("a candidate's copy lacks changes", node=node, has=state.number, shipped=batch.number)
                    return
                number = batch.number
                self._arrived(found, number)
                if state.log_size > max(LOG, 2 * state.base_size) or not self._still(node):
                    return
                if self._state.clock.monotonic() > look:
                    look = self._state.clock.monotonic() + LOOK
                    if self._keyring() != keys:
                        return
        finally:
            pump.cancel()
            await asyncio.wait({pump})

    def _still(self, node: str) -> bool:
        record = self._state.store.get(Node, node)
        return record is not None and ROLE in record.roles

    def _arrived(self, found: Candidate, number: int) -> None:
        found.number, found.problem = number, ""
        found.behind_since = None if number >= self._state.store.revision else self._state.clock.monotonic()

    async def _pump(self, after: int, queue: asyncio.Queue[Sequence[Event]]) -> None:
        async for events in self._state.store.store.watch("", after):
            await queue.put(events)

    async def _next(self, after: int, queue: asyncio.Queue[Sequence[Event]], pump: asyncio.Task[None]) -> Batch:
        """What has been changed; after ``LOOK`` seconds without a change, nothing. Errors: Compacted, those of the store."""
        if queue.empty():
            getter = asyncio.ensure_future(queue.get())
            try:
                await asyncio.wait({getter, pump}, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getter.done():
                    getter.cancel()
            if not getter.done() or getter.cancelled():
                if pump.done():
                    pump.result()
                    raise NotLeader("the store is closed")
                return Batch(after, after, [])
            revisions = [getter.result()]
        else:
            revisions = [queue.get_nowait()]
        size = _size(revisions[0])
        while not queue.empty() and size < BATCH:
            revisions.append(queue.get_nowait())
            size += _size(revisions[-1])
        return Batch(after, revisions[-1][0].revision, revisions)

    async def _append(self, node: str, batch: Batch, found: Candidate, pump: asyncio.Task[None]) -> ReplicaState:
        """Repeated until the candidate answers, or its next changes are not kept any more. Errors: those of the agent."""
        changes = []
        if batch.revisions:
            data = image.pack_changes(batch.revisions)
            one = {"number": batch.number, "after": batch.after, "at": self._state.clock.now(), **_encoded(data)}
            changes.append({**one, "sha256": hashlib.sha256(data).hexdigest()})
        args = {"stream": self._state.store.term, "changes": changes}
        failures = 0
        while True:
            try:
                return ReplicaState(**await self._agents.ask(node, "replica.append", args, deadline=DEADLINE))
            except UNKNOWN_OUTCOME as error:
                found.problem = error.message
                if pump.done() or not self._still(node):
                    raise
                await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
                failures += 1

    async def _copy(self, node: str) -> tuple[int, ReplicaState]:
        entries, revision = await image.whole(self._state.store.store)
        at = self._state.clock.now()
        data: bytes = await self._run(lambda: image.pack(entries, revision))
        pieces = [data[start : start + PART] for start in range(0, len(data), PART)]
        about: dict[str, Any] = {"stream": self._state.store.term, "number": revision, "parts": len(pieces), "at": at}
        about["master"] = self._state.replication.master
        about["sha256"] = hashlib.sha256(data).hexdigest()
        answer: Any = None
        for part, piece in enumerate(pieces):
            answer = await self._agents.ask(node, "replica.part", {**about, "part": part, **_encoded(piece)}, deadline=DEADLINE)
        return revision, ReplicaState(**answer)


def _encoded(data: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(data).decode()}


def _size(events: Sequence[Event]) -> int:
    return sum(len(event.value or b"") for event in events)
