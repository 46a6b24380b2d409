"""``cluster verify``: look at everything and explain what does not fit. It changes nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.master.verify_nodes import NodeFindings
from atoll.master.verify_records import RecordFindings
from atoll.master.verify_remains import RemainFindings
from atoll.master.verify_storage import StorageFindings
from atoll.model.errors import AtollError
from atoll.model.objects import DeathProof, Hold, Instance, Job, JobState, Node, Volume, VolumeState
from atoll.operations.replication import LATE
from atoll.operations.trouble import IO_ERROR

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents


#: The worst first.
SEVERITIES = {"error": 0, "warning": 1, "info": 2}


class Verifier:
    """Compares records, agents and storage."""

    def __init__(self, state: State, agents: Agents, engine: Engine) -> None:
        self._state, self._agents, self._engine = state, agents, engine

    async def look(self) -> list[Finding]:
        """All findings, errors first."""
        found = [*self._nodes(), *NodeFindings(self._state, self._engine.busy).look(), *self._candidates(), *self._jobs(), *self._volumes()]
        guests = await self._guests()
        found += guests
        found += RecordFindings(self._state, self._engine).look()
        found += await RemainFindings(self._state, self._agents, self._engine, self._working_on).look()
        found += await StorageFindings(self._state, self._agents, self._engine, self._working_on).look()
        return sorted(found, key=lambda f: (SEVERITIES.get(f.severity, 3), f.about))

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
        return found

    def _candidates(self) -> list[Finding]:
        """Copies of the store that are too old, and keys that lie where they should not."""
        state, found = self._state, []
        now = state.clock.monotonic()
        for node in state.store.all(Node):
            copy = state.replication.row(node.id, state.store.revision, now)
            if copy is not None and (copy["seconds"] or 0.0) > LATE:
                behind = f"it lacks {copy['behind']} changes" if copy["behind"] is not None else "it has got no copy from this master yet"
                why = f"{behind}{': ' if copy['problem'] else ''}{copy['problem']}"
                what = "a master candidate's copy of the store is old"
                found.append(Finding("warning", what, node.name, why, copy["seconds"], (f"atoll node info {node.name}",)))
            elif copy is None and node.holds_keys and node.id != state.replication.master and "master-candidate" not in node.roles:
                why = "it is no master candidate any more, and has not said yet that it has removed them"
                commands = ("let the node come back; atoll node list",)
                found.append(Finding("warning", "a node may hold the keys of a master", node.name, why, None, commands))
        for rival in self._agents.rivals():
            name = state.store.require(Node, rival).name
            why = "nothing is begun anywhere until it has said that it has not taken over, or is declared dead"
            what = "a master candidate has not acknowledged this master"
            found.append(Finding("error", what, name, why, None, (f"atoll node declare-dead {name}",)))
        return found

    def _jobs(self) -> list[Finding]:
        found = []
        for hold in self._state.store.all(Hold):
            found.append(Finding("error", "held by a job that needs attention", hold.id, hold.reason, None, hold.commands))
        for job in self._state.store.active(Job):
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
        return any(job.state.active and ident in str(self._engine.steps(job.number)) for job in self._state.store.active(Job))

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
                elif guest["state"] in ("paused", "hung") and not guest["reason"].startswith(IO_ERROR):
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

    async def _ask(self, node: str, method: str, args: dict[str, Any]) -> Any:
        try:
            return await self._agents.ask(node, method, args, deadline=15.0)
        except AtollError:
            return None
