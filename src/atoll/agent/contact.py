"""Whether the master still counts on this node. An order that hung in the network, or in a slow agent, must not begin to write a disk
after a person has declared this node dead and the instance has been started elsewhere.

The master takes a node for dead only when it has been silent for ``master.health.GRACE`` seconds. This node counts from the moment at
which it sent the last report that was answered, and gives up earlier. Answers to reports, never orders, renew it: orders may be late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from atoll.agent.memory import Memory
from atoll.model.errors import Unreachable

#: Seconds without an answered report after which this node begins nothing any more. Smaller than the master's grace.
TRUST = 5.0
#: What may be done all the same: it ends things here, or promises to begin none.
HARMLESS = frozenset({"guest.stop", "claim.release", "os.unrun", "disks.deactivate"})


class Asked(Protocol):
    """A step that is being carried out. ``term``: of the newest master that has asked for it."""

    term: int


#: The step that the present task carries out.
step: ContextVar[Asked | None] = ContextVar("step", default=None)


def since_boot() -> float:
    """Seconds since boot, sleep included: a machine that slept was silent."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Contact:
    """``now`` gives seconds that only grow."""

    def __init__(self, memory: Memory, now: Callable[[], float] = since_boot) -> None:
        self._memory, self.now = memory, now
        self._answered: float | None = None
        self._dead = False

    def heard(self, sent: float, term: int, dead: bool) -> None:
        """A master of this term has answered the report sent at ``sent``. ``dead``: for it this node is dead, until it is readmitted."""
        if term < self._memory.term:
            return
        self._memory.see_term(term)
        self._answered, self._dead = sent, dead

    def silence(self) -> float | None:
        """Seconds since the last report that a master has answered; None = none since this agent began."""
        return None if self._answered is None else self.now() - self._answered

    def check(self, what: str) -> None:
        """Refuse to begin something. Errors: Unreachable (the master repeats the order)."""
        if self._answered is None:
            raise Unreachable(f"{what}: this agent has just begun and has not been heard by the master yet")
        if self._dead:
            raise Unreachable(f"{what}: this node was declared dead and is not readmitted yet")
        silence = self.now() - self._answered
        if silence > TRUST:
            raise Unreachable(f"{what}: the master has not answered this node for {silence:.0f} s and may take it for dead")

    def check_again(self, what: str) -> None:
        """The same in the middle of a step that has taken its time: a newer master may have decided otherwise meanwhile, and if it has
        not, it asks again. Errors: Unreachable."""
        asked = step.get()
        if asked is not None and asked.term < self._memory.term:
            raise Unreachable(f"{what}: a master of term {self._memory.term} leads now; this was asked for in term {asked.term}")
        self.check(what)
