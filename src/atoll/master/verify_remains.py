"""What ``cluster verify`` finds left behind on nodes: processes, attachments and loop devices that no record and no job needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.model.errors import AtollError
from atoll.model.objects import Instance, Node, Pool, Volume

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents

#: Seconds for an agent to look.
PATIENCE = 15.0
_BY_HAND = ".by-hand"


class RemainFindings:
    """Asks every agent what is there. An agent that is one version behind may not know the question; then nothing is said of its node."""

    def __init__(self, state: State, agents: Agents, engine: Engine, working_on: Callable[[str], bool]) -> None:
        self._state, self._agents, self._engine, self._working_on = state, agents, engine, working_on

    async def look(self) -> list[Finding]:
        """All findings."""
        nodes = [n for n in self._state.store.all(Node) if self._state.health.alive(n.id) and not n.offline]
        answers = await asyncio.gather(*(self._ask(n.id) for n in nodes))
        found: list[Finding] = []
        for node, seen in zip(nodes, answers, strict=True):
            found += [*self._exports(node, seen), *self._watchdogs(node, seen), *self._attached(node, seen), *self._others(node, seen)]
        return found

    async def _ask(self, node: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await self._agents.ask(node, "node.remains", {}, deadline=PATIENCE)
        except AtollError:
            return {}
        return found

    def _exports(self, node: Node, seen: dict[str, Any]) -> Iterator[Finding]:
        for ident, pid in seen.get("exports", {}).items():
            volume = self._state.store.get(Volume, ident)
            if self._working_on(ident) or self._busy(ident):
                continue
            name = volume.name if volume else ident
            why = "it served a disk for a copy; no job works on that any more"
            yield Finding("warning", "an export was left behind", f"{name} on {node.name}", why, None, (f"on {node.name}: kill {pid}",))

    def _watchdogs(self, node: Node, seen: dict[str, Any]) -> Iterator[Finding]:
        for ident, pid in seen.get("watchdogs", {}).items():
            if self._busy(ident) or self._state.claim(ident).migration is not None:
                continue
            instance = self._state.store.get(Instance, ident)
            about = f"{instance.name if instance else ident} on {node.name}"
            why = "it watched a migration; none is under way"
            yield Finding("warning", "a watchdog was left behind", about, why, None, (f"on {node.name}: kill {pid}",))

    def _busy(self, ident: str) -> bool:
        """Whether a job works on an instance or volume, or on what it belongs to."""
        volume = self._state.store.get(Volume, ident)
        owner = volume.instance if volume else None
        return any(self._engine.busy(name) for name in (f"instance:{ident}", f"volume:{ident}", f"instance:{owner}"))

    def _attached(self, node: Node, seen: dict[str, Any]) -> Iterator[Finding]:
        for owner, volumes in seen.get("attached", {}).items():
            ident, by_hand = owner.removesuffix(_BY_HAND), owner.endswith(_BY_HAND)
            instance = self._state.store.get(Instance, ident)
            if self._busy(ident) or not volumes:
                continue
            many = f"{len(volumes)} disk{'s' if len(volumes) > 1 else ''}"
            if instance is None:
                why = f"{many} of an instance that is no more"
                command = f"on {node.name}: systemctl restart atoll-agent, then rm /run/atoll/attached/{owner}.json"
                yield Finding("warning", "attached for nobody", f"{ident} on {node.name}", why, None, (command,))
            elif by_hand:
                why = f"{many}, so that an administrator can use them there; the instance cannot start meanwhile"
                command = f"atoll instance deactivate-disks {instance.name}"
                yield Finding("info", "disks are activated by hand", f"{instance.name} on {node.name}", why, None, (command,))
            elif node.id not in self._state.claim(ident).nodes:
                why = f"{many} attached for a guest that is not there"
                commands = (f"atoll instance info {instance.name}", f"on {node.name}: ls /run/atoll/attached")
                yield Finding("warning", "attached without its guest", f"{instance.name} on {node.name}", why, None, commands)

    def _others(self, node: Node, seen: dict[str, Any]) -> Iterator[Finding]:
        for worker in seen.get("workers", ()):
            pool = self._state.store.get(Pool, str(worker.get("key", "")).partition("/")[0])
            state = "hangs in the kernel" if worker.get("state") == "D" else "has not ended"
            why = f"process {worker['pid']} of an earlier agent {state}; it takes one of few places"
            about = f"{pool.name if pool else worker.get('key', '?')} on {node.name}"
            yield Finding("warning", "a storage worker was left behind", about, why, None, (f"on {node.name}: dmesg | tail",))
        pools = [p for p in self._state.store.all(Pool) if node.group in p.groups]
        for device, file in seen.get("loops", {}).items():
            # A deleted file has " (deleted)" behind.
            name = next((p.name for p in pools if p.options.get("path") and file.startswith(p.options["path"].rstrip("/") + "/")), None)
            if name is not None:
                why = f"{file}, a file of pool {name}: it writes past every lock, and keeps the space of a deleted file"
                commands = (f"on {node.name}: losetup -d /dev/{device}",)
                yield Finding("error", "a loop device has an image open", f"{device} on {node.name}", why, None, commands)
