"""The contract between a master and an agent, whatever carries it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from atoll.model.messages import Call, Progress
from atoll.model.objects import Node

Report = Callable[[Progress], None]


class AgentService(Protocol):
    """An agent, as a transport sees it."""

    async def handle(self, call: Call, report: Report) -> Any:
        """Carry out an order and give its JSON-able result. Errors: AtollError; StaleTerm, StepUndone, StaleGeneration refuse it."""


class Transport(Protocol):
    """Brings orders to agents."""

    async def call(self, node: Node, call: Call, report: Report) -> Any:
        """One attempt. Errors: what the agent raised; Unreachable or DeadlineExceeded when the outcome is not known."""

    async def close(self) -> None:
        """Close all connections."""
