"""The contract of stores: where the truth is kept. Small enough that SQLite and etcd keep it alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from atoll.model.errors import AtollError


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and the revision of the transaction that wrote it. Revisions grow by one with each transaction."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a key; ``value`` None is a deletion. All events of one transaction have one revision."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """Everything or nothing. ``compare`` maps keys to the revision they must have; 0 = must not exist."""

    put: Mapping[str, bytes] = field(default_factory=dict)
    delete: Sequence[str] = ()
    compare: Mapping[str, int] = field(default_factory=dict)


class CompareFailed(AtollError):
    """A compared key was changed by somebody else."""

    code, status, exit_code, default_hint = "compare_failed", 409, 4, "read again and repeat"


class Compacted(AtollError):
    """The watch asked for changes that are no longer kept: read everything again."""

    code, status, exit_code, default_hint = "compacted", 409, 8, "read everything again"


@runtime_checkable
class Store(Protocol):
    """Keys are ``/``-separated text, values are bytes. All calls raise StoreError when the store cannot answer."""

    async def get(self, key: str) -> Entry | None:
        """The newest committed value. Linearizable: sees every transaction acknowledged before the call."""

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        """All entries whose key starts with the prefix, by key, and the store's revision at that moment (one snapshot)."""

    async def kinds(self) -> Sequence[str]:
        """What stands before the first ``/`` of the keys: each once, in order."""

    async def transact(self, transaction: Transaction) -> int:
        """Check all compares and apply all changes, atomically; returns the new revision.

        When it returns, the change is durable: it survives a power cut. Raises CompareFailed and changes nothing when a compare
        fails. Raises DeadlineExceeded or Unreachable when the outcome is not known: read before you repeat.
        """

    def watch(self, prefix: str, after: int) -> AsyncIterator[Sequence[Event]]:
        """Changes with revisions above ``after``, in order, a whole revision in each list; waits for more for ever.
        Raises Compacted when they are no longer kept."""

    async def close(self) -> None:
        """Let go of everything; calls after that raise StoreError."""


@runtime_checkable
class Lease(Protocol):
    """A time-limited mark that somebody leads; only stores with several masters need more than the term."""

    async def grant(self, name: str, holder: str, ttl: float) -> int | None:
        """Take or renew the lease for ``ttl`` seconds: the term, which grows with each new holder; None if another holds it."""
