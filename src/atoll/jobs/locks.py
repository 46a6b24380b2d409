"""Which jobs may run together. All locks of a job are granted at once, first come first served on every resource.

The table is in memory and is rebuilt from the jobs themselves: no lock outlives its job.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.model.objects import Locks


@dataclass
class _Want:
    job: int
    parent: int | None
    locks: Locks
    granted: bool = False


class LockTable:
    """Jobs in order of their numbers, each with what it wants to lock."""

    def __init__(self) -> None:
        self._wants: dict[int, _Want] = {}
        self._queues: dict[str, dict[int, bool]] = {}

    def add(self, job: int, locks: Locks, *, parent: int | None = None, granted: bool = False) -> None:
        """A job asks for its locks; ``granted``: it holds them already (a running job after a restart)."""
        self._wants[job] = _Want(job, parent, locks, granted)
        for resource in locks.shared:
            self._queues.setdefault(resource, {})[job] = False
        for resource in locks.exclusive:
            self._queues.setdefault(resource, {})[job] = True

    def extend(self, job: int, exclusive: tuple[str, ...]) -> bool:
        """A job that has its locks needs more of them: all at once, or none if somebody holds one. False: none."""
        want = self._wants[job]
        if any(other != job for resource in exclusive for other in self.holders(resource)):
            return False
        for resource in exclusive:
            self._queues.setdefault(resource, {})[job] = True
        shared = tuple(resource for resource in want.locks.shared if resource not in exclusive)
        want.locks = Locks(shared=shared, exclusive=tuple(sorted({*want.locks.exclusive, *exclusive})))
        return True

    def remove(self, job: int) -> None:
        """The job has ended, or holds replace its locks."""
        want = self._wants.pop(job, None)
        for resource in (*want.locks.shared, *want.locks.exclusive) if want else ():
            queue = self._queues[resource]
            del queue[job]
            if not queue:
                del self._queues[resource]

    def grantable(self) -> list[int]:
        """Grant what can be granted now; gives the jobs that got their locks, oldest first."""
        got = []
        for job in sorted(self._wants):
            want = self._wants[job]
            if not want.granted and not self.blockers(job):
                want.granted = True
                got.append(job)
        return got

    def blockers(self, job: int) -> list[int]:
        """The jobs that this one waits for."""
        want = self._wants[job]
        found: set[int] = set()
        for resource in want.locks.exclusive:
            found.update(j for j in self._queues[resource] if j != job and self._ahead(j, want))
        for resource in want.locks.shared:
            # A child shares what its parent shares already, even past an exclusive lock that waits for the parent: else both wait for ever.
            if want.parent is not None and self._queues[resource].get(want.parent) is False:
                continue
            found.update(j for j, exclusive in self._queues[resource].items() if exclusive and j != job and self._ahead(j, want))
        return sorted(found)

    def _ahead(self, other: int, want: _Want) -> bool:
        return self._wants[other].granted or other < want.job

    def holders(self, resource: str) -> list[int]:
        """The jobs that hold a lock on the resource now."""
        return sorted(job for job in self._queues.get(resource, {}) if self._wants[job].granted)
