"""How much room the pools have, asked of the agents now and then; for views and for refusing what cannot fit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from atoll.model.errors import AtollError
from atoll.model.messages import Space
from atoll.model.objects import Node, Pool
from atoll.operations.state import State
from atoll.rpc.agents import Agents

#: Seconds between looks, at least between looks, and that one pool may take.
PERIOD, QUIET, DEADLINE = 15.0, 2.0, 10.0


class SpaceMonitor:
    """The newest known space: (pool id, node id) for node-local pools, (pool id, "") for shared ones."""

    def __init__(self, state: State, agents: Agents) -> None:
        self._state, self._agents = state, agents
        self._known: dict[tuple[str, str], Space] = {}
        self._asked: dict[tuple[str, str], float] = {}
        self._soon = asyncio.Event()

    def known(self) -> Mapping[tuple[str, str], Space]:
        """All that is known now."""
        return self._known

    def key(self, pool: Pool, node: str) -> tuple[str, str]:
        """Under what the space that a guest on the node with this id writes to is known."""
        return pool.id, node if self._state.driver(pool).node_local else ""

    def known_since(self, key: tuple[str, str], since: float) -> Space | None:
        """The space as it was asked for after that moment of the monotonic clock; None when that is not known."""
        return self._known.get(key) if self._asked.get(key, 0.0) > since else None

    def look_soon(self) -> None:
        """Something changed: do not wait for the next turn."""
        self._soon.set()

    async def run(self) -> None:
        """Look for ever; a pool that hangs holds up only its own figures."""
        while True:
            self._soon.clear()
            await asyncio.gather(*(self._one(pool, node) for pool, node in self._places()))
            for key in [k for k in self._known if self._state.store.get(Pool, k[0]) is None]:
                del self._known[key]
            # Many changes together are looked at once.
            await asyncio.sleep(QUIET)
            try:
                await asyncio.wait_for(self._soon.wait(), PERIOD)
            except TimeoutError:
                continue

    def _places(self) -> list[tuple[Pool, Node]]:
        found = []
        for pool in self._state.store.all(Pool):
            nodes = [n for n in self._state.managers(self._state.driver(pool), pool.groups) if self._state.health.alive(n.id)]
            # Its agent asks storage that is silent, and says when it answers.
            nodes = [n for n in nodes if not self._state.stalled(pool, n)]
            found += [(pool, node) for node in (nodes if self._state.driver(pool).node_local else nodes[:1])]
        return found

    async def _one(self, pool: Pool, node: Node) -> None:
        key, asked = self.key(pool, node.id), self._state.clock.monotonic()
        try:
            ref = self._state.ref(pool, node).model_dump(mode="json")
            self._known[key] = Space(**await self._agents.ask(node.id, "pool.space", {"ref": ref}, deadline=DEADLINE))
            self._asked[key] = asked
        except AtollError:
            self._known.pop(key, None)
