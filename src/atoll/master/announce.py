"""Tells nodes that are silent where the master is: those that were away when it moved still report to the old one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from atoll.model.errors import AtollError
from atoll.model.objects import Node
from atoll.operations.state import State
from atoll.rpc.agents import Agents

#: Seconds between rounds, and for one node to answer.
PERIOD, DEADLINE = 3.0, 2.0


class Announcer:
    """Orders ``master.follow`` in the name of this term; agents that know a newer one refuse it."""

    def __init__(self, state: State, agents: Agents) -> None:
        self._state, self._agents = state, agents

    async def run(self) -> None:
        """Look for silent nodes for ever."""
        while True:
            await self.tell(node for node in self._state.store.all(Node) if not node.offline and not self._state.health.alive(node.id))
            await asyncio.sleep(PERIOD)

    async def tell(self, nodes: Iterable[Node]) -> None:
        """Tell these nodes, all at once."""
        await asyncio.gather(*(self._one(node.id) for node in nodes))

    async def _one(self, node: str) -> None:
        args = {"masters": [self._state.replication.url], "term": self._state.store.term}
        try:
            await self._agents.ask(node, "master.follow", args, deadline=DEADLINE)
        except AtollError:
            # Off, or an older agent: the next round tries again.
            return
