"""What changes in the cluster, told to those who follow it while it happens.

An event says what changed, not what it is now: the object is read where it is needed. Events of stored objects have the store's revision
as their id; who comes back with the last id that it has seen gets what it missed from the store's own log. A job's progress is not
stored, so it has no id, and of several only the newest is told.

A follower costs nothing while there is nothing for it: filters are applied before it is woken, and one timer beats for all. What waits
for a follower is bounded; one that falls too far behind loses its queue, is told so (``reset``), and is let go.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from atoll.model.errors import NotLeader, TooManyStreams
from atoll.model.messages import Progress
from atoll.model.objects import Claim, Cluster, DeathProof, Group, Hold, Instance, Job, Node, Pool, Snapshot, Stored, Volume
from atoll.store.cache import LeaderStore
from atoll.store.contract import Compacted, Event

#: Frames that may wait for one follower, followers at most, and seconds between signs of life.
BOUND, FOLLOWERS, BEAT = 1000, 2000, 15.0
#: Kinds that are told of. Others are nobody's business, or change with every step.
_TOLD = (Cluster, Group, Node, Pool, Volume, Snapshot, Instance, Claim, DeathProof, Hold, Job)
_NOUNS = {cls.kind: cls.noun for cls in _TOLD}
NOUNS = tuple(sorted(set(_NOUNS.values())))
#: Fields that are told where an object has them.
_FIELDS = ("name", "state", "summary", "operation", "who", "reason", "desired")


def frame(event: str, data: Any, ident: int | None = None) -> bytes:
    """One event as text/event-stream. Without ``ident`` the follower keeps the last one that it has."""
    head = f"id: {ident}\n" if ident is not None else ""
    return f"{head}event: {event}\ndata: {json.dumps(data, default=str)}\n\n".encode()


def describe(kind: str, ident: str, body: dict[str, Any] | None, revision: int) -> dict[str, Any]:
    """An event's data. ``body``: the object as stored; None = it is gone. Old layouts, too: what is not there is left out."""
    found: dict[str, Any] = {"noun": _NOUNS[kind], "id": int(ident) if kind == "jobs" else ident}
    found |= {"change": "removed" if body is None else "changed", "revision": revision}
    return found | {name: body[name] for name in _FIELDS if body and body.get(name)}


