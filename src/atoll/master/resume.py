"""Guests that a full pool has stopped go on by themselves when there is room again.

Only after ``no space left``: the guest waits for that write and tries it again, so nothing is lost and nothing is done twice. After any
other error a person decides: a file system that has reported a failed write once may call the next one good although the data is gone.

It is bounded. Room counts only if it was measured after the guest had stopped, and there must be ``ROOM`` for each guest that waits on
that storage. A guest that stops again soon waits twice as long for the next attempt, up to ``LONGEST``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.model.messages import GuestStatus
from atoll.model.objects import Instance, Node, Pool, Volume
from atoll.model.units import MIB

if TYPE_CHECKING:
    from atoll.master.spaces import SpaceMonitor
    from atoll.operations.state import State

#: Bytes that must be free for each guest that waits for room.
ROOM = 64 * MIB
#: Seconds before the second attempt, and at most; seconds that a guest must have run for its attempts to be forgotten.
FIRST, LONGEST, CALM = 10.0, 600.0, 600.0


class Resumer:
    """Decides which guests may go on; touches nothing."""

    def __init__(self, state: State, spaces: SpaceMonitor) -> None:
        self._state, self._spaces = state, spaces
        self._stopped: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def runs(self, instance: str, now: float) -> None:
        """It was seen running."""
        self._stopped.pop(instance, None)
        if now - self._last.get(instance, now) > CALM:
            self.forget(instance)

    def forget(self, instance: str) -> None:
        """It no longer stands still for its storage, or is gone."""
        for kept in (self._stopped, self._tries, self._last):
            kept.pop(instance, None)

    def due(self, instance: Instance, guest: GuestStatus, node: str, now: float) -> bool:
        """Whether a guest that stands still on the node with this id shall try again now. The caller sees to it that nothing else works
        on it."""
        if not guest.disk_errors or any(what != "full" for what in guest.disk_errors.values()):
            return False
        since = self._stopped.setdefault(instance.id, now)
        # The figures that are known may be older than the stop.
        self._spaces.look_soon()
        tries = self._tries.get(instance.id, 0)
        if tries and now < self._last[instance.id] + min(FIRST * 2 ** (tries - 1), LONGEST):
            return False
        if not all(self._room(volume, node, since) for volume in guest.disk_errors):
            return False
        self._tries[instance.id], self._last[instance.id] = tries + 1, now
        self._stopped.pop(instance.id)
        return True

    def _room(self, volume: str, node: str, since: float) -> bool:
        record = self._state.store.get(Volume, volume)
        pool = self._state.store.get(Pool, record.pool) if record else None
        if pool is None:
            return False
        key = self._spaces.key(pool, node)
        space = self._spaces.known_since(key, since)
        return space is not None and space.free >= ROOM * max(1, self._waiting(pool, key[1]))

    def _waiting(self, pool: Pool, node: str) -> int:
        """How many guests wait for room in the same place; ``node`` is empty where the pool is shared."""
        found = 0
        for report in (self._state.health.report(n) for n in ([node] if node else [n.id for n in self._state.store.all(Node)])):
            for guest in report.guests if report else ():
                volumes = [self._state.store.get(Volume, v) for v in guest.disk_errors]
                found += any(v is not None and v.pool == pool.id for v in volumes)
        return found
