"""``cluster verify``: look at everything and explain what does not fit. It changes nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.model.errors import AtollError
from atoll.model.objects import DeathProof, Hold, Instance, Job, JobState, Node, Pool, Volume, VolumeState

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents


class Verifier:
    """Compares records, agents and storage."""

    def __init__(self, state: State, agents: Agents, engine: Engine) -> None:
        self._state, self._agents, self._engine = state, agents, engine
        self._why = ""

    async def look(self) -> list[Finding]:
        """All findings, errors first."""
        found = [*self._nodes(), *self._jobs(), *self._volumes()]
        guests = await self._guests()
        found += guests
        for pool in self._state.store.all(Pool):
            found += await self._pool(pool)
        order = {"error": 0, "warning": 1, "info": 2}
        return sorted(found, key=lambda f: (order.get(f.severity, 3), f.about))

    def _nodes(self) -> list[Finding]:
        found = []
        for node in self._state.store.all(Node):
            if node.offline:
                continue
            since = self._state.health.since(node.id)
            if not self._state.health.alive(node.id):
                found.append(
                    Finding(
                        "error",
                        "node does not answer",
                        node.name,
                        "never heard of it since this master began to lead" if since is None else f"last heard {since:.0f} s ago",
                        since,
                        (f"atoll node info {node.name}", f"atoll node failover {node.name} --node-is-dead"),
                    )
                )
            proof = self._state.store.get(DeathProof, node.id)
            if proof:
                age = self._state.clock.now() - proof.at
                found.append(Finding("warning", "node was declared dead", node.name, f"by {proof.method}: {proof.who}", age))
            report = self._state.health.report(node.id)
            for pool, reason in (report.stalled_pools if report else {}).items():
                found.append(Finding("error", "pool is stalled on a node", f"{node.name}/{pool}", reason, None, ("atoll pool check POOL",)))
        return found

    def _jobs(self) -> list[Finding]:
        found = []
        for hold in self._state.store.all(Hold):
            found.append(Finding("error", "held by a job that needs attention", hold.id, hold.reason, None, hold.commands))
        for job in self._state.store.all(Job):
            if job.state is JobState.NEEDS_ATTENTION and not job.locks.exclusive:
                found.append(Finding("error", "job needs attention", f"job {job.number}", job.reason, None, job.commands))
        return found

    def _volumes(self) -> list[Finding]:
        found = []
        for volume in self._state.store.all(Volume):
            half = volume.state in (VolumeState.CREATING, VolumeState.DELETING)
            if half and not self._engine.busy(volume.resource) and not self._working_on(volume.id):
                age = self._state.clock.now() - volume.created
                found.append(
                    Finding(
                        "warning", f"volume is {volume.state}, and no job works on it", volume.name, volume.id, age, ("atoll job list",)
                    )
                )
        return found

    def _working_on(self, ident: str) -> bool:
        return any(job.state.active and ident in str(self._engine.steps(job.number)) for job in self._state.store.all(Job))

    async def _guests(self) -> list[Finding]:
        state = self._state
        found: list[Finding] = []
        nodes = [n for n in state.store.all(Node) if state.health.alive(n.id)]
        answers = await asyncio.gather(*(self._ask(n.id, "guest.list", {}) for n in nodes))
        where: dict[str, list[str]] = {}
        for node, answer in zip(nodes, answers, strict=True):
            for guest in answer or []:
                instance = state.store.get(Instance, guest["instance"])
                where.setdefault(guest["instance"], []).append(node.name)
                about = f"{guest['name'] or guest['instance']} on {node.name}"
                if instance is None:
                    found.append(
                        Finding(
                            "error",
                            "stranger: a guest that no instance owns",
                            about,
                            f"instance id {guest['instance']}, pid {guest['pid']}, {guest['state']}",
                            None,
                            (f"on {node.name}: look at process {guest['pid']}, then end it",),
                        )
                    )
                elif node.id not in state.claim(instance.id).nodes and not self._engine.busy(instance.resource):
                    why = "the claim is elsewhere; the master kills this copy by itself"
                    found.append(Finding("error", "stale copy of a guest", about, why, None, (f"atoll instance info {instance.name}",)))
                elif guest["state"] in ("paused", "hung"):
                    found.append(
                        Finding(
                            "error", f"guest is {guest['state']}", about, guest["reason"], None, (f"atoll instance info {instance.name}",)
                        )
                    )
        alive = {n.id for n in nodes}
        for instance in state.store.all(Instance):
            holder = state.claim(instance.id).holder
            busy = self._engine.busy(instance.resource)
            if instance.desired == "running" and not busy and instance.id not in where and (holder is None or holder in alive):
                commands = (f"atoll instance start {instance.name}",)
                found.append(Finding("error", "guest is missing", instance.name, "it should run, and runs nowhere", None, commands))
        return found

    async def _pool(self, pool: Pool) -> list[Finding]:
        state = self._state
        local = state.driver(pool).node_local
        nodes = [n for n in state.store.all(Node) if n.group in pool.groups and state.health.alive(n.id) and not n.offline]
        found: list[Finding] = []
        for node in nodes if local else nodes[:1]:
            answer = await self._ask(node.id, "volume.list", {"ref": state.ref(pool, node).model_dump(mode="json")})
            if answer is None:
                commands = (f"atoll pool check {pool.name}",)
                found.append(Finding("error", "pool cannot be listed", f"{pool.name} on {node.name}", self._why, None, commands))
                continue
            found += self._compare(pool, node, answer, local)
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

    async def _ask(self, node: str, method: str, args: dict[str, Any]) -> Any:
        try:
            return await self._agents.ask(node, method, args, deadline=15.0)
        except AtollError as error:
            self._why = error.message
            return None
