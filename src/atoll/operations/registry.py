"""The table of operations: REST routes, the CLI's completion, docs and fault tests are generated from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from atoll.model.errors import NotFound
from atoll.model.objects import Locks
from atoll.operations.requests import Request

if TYPE_CHECKING:
    from atoll.jobs.context import JobContext
    from atoll.operations.state import State

Role = Literal["reader", "operator", "admin"]


@dataclass(frozen=True)
class Prepared:
    """A checked request: ``frozen`` is what the job keeps (ids instead of names), ``locks`` what it may touch."""

    frozen: dict[str, Any]
    locks: Locks
    summary: str
    #: Seconds that the job may take; None: the operation's.
    deadline: float | None = None


@dataclass(frozen=True)
class Operation:
    """Something that can be asked for.

    ``prepare`` checks the request against the present state and changes nothing; it raises the error that the user sees.
    ``run`` does it, as journaled steps; it reads only the frozen request and results of its own steps.
    """

    name: str
    request: type[Request]
    prepare: Callable[[State, str, Any], Prepared]
    run: Callable[[JobContext, dict[str, Any]], Awaitable[Any]]
    role: Role = "operator"
    version: int = 1
    deadline: float = 3600.0
    #: Whether people may ask for it; some are only for the master's own loops.
    public: bool = True
    #: What a dry run tells besides the summary, as JSON-able data: ``lines``, ``survives`` and ``warnings``.
    plan: Callable[[State, str, Any], dict[str, list[str]]] | None = None

    @property
    def noun(self) -> str:
        """What it is about, such as ``instance``."""
        return self.name.split(".")[0]

    @property
    def verb(self) -> str:
        """What it does, such as ``grow-disk``."""
        return self.name.split(".")[1]


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Add an operation to the table."""
    if operation.name in OPERATIONS:
        raise ValueError(f"operation {operation.name} is registered twice")
    OPERATIONS[operation.name] = operation
    return operation


def operation(name: str) -> Operation:
    """An operation by name."""
    try:
        return OPERATIONS[name]
    except KeyError:
        raise NotFound(f"there is no operation {name!r}") from None
