"""What ``cluster verify`` finds of storage: pools that do not answer, guests that their storage stopped, images that do not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.model.errors import AtollError
from atoll.model.objects import Instance, Node, Pool, Volume, VolumeState
from atoll.operations import trouble
from atoll.operations.index import Index

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents

#: Seconds that an agent has to list a pool; and one whose storage is silent on another node, and so perhaps on this one.
PATIENCE, IMPATIENCE = 15.0, 3.0


class StorageFindings:
    """Compares records with what agents report and what the storage shows. ``working_on``: whether a job has to do with a volume id."""

    def __init__(self, state: State, agents: Agents, engine: Engine, working_on: Callable[[str], bool]) -> None:
        self._state, self._agents, self._engine, self._working_on = state, agents, engine, working_on

    async def look(self) -> list[Finding]:
        """All findings."""
        found = [*self._stalled(), *self._stopped_guests()]
        # All pools at a time: one that is slow holds up none of the others.
        for findings in await asyncio.gather(*(self._pool(pool) for pool in self._state.store.all(Pool))):
            found += findings
        return found

    # --- from the agents' reports ---

    def _stalled(self) -> list[Finding]:
        found = []
        for node in self._state.store.all(Node):
            report = self._state.health.report(node.id)
            if report is None or not self._state.health.alive(node.id):
                continue
            for pool, reason in report.stalled_pools.items():
                record = self._state.store.get(Pool, pool)
                name = record.name if record else pool
                since = report.stalled_for.get(pool)
                commands = (f"atoll pool info {name}", f"on {node.name}: look at the mount and the kernel log (dmesg | tail)")
                found.append(Finding("error", "pool is stalled on a node", f"{name} on {node.name}", reason, since, commands))
        return found

    def _stopped_guests(self) -> list[Finding]:
        found = []
        index = Index(self._state)
        for instance in self._state.store.all(Instance):
            holder = self._state.claim(instance.id).holder
            guest = index.guests.get((holder, instance.id)) if holder and self._state.health.alive(holder) else None
            if guest is not None and guest.state == "paused" and guest.reason.startswith(trouble.IO_ERROR):
                about = f"{instance.name} on {index.node_name(holder)}"
                commands = tuple(trouble.commands(instance, guest, index))
                found.append(Finding("error", "guest stands still: io-error", about, trouble.why(guest, index), None, commands))
        return found

    # --- from the storage ---

    async def _pool(self, pool: Pool) -> list[Finding]:
        state = self._state
        local = state.driver(pool).node_local
        nodes = [n for n in state.store.all(Node) if n.group in pool.groups and state.health.alive(n.id) and not n.offline]
        # Those where it is stalled are told of already, and an answer from there would have to be waited for in vain.
        silent = [n for n in nodes if (report := state.health.report(n.id)) and pool.id in report.stalled_pools]
        nodes, patience = [n for n in nodes if n not in silent], IMPATIENCE if silent else PATIENCE
        found: list[Finding] = []
        for node in nodes if local else nodes[:1]:
            try:
                ref = state.ref(pool, node).model_dump(mode="json")
                images = await self._agents.ask(node.id, "volume.list", {"ref": ref}, deadline=patience)
            except AtollError as error:
                commands = (f"atoll pool check {pool.name}",)
                found.append(Finding("error", "pool cannot be listed", f"{pool.name} on {node.name}", error.message, None, commands))
                continue
            found += self._compare(pool, node, images, local)
        return found

    def _compare(self, pool: Pool, node: Node, images: list[dict[str, Any]], local: bool) -> list[Finding]:
        state = self._state
        place = f"{pool.name} on {node.name}" if local else pool.name
        known = {v.logical_id: v for v in state.store.all(Volume) if v.pool == pool.id and (not local or node.id in (v.node, v.secondary))}
        owned = {v.id for v in known.values()}
        found = []
        present = set()
        for image in images:
            present.add(image["logical_id"])
            age = state.clock.now() - image["modified"] if image["modified"] else None
            if image["volume"] and image["volume"] not in owned and not self._working_on(image["volume"]):
                adopt = f"atoll volume create --pool {pool.name} --adopt {image['logical_id']}" + (f" -n {node.name}" if local else "")
                why = "an image with one of our names that no volume owns"
                found.append(
                    Finding(
                        "warning",
                        "orphan image",
                        f"{image['logical_id']} in {place}",
                        why,
                        age,
                        (f"keep it: {adopt}", "or delete the file"),
                    )
                )
            volume = known.get(image["logical_id"])
            if volume is not None and volume.size != image["size"] and not self._engine.busy(volume.resource):
                why = f"the record says {volume.size} bytes, the image has {image['size']}"
                found.append(Finding("warning", "size differs", volume.name, why, age, (f"atoll volume info {volume.name}",)))
        for logical_id, volume in known.items():
            if logical_id and logical_id not in present and volume.state in (VolumeState.AVAILABLE, VolumeState.IN_USE):
                if self._engine.busy(volume.resource):
                    continue
                owner = state.store.get(Instance, volume.instance or "")
                fix = f"atoll instance recreate {owner.name}" if owner else f"atoll volume delete {volume.name}"
                found.append(Finding("error", "image is missing", f"{volume.name} in {place}", f"{logical_id} is not there", None, (fix,)))
        return found
