"""The transport inside one process: orders still travel as JSON, and a link can be cut, slow, or deliver twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from atoll.model.errors import AtollError, DeadlineExceeded, Unreachable
from atoll.model.messages import Call
from atoll.model.objects import Node
from atoll.rpc.contract import AgentService, Report

#: Called before an order is delivered ("request") and before its answer is ("reply"); may wait, or raise Unreachable.
LinkFault = Callable[[str, str, Call], Awaitable[None]]
#: The name of the node that carries out the present order; for fault points, which are told nothing else.
here: ContextVar[str] = ContextVar("here", default="")


class InProcessTransport:
    """Delivers to agents registered by node id. ``fault`` may cut or delay."""

    def __init__(self) -> None:
        self.agents: dict[str, AgentService] = {}
        self.fault: LinkFault | None = None
        self._late: set[asyncio.Task[Any]] = set()

    async def call(self, node: Node, call: Call, report: Report) -> Any:
        task = asyncio.ensure_future(self._deliver(node, call, report))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        # Who asked may be gone when it ends; then nobody looks at its error.
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        done, _ = await asyncio.wait([task], timeout=call.deadline)
        if not done:
            raise DeadlineExceeded(f"node {node.name} did not finish {call.method} within {call.deadline:g} s")
        return task.result()

    async def _deliver(self, node: Node, call: Call, report: Report) -> Any:
        if self.fault:
            await self.fault("request", node.name, call)
        agent = self.agents.get(node.id)
        if agent is None:
            raise Unreachable(f"node {node.name} does not answer")
        here.set(node.name)
        try:
            result = await agent.handle(Call.model_validate_json(call.model_dump_json()), report)
        except AtollError:
            if self.agents.get(node.id) is not agent:
                raise Unreachable(f"node {node.name} went away before it answered") from None
            if self.fault:
                await self.fault("reply", node.name, call)
            raise
        if self.fault:
            await self.fault("reply", node.name, call)
        if self.agents.get(node.id) is not agent:
            raise Unreachable(f"node {node.name} went away before it answered")
        return json.loads(json.dumps(result))

    async def close(self) -> None:
        """Orders that are under way still arrive, as on a real network: who sent them may be gone by then."""
