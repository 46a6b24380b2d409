"""How the pools' storage is, asked of the agents every few seconds where a driver can tell; for views, figures, and for refusing new
volumes while it is in trouble."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from atoll.api.leader import Finding
from atoll.model.errors import AtollError
from atoll.model.health import Health
from atoll.model.objects import Node, Pool
from atoll.operations.health import PoolsHealth, Seen
from atoll.operations.state import State
from atoll.rpc.agents import Agents

#: Seconds between samples, and that one may take.
PERIOD, DEADLINE = 5.0, 12.0


class StorageWatch:
    """Keeps ``State.pools_health``."""

    def __init__(self, state: State, agents: Agents) -> None:
        self._state, self._agents = state, agents
        #: Pool (id) -> the node that gave no sample; another one is asked next.
        self._failed: dict[str, str] = {}

    @property
    def known(self) -> PoolsHealth:
        """All that is known now."""
        return self._state.pools_health

    def findings(self) -> list[Finding]:
        """For ``verify``: what the storage of the pools complains of. That nobody answers is found by looking."""
        found, now = [], self._state.clock.now()
        for ident, seen in self.known.items():
            pool = self._state.store.get(Pool, ident)
            if pool is None or seen.sample is None or seen.problem:
                continue
            commands = (f"atoll storage status {pool.name}",)
            refusal = seen.refusal()
            if refusal is not None:
                why = f"{refusal.reason} ({refusal.code})"
                found.append(Finding("error", "pool takes no new volumes", pool.name, why, now - seen.since[refusal.code], commands))
            for check in seen.sample.checks:
                if not check.muted and (refusal is None or check.code != refusal.code):
                    what = f"its storage complains: {check.code}"
                    found.append(Finding(check.severity, what, pool.name, check.summary, now - seen.since[check.code], commands))
        return found

    async def run(self) -> None:
        """Sample for ever; a pool that hangs holds up only its own."""
        asking: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                pools = {pool.id: pool for pool in self._state.store.all(Pool) if self._state.driver(pool).health}
                for gone in [ident for ident in self.known if ident not in pools]:
                    del self.known[gone]
                asking = {ident: task for ident, task in asking.items() if not task.done()}
                for ident, pool in pools.items():
                    if ident not in asking:
                        asking[ident] = asyncio.create_task(self._one(pool))
                await asyncio.sleep(PERIOD)
        finally:
            for task in asking.values():
                task.cancel()

    def _node(self, pool: Pool) -> Node | None:
        """Who is asked: an agent that answers, if it can be not the one that had no answer last."""
        nodes = self._state.pool_nodes(pool)
        return next((node for node in nodes if node.id != self._failed.get(pool.id)), nodes[0] if nodes else None)

    async def _one(self, pool: Pool) -> None:
        before, at = self.known.get(pool.id) or Seen(0.0), self._state.clock.now()
        node = self._node(pool)
        if node is None:
            self.known[pool.id] = replace(before, problem="no node that manages this pool answers")
            return
        try:
            ref = self._state.ref(pool, node).model_dump(mode="json")
            told = Health(**await self._agents.ask(node.id, "pool.health", {"ref": ref}, deadline=DEADLINE))
            self.known[pool.id] = before.followed(told, at)
            self._failed.pop(pool.id, None)
        except AtollError as error:
            self._failed[pool.id] = node.id
            self.known[pool.id] = replace(before, problem=f"{node.name}: {error.message}")