class Follower:
    """One who follows. ``nouns`` empty: all of them; ``job``: only this job."""

    def __init__(self, nouns: frozenset[str], job: int | None) -> None:
        self._nouns, self._job = nouns, job
        self._waiting: deque[bytes] = deque()
        self._progress: dict[int, bytes] = {}
        self._wake = asyncio.Event()
        self._last: bytes = b""
        #: What it knows already: events up to this revision are not told again.
        self.knows = 0
        #: How often it was woken; for tests.
        self.woken = 0

    def wants(self, data: dict[str, Any]) -> bool:
        """Whether this event is for it, and new to it."""
        if data.get("revision", self.knows + 1) <= self.knows:
            return False
        if self._job is not None:
            return bool(data["noun"] == "job" and data["id"] == self._job)
        return not self._nouns or data["noun"] in self._nouns

    def put(self, text: bytes) -> bool:
        """Queue a frame; False when too many wait already."""
        if len(self._waiting) >= BOUND:
            return False
        self._waiting.append(text)
        self._rouse()
        return True

    def put_progress(self, job: int, text: bytes) -> None:
        """Queue a job's newest progress in place of an older one."""
        self._progress[job] = text
        self._rouse()

    def end(self, text: bytes) -> None:
        """Nothing more but this."""
        self._waiting.clear()
        self._progress.clear()
        self._last = text or b"\n"
        self._rouse()

    def _rouse(self) -> None:
        self._wake.set()

    async def frames(self) -> AsyncIterator[bytes]:
        """What is to be sent, as it comes; ends when it was let go."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self.woken += 1
            while self._waiting or self._progress:
                if self._waiting:
                    yield self._waiting.popleft()
                else:
                    yield self._progress.pop(next(iter(self._progress)))
            if self._last:
                yield self._last
                return


class Hub:
    """All followers of one leader's store. ``progress_of`` tells how far a job is."""

    def __init__(self, store: LeaderStore, progress_of: Callable[[int], Progress]) -> None:
        self._store, self._progress_of = store, progress_of
        self._followers: set[Follower] = set()
        self._batch: list[tuple[int, Stored | None, Stored | None]] = []
        self._late = store.late
        self._beating: asyncio.TimerHandle | None = None
        self._closed = ""
        store.listeners.append(self._changed)

    @property
    def count(self) -> int:
        """How many follow now."""
        return len(self._followers)

    # --- what happens ---

    def _changed(self, before: Stored | None, after: Stored | None) -> None:
        item = after or before
        if item is None or item.kind not in _NOUNS or not self._followers:
            return
        if not self._batch:
            # Listeners of one transaction are called in one go: after that it is complete.
            asyncio.get_running_loop().call_soon(self._flush)
        self._batch.append((self._store.revision, before, after))

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if self._store.late != self._late:
            # Something older was told of after something newer: the order of ids, by which a follower goes on, is broken once.
            self._late = self._store.late
            self._reset(list(self._followers), "the answer of a change had been lost; its event came out of order")
        for number, (revision, before, after) in enumerate(batch):
            item = after or before
            assert item is not None
            # Only the last of a transaction carries its id: who is cut off in the middle gets the whole of it again.
            last = number + 1 == len(batch) or batch[number + 1][0] != revision
            body = after.model_dump(mode="json", include=set(_FIELDS)) if after else None
            self._publish(describe(item.kind, item.id, body, revision), revision if last else None)

    def _publish(self, data: dict[str, Any], ident: int | None) -> None:
        text = frame(data["noun"], data, ident)
        slow = [follower for follower in self._followers if follower.wants(data) and not follower.put(text)]
        self._reset(slow, f"{BOUND} events waited for this client, and it did not read them")

    def progress(self, number: int, progress: Progress) -> None:
        """A job tells how far it is."""
        if not self._followers:
            return
        wanted = {"noun": "job", "id": number}
        followers = [follower for follower in self._followers if follower.wants(wanted)]
        if followers:
            text = frame("progress", {"job": number, **progress.model_dump(mode="json")})
            for follower in followers:
                follower.put_progress(number, text)

    # --- those who follow ---

    async def follow(self, nouns: Iterable[str] = (), job: int | None = None, after: int | None = None) -> Follower:
        """Begin to follow; ``leave`` ends it. ``after``: the last id that was seen; what came since is told first.

        What is asked for and is no longer known is answered by ``reset``: read everything again. Errors: NotLeader, TooManyStreams.
        """
        if self._closed or self._store.deposed:
            raise NotLeader(self._closed or "this master was deposed")
        if len(self._followers) >= FOLLOWERS:
            raise TooManyStreams(f"{FOLLOWERS} clients follow this master's events already")
        follower = Follower(frozenset(nouns), job)
        if after is not None and after != self._store.revision:
            follower.knows = await self._catch_up(follower, after)
            if self._closed:
                raise NotLeader(self._closed)
        # From here to the end nothing else runs: nothing is missed between the log and what is told from now on.
        self._flush()
        follower.knows = max(follower.knows, self._store.revision)
        self._followers.add(follower)
        if job is not None:
            self._present(follower, job)
        follower.put(f"retry: 1000\nid: {follower.knows}\n\n".encode())
        if self._beating is None:
            self._beating = asyncio.get_running_loop().call_later(BEAT, self._beat)
        return follower

    def leave(self, follower: Follower) -> None:
        """It hung up."""
        self._followers.discard(follower)

    def _present(self, follower: Follower, number: int) -> None:
        """How the job is now: what it did before it was followed is not told."""
        job = self._store.get(Job, f"{number:010d}")
        if job is None:
            return
        body = job.model_dump(mode="json", include=set(_FIELDS))
        follower.put(frame("job", describe("jobs", job.id, body, self._store.revision_of(job))))
        progress = self._progress_of(number)
        if progress.text or progress.percent is not None:
            follower.put_progress(number, frame("progress", {"job": number, **progress.model_dump(mode="json")}))

    async def _catch_up(self, follower: Follower, after: int) -> int:
        """Tell what the store's log has after that revision, until nothing is left; the revision up to which it was told."""
        if after > self._store.revision:
            follower.put(self._reset_frame("the id is newer than anything here: the store was restored, or is another cluster's"))
            return self._store.revision
        try:
            async with asyncio.timeout(BEAT):
                async with aclosing(self._store.store.watch("", after)) as changes:  # type: ignore[type-var]
                    async for events in changes:
                        self._replay(follower, [event for event in events if event.key.partition("/")[0] in _NOUNS])
                        after = events[0].revision
                        if after >= self._store.revision:
                            break
        except (Compacted, TimeoutError):
            follower.put(self._reset_frame("what came after that id is no longer kept"))
            return self._store.revision
        return after

    def _replay(self, follower: Follower, events: list[Event]) -> None:
        for number, event in enumerate(events):
            kind, _, ident = event.key.partition("/")
            last = number + 1 == len(events)
            data = describe(kind, ident, json.loads(event.value) if event.value is not None else None, event.revision)
            if follower.wants(data) and not follower.put(frame(data["noun"], data, event.revision if last else None)):
                raise TimeoutError

    def _reset(self, followers: Iterable[Follower], why: str) -> None:
        for follower in list(followers):
            follower.end(self._reset_frame(why))
            self.leave(follower)

    def _reset_frame(self, why: str) -> bytes:
        return frame("reset", {"why": why, "revision": self._store.revision}, self._store.revision)

    def _beat(self) -> None:
        """A sign of life for everybody, so that the dead are noticed; and the id, so that who is cut off need not read much again."""
        self._beating = asyncio.get_running_loop().call_later(BEAT, self._beat) if self._followers else None
        self._flush()
        for follower in list(self._followers):
            if not follower.put(f": alive\nid: {self._store.revision}\n\n".encode()):
                self._reset([follower], "this client does not read")

    def close(self, why: str) -> None:
        """Let everybody go: they find the next leader."""
        self._closed = why
        for follower in list(self._followers):
            follower.end(frame("end", {"why": why}))
        self._followers.clear()
        if self._beating is not None:
            self._beating.cancel()
