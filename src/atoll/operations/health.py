"""What is known of how the pools' storage is, and what it forbids."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from atoll.model.errors import PoolUnhealthy
from atoll.model.health import Health, Refusal
from atoll.model.objects import Pool


@dataclass(frozen=True)
class Seen:
    """The newest sample of a pool's storage, or why there is none. Moments are of the wall clock (seconds since 1970)."""

    at: float
    sample: Health | None = None
    #: Why the newest question had no answer; the sample is an older one, then, or None.
    problem: str = ""
    #: Check (its code) -> since when it stands without a break.
    since: dict[str, float] = field(default_factory=dict)

    def refusal(self) -> Refusal | None:
        """Why the pool takes no new volumes now; None if it does, or if nobody knows how it is."""
        if self.sample is None or self.problem:
            return None
        return next((r for r in self.sample.refusals if self.at - self.since.get(r.code, self.at) >= r.grace), None)

    @property
    def word(self) -> str:
        """``ok``, ``warning`` or ``error`` as the newest sample has it; ``unknown`` where there is none."""
        return "unknown" if self.sample is None or self.problem else self.sample.status

    def row(self) -> dict[str, Any]:
        """For views: the sample, and what follows from it."""
        refusal = self.refusal()
        return {
            "state": self.word,
            "problem": self.problem,
            "refuses_volumes": f"{refusal.reason} ({refusal.code})" if refusal else "",
            "hint": refusal.hint if refusal else "",
            "since": dict(self.since),
            "sampled": self.at or None,
            "sample": self.sample.model_dump(mode="json") if self.sample else None,
        }

    def followed(self, sample: Health, at: float) -> Seen:
        """With the next sample."""
        codes = {check.code for check in sample.checks} | {refusal.code for refusal in sample.refusals}
        return Seen(at, sample, "", {code: self.since.get(code, at) for code in codes})


#: A pool whose storage can tell how it is, but has not been asked yet.
NOT_YET = Seen(0.0, problem="it has not been asked yet")


class PoolsHealth(dict[str, Seen]):
    """Pool (id) -> what is known."""

    def check(self, pool: Pool) -> None:
        """Refuse a pool whose storage must not be given more now. Errors: PoolUnhealthy."""
        seen = self.get(pool.id)
        refusal = seen.refusal() if seen else None
        if seen is None or refusal is None:
            return
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen.since[refusal.code]))
        raise PoolUnhealthy(
            f"pool {pool.name} takes no new volumes, and none grows, since {since}: {refusal.reason} ({refusal.code})",
            hint=f"{refusal.hint}; then look again: atoll storage status",
            check=refusal.code,
            since=seen.since[refusal.code],
        )
