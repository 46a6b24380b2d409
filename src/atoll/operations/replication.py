"""How far the master candidates' copies of the store are; kept by the master that ships them, seen by views and ``cluster verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Seconds behind, or without an answer, after which ``cluster verify`` warns.
LATE = 30.0


@dataclass
class Candidate:
    """One candidate. ``number`` is the revision up to which its copy is durable there; 0 = none in this term."""

    node: str
    number: int = 0
    #: When the first change was made that it has not got yet, on the monotonic clock; None = it has everything.
    behind_since: float | None = 0.0
    #: Why nothing is shipped at the moment; empty while all is well.
    problem: str = ""


class Replication:
    """All candidates by node id. ``master`` is the leader's own node (id), ``url`` where it serves; empty where nobody has said."""

    def __init__(self, master: str = "", url: str = "") -> None:
        self.master, self.url = master, url
        self.candidates: dict[str, Candidate] = {}

    def row(self, node: str, revision: int, now: float) -> dict[str, Any] | None:
        """The candidate for people: ``state`` is in step, behind, or copying; None for a node that is none."""
        found = self.candidates.get(node)
        if found is None:
            return None
        behind = max(0, revision - found.number) if found.number else None
        state = "copying" if not found.number else "behind" if found.behind_since is not None else "in step"
        seconds = None if found.behind_since is None else now - found.behind_since
        return {"state": state, "behind": behind, "seconds": seconds, "problem": found.problem}
