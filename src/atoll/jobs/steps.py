"""The parts of a step: changes to the store, undo, and the errors that steer a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from atoll.model.errors import AtollError, NeedsAttention
from atoll.model.objects import Stored


@dataclass(frozen=True)
class Changes:
    """What a step writes to the store, in one transaction with its own journal record. ``result`` is the step's result."""

    put: list[Stored] = field(default_factory=list)
    delete: list[Stored] = field(default_factory=list)
    result: Any = None


@dataclass(frozen=True)
class Undo:
    """How to undo a step: an order to an agent, or a registered function that changes the store. Data only, so that it can be journaled.

    ``dies``: the effect dies with its node (a process, an attachment), so a proof of the node's death is its undo. ``local``: it is on
    the node's own disks, so nobody else can undo it.
    """

    method: str
    args: dict[str, Any] = field(default_factory=dict)
    node: str | None = None
    dies: bool = False
    local: bool = False
    deadline: float = 60.0

    def to_json(self) -> dict[str, Any]:
        """The form in which it is journaled."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Undo:
        """The undo that was journaled."""
        return cls(**data)


@dataclass(frozen=True)
class Order:
    """An order to a node, for ``JobContext.together``; its parts are those of ``call``."""

    key: str
    node: str
    method: str
    args: dict[str, Any] = field(default_factory=dict)
    undo: Undo | None = None
    deadline: float = 60.0


UndoFunction = Callable[[Any, dict[str, Any]], Changes]
_UNDO: dict[str, UndoFunction] = {}


def undo_function(name: str) -> Callable[[UndoFunction], UndoFunction]:
    """Register a function of (state, args) that gives the changes which undo a write. It must succeed when nothing is left to undo."""

    def add(function: UndoFunction) -> UndoFunction:
        if name in _UNDO:
            raise ValueError(f"undo function {name} is registered twice")
        _UNDO[name] = function
        return function

    return add


def find_undo(name: str) -> UndoFunction:
    """A registered undo function."""
    return _UNDO[name]


class Attention(NeedsAttention):
    """Raised by an operation that cannot decide: ``commands`` are what a person can type."""

    def __init__(self, reason: str, commands: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.commands = commands


class Settled(AtollError):
    """Raised by an operation past its commit that has put everything back itself: the job ends undone, with this error's cause."""

    def __init__(self, cause: AtollError) -> None:
        super().__init__(cause.message)
        self.cause = cause


class ReplayMismatch(AtollError):
    """The operation did not repeat the steps in its journal; what it did is undone."""

    code, status, exit_code, default_hint = "replay_mismatch", 500, 8, "report this: the job was undone, nothing is lost"


def args_hash(*parts: Any) -> str:
    """A hash of JSON-able parts, compared on replay."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
