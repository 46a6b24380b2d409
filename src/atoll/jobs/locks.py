"""Which jobs may run together. All locks of a job are granted at once, first come first served on every resource.

The table is in memory and is rebuilt from the jobs themselves: no lock outlives its job.

A job that waits is looked at again only when the one job that it was seen to wait for last is gone, not whenever anything changes: with
thousands of jobs that want the same things, each end of a job costs as much as there are jobs right behind it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from atoll.model.objects import Locks


@dataclass
class _Want:
    job: int
    parent: int | None
    locks: Locks
    granted: bool = False

    @property
    def child(self) -> bool:
        """A child goes before all that wait, on every resource: whoever waits for its parent would wait for the child, which would wait
        for him. It still waits for holders, and these wait for nobody."""
        return self.parent is not None

    def resources(self) -> list[tuple[str, bool]]:
        """What it wants, and whether for itself alone."""
        return [*((resource, True) for resource in self.locks.exclusive), *((resource, False) for resource in self.locks.shared)]


@dataclass
class _Queue:
    """Who wants one resource. Waiting jobs are in order of their numbers, holders are not."""

    #: job -> whether it wants the resource for itself alone
    exclusive: dict[int, bool] = field(default_factory=dict)
    holders: set[int] = field(default_factory=set)
    waiting: list[int] = field(default_factory=list)
    #: Those of the waiting jobs and of the holders that want it for themselves alone.
    waiting_alone: list[int] = field(default_factory=list)
    holders_alone: set[int] = field(default_factory=set)

    def put(self, job: int, *, alone: bool, granted: bool) -> None:
        self.exclusive[job] = alone
        if granted:
            self.holders.add(job)
            if alone:
                self.holders_alone.add(job)
        else:
            insort(self.waiting, job)
            if alone:
                insort(self.waiting_alone, job)

    def grant(self, job: int) -> None:
        alone = self.exclusive[job]
        self.remove(job)
        self.put(job, alone=alone, granted=True)

    def remove(self, job: int) -> None:
        alone = self.exclusive.pop(job)
        if job in self.holders:
            self.holders.discard(job)
            self.holders_alone.discard(job)
            return
        del self.waiting[bisect_left(self.waiting, job)]
        if alone:
            del self.waiting_alone[bisect_left(self.waiting_alone, job)]

    def ahead(self, job: int, *, alone: bool, first: bool) -> int | None:
        """A job that this one waits for; of those that wait themselves the last one before it, which is gone last. ``first``: it goes
        before all that wait."""
        waiting, holders = (self.waiting, self.holders) if alone else (self.waiting_alone, self.holders_alone)
        before = 0 if first else bisect_left(waiting, job)
        if before:
            return waiting[before - 1]
        return next((other for other in holders if other != job), None)

    def all_ahead(self, job: int, *, alone: bool, first: bool) -> set[int]:
        waiting, holders = (self.waiting, self.holders) if alone else (self.waiting_alone, self.holders_alone)
        return {*([] if first else waiting[: bisect_left(waiting, job)]), *holders} - {job}


class LockTable:
    """Jobs in order of their numbers, each with what it wants to lock."""

    def __init__(self) -> None:
        self._wants: dict[int, _Want] = {}
        self._queues: dict[str, _Queue] = {}
        #: job -> those that were last seen to wait for it
        self._behind: dict[int, set[int]] = {}
        #: Waiting jobs that must be looked at.
        self._look: set[int] = set()

    def add(self, job: int, locks: Locks, *, parent: int | None = None, granted: bool = False) -> None:
        """A job asks for its locks; ``granted``: it holds them already (a running job after a restart)."""
        self._wants[job] = _Want(job, parent, locks, granted)
        for resource in locks.shared:
            self._queue(resource).put(job, alone=False, granted=granted)
        for resource in locks.exclusive:
            self._queue(resource).put(job, alone=True, granted=granted)
        if not granted:
            self._look.add(job)

    def _queue(self, resource: str) -> _Queue:
        return self._queues.setdefault(resource, _Queue())

    def extend(self, job: int, exclusive: tuple[str, ...]) -> bool:
        """A job that has its locks needs more of them: all at once, or none if somebody holds one. False: none."""
        want = self._wants[job]
        if any(other != job for resource in exclusive for other in self.holders(resource)):
            return False
        for resource in exclusive:
            queue = self._queue(resource)
            if job in queue.exclusive:
                queue.remove(job)
            queue.put(job, alone=True, granted=want.granted)
        shared = tuple(resource for resource in want.locks.shared if resource not in exclusive)
        want.locks = Locks(shared=shared, exclusive=tuple(sorted({*want.locks.exclusive, *exclusive})))
        return True

    def remove(self, job: int) -> None:
        """The job has ended, or holds replace its locks."""
        want = self._wants.pop(job, None)
        if want is None:
            return
        for resource in (*want.locks.shared, *want.locks.exclusive):
            queue = self._queues[resource]
            queue.remove(job)
            if not queue.exclusive:
                del self._queues[resource]
        self._look.discard(job)
        self._look.update(other for other in self._behind.pop(job, ()) if other in self._wants and not self._wants[other].granted)

    def grantable(self) -> list[int]:
        """Grant what can be granted now; gives the jobs that got their locks, oldest first."""
        got = []
        for job in sorted(self._look):
            want = self._wants[job]
            other = self._first_ahead(want)
            if other is not None:
                self._behind.setdefault(other, set()).add(job)
                continue
            want.granted = True
            for resource in (*want.locks.shared, *want.locks.exclusive):
                self._queues[resource].grant(job)
            got.append(job)
        self._look.clear()
        return got

    def _first_ahead(self, want: _Want) -> int | None:
        for resource, alone in want.resources():
            other = self._queues[resource].ahead(want.job, alone=alone, first=want.child)
            if other is not None:
                return other
        return None

    def blockers(self, job: int) -> list[int]:
        """The jobs that this one waits for."""
        want = self._wants[job]
        found: set[int] = set()
        for resource, alone in want.resources():
            found |= self._queues[resource].all_ahead(job, alone=alone, first=want.child)
        return sorted(found)

    def holders(self, resource: str) -> list[int]:
        """The jobs that hold a lock on the resource now."""
        queue = self._queues.get(resource)
        return sorted(queue.holders) if queue else []
