"""How storage that is a service of its own says it is: one sample, the same for every kind of it. Data only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atoll.model.messages import Wire


class HealthCheck(Wire):
    """Something that the storage says is not in order. ``code`` is its own word for it."""

    code: str
    severity: Literal["warning", "error"]
    summary: str
    #: What it is about, in the storage's words; the first few.
    details: tuple[str, ...] = ()
    #: An administrator has told the storage not to count it.
    muted: bool = False


class Refusal(Wire):
    """Why the pool shall take no new volumes now, nor let one grow: the check, its reason in words, and what to type."""

    code: str
    reason: str
    hint: str
    #: Seconds for which it may last without harm, such as while the storage settles after a restart.
    grace: float = 0.0


class Rates(Wire):
    """What flows in a second: bytes and operations."""

    read_bytes: float = 0.0
    write_bytes: float = 0.0
    reads: float = 0.0
    writes: float = 0.0


class Health(Wire):
    """One sample. What the storage does not tell is None or empty. Sizes in bytes, of the raw storage, copies included."""

    status: Literal["ok", "warning", "error"]
    checks: tuple[HealthCheck, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    #: Its monitors, and those of them that take part.
    monitors: int | None = None
    quorum: tuple[str, ...] = ()
    #: Its daemons that keep data: all, those that run, and those that count.
    osds: int | None = None
    osds_up: int | None = None
    osds_in: int | None = None
    #: Placement groups by state, and how many of them nobody can use now.
    pgs: dict[str, int] = Field(default_factory=dict)
    pgs_inactive: int = 0
    #: Share of the copies that are missing.
    degraded: float = 0.0
    total: int | None = None
    used: int | None = None
    #: Where it calls itself nearly full, and where it takes no more writes: shares.
    nearfull_ratio: float | None = None
    full_ratio: float | None = None
    slow_ops: int = 0
    #: Whether somebody keeps its figures; None: it needs nobody for that. ``figures`` says what is old or missing, and why.
    manager: bool | None = None
    figures: str = ""
    #: Of this pool, and of the whole storage.
    client: Rates | None = None
    recovery_bytes: float = 0.0
    recovery_objects: float = 0.0
    #: The slowest of its daemons: seconds for a write to be durable, and to be applied.
    commit_latency: float | None = None
    apply_latency: float | None = None
    #: What the sample took: seconds, and seconds of processor time of the process that took it.
    seconds: float = 0.0
    cpu_seconds: float = 0.0
