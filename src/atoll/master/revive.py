"""A copy of the store becomes a store again: what it says of guests is old, so agents are believed instead.

A copy is the truth up to some moment; what came later is lost. So everything that orders things in time jumps ahead of whatever an agent
may have seen, jobs that were under way are broken off, and each claim goes to where its guest is. What cannot be known stays where it may
be: a claim never leaves a node that was not asked (docs/explanation/what-can-be-lost.md lists every case).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from atoll.model.errors import BrokenOff, NeedsProof
from atoll.model.messages import GuestStatus, Recalled
from atoll.model.objects import (
    Claim,
    DeathProof,
    Hold,
    IdempotencyKey,
    Instance,
    Job,
    JobState,
    Node,
    Pool,
    Step,
    Stored,
    Volume,
)
from atoll.operations.instance_settle import settle_job
from atoll.operations.state import State

#: Further ahead than any cluster gets between two copies: terms, generations and job numbers.
JUMP = 1_000_000
#: States of a guest that has its disks open, or would go on by itself.
_ACTIVE = ("running", "paused", "hung", "shutdown")


@dataclass
class Revived:
    """What to write and to delete, and lines for people."""

    put: list[Stored] = field(default_factory=list)
    delete: list[Stored] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """One instance's guests, as the agents tell: node id -> guest."""

    guests: Mapping[str, GuestStatus]

    def nodes(self, *states: str) -> list[str]:
        """Where it is in one of these states, the highest generation first."""
        found = [node for node, guest in self.guests.items() if guest.state in states]
        return sorted(found, key=lambda node: -self.guests[node].generation)


class Reviver:
    """``facts``: what the agents that answer have told, by node id; ``dead``: nodes that a person calls dead, by id."""

    def __init__(self, state: State, facts: Mapping[str, Recalled], dead: set[str], operation: str, who: str) -> None:
        self._state, self._facts, self._dead = state, facts, dead
        self._operation, self._who = operation, who
        self._out = Revived()
        nodes = {node.id for node in state.store.all(Node)}
        #: Nodes that can neither be asked nor are dead: anything may run there.
        self.silent = sorted(nodes - set(facts) - dead)
        known = [int(ident) for ident in state.store.ids(Job)[-1:]] + [fact.job for fact in facts.values()]
        self._number = max(known, default=0) + JUMP

    def work(self) -> Revived:
        """Everything. Errors: NeedsProof when more than one node is silent and an instance may run on either."""
        for instance in self._state.store.all(Instance):
            self._instance(instance)
        self._jobs()
        self._nodes()
        self._strangers()
        return self._out

    # --- one instance ---

    def _instance(self, instance: Instance) -> None:
        claim = self._state.claim(instance.id)
        told = [fact.refused.get(instance.id, 0) for fact in self._facts.values()]
        seen = Seen({n: g for n, fact in self._facts.items() for g in fact.guests if g.instance == instance.id and g.state != "gone"})
        highest = max([claim.generation, *told, *(guest.generation for guest in seen.guests.values())])
        raised = claim.model_copy(update={"generation": highest + JUMP if highest else 0})
        pair = self._moving(claim, seen)
        if pair is not None:
            self._settle(instance, raised, *pair)
            return
        owners = [node for node in seen.nodes(*_ACTIVE) if self._newer(claim, node, seen.guests[node])]
        if owners:
            self._found(instance, claim, raised, owners[0], seen)
            return
        self._missing(instance, claim, raised)
        for node in seen.guests:
            where = self._name(node)
            self._say(f"{instance.name}: an older copy is on {where}; its claim had left that node before, so it will be ended there")

    def _newer(self, claim: Claim, node: str, guest: GuestStatus) -> bool:
        """Whether the guest is there by right: by the copy's own word, or by a claim that the copy does not know yet."""
        return node in claim.nodes or guest.generation > claim.generation or guest.generation == 0

    def _moving(self, claim: Claim, seen: Seen) -> tuple[str, str] | None:
        """Source and target of a migration that nobody has settled."""
        begun = seen.nodes("incoming", "migrated") or [n for n, guest in seen.guests.items() if guest.migration in ("active", "paused")]
        if claim.migration is not None and claim.holder is not None and set(seen.guests) <= set(claim.nodes):
            alone = seen.nodes(*_ACTIVE) == [claim.holder] and len(seen.guests) == 1 and claim.migration.target in self._facts
            return None if alone and not begun else (claim.holder, claim.migration.target)
        if not begun:
            return None
        arriving = seen.nodes("incoming")
        leaving = seen.nodes("migrated") or [n for n in seen.nodes(*_ACTIVE) if n not in arriving]
        target = arriving[0] if arriving else next((n for n in seen.nodes(*_ACTIVE) if n != leaving[0]), self._elsewhere(leaving[0]))
        source = leaving[0] if leaving else claim.holder
        if target is None or source is None or source == target:
            return None
        return source, target

    def _elsewhere(self, source: str) -> str | None:
        """Where a guest went whose target is not known: the silent node, else any other, where it will not be found."""
        return next((node.id for node in self._state.store.all(Node) if node.id != source and node.id in self.silent), None) or next(
            (node for node in self._facts if node != source), None
        )

    def _settle(self, instance: Instance, raised: Claim, source: str, target: str) -> None:
        self._number += 1
        shared, job = settle_job(self._state, self._number, instance, raised, source, target, self._state.clock.now())
        self._out.put += [shared, job, instance.model_copy(update={"desired": "running", "stopped_by": ""})]
        self._say(f"{instance.name}: was being moved from {self._name(source)} to {self._name(target)}; job {job.number} settles that")

    def _found(self, instance: Instance, claim: Claim, raised: Claim, node: str, seen: Seen) -> None:
        self._out.put.append(raised.model_copy(update={"holder": node, "migration": None}))
        self._out.put.append(instance.model_copy(update={"desired": "running", "home": node, "stopped_by": ""}))
        if node not in claim.nodes or instance.desired != "running":
            self._say(f"{instance.name}: runs on {self._name(node)}, which the copy did not know")
        for _, volume in self._state.volumes_of(instance):
            local = self._state.driver(self._state.store.require(Pool, volume.pool)).node_local
            if local and volume.node and node not in (volume.node, volume.secondary):
                self._out.put.append(volume.model_copy(update={"node": node}))
                self._say(f"{instance.name}: its disk {volume.name} went with it to {self._name(node)}")
        for other in seen.guests:
            if other != node:
                self._say(f"{instance.name}: another copy is on {self._name(other)}, with an older claim; it will be ended there")

    def _missing(self, instance: Instance, claim: Claim, raised: Claim) -> None:
        """No agent that answers has its guest."""
        holder = claim.holder if claim.holder and self._state.store.get(Node, claim.holder) else None
        there = self._facts.get(holder or "")
        if holder is not None and (there is None or there.refused.get(instance.id, 0) < claim.generation):
            # It cannot be asked, or has not let go of it: there it may be, or is to be started again.
            self._out.put.append(raised.model_copy(update={"migration": None}))
            return
        if len(self.silent) > 1:
            names = " and ".join(self._name(node) for node in self.silent)
            raise NeedsProof(
                f"{names} do not answer, and nobody knows on which of them instance {instance.name} may run",
                hint=f"mend all but one, or say which are off for certain: --node-is-dead {self._name(self.silent[0])}",
            )
        if self.silent:
            self._out.put.append(raised.model_copy(update={"holder": self.silent[0], "migration": None}))
            if holder is not None or instance.desired == "running":
                self._say(f"{instance.name}: may run on {self._name(self.silent[0])}, which does not answer")
            return
        self._out.put.append(raised.model_copy(update={"holder": None, "migration": None}))
        if holder is not None and instance.desired == "running" and not self._dead:
            # The node gave its word that it had let go of it, as for a stop: what was stopped is not started without being asked.
            by = "when the master was lost; start it if it should run"
            self._out.put.append(instance.model_copy(update={"desired": "stopped", "stopped_by": by}))
            self._say(f"{instance.name}: was let go by {self._name(holder)} and runs nowhere: taken to be stopped")

    # --- the rest ---

    def _jobs(self) -> None:
        now = self._state.clock.now()
        store = self._state.store
        for job in store.active(Job):
            # What became of it after the copy is not known: neither to repeat nor to undo it would be right.
            error = BrokenOff(f"the master was lost while this job was {job.state}").to_wire()
            update = {"state": JobState.UNDONE, "ended": now, "reason": "broken off: the master was lost", "error": error, "commands": ()}
            self._out.put.append(job.model_copy(update=update))
            self._out.delete += [*store.prefix(Step, f"{job.id}/"), *filter(None, [store.get(IdempotencyKey, job.key)])]
            self._say(f"job {job.number} was broken off: {job.summary or job.operation}")
        self._out.delete += store.all(Hold)
        self._number += 1
        done = {"state": JobState.DONE, "created": now, "started": now, "ended": now, "who": self._who}
        result = {"lines": list(self._out.lines)}
        summary = "take over as the master" if self._operation.endswith("failover") else "restore the store from a backup"
        # Also what keeps later numbers ahead of those that agents remember.
        self._out.put.append(Job(id=f"{self._number:010d}", operation=self._operation, summary=summary, result=result, **done))

    def _nodes(self) -> None:
        for node in sorted(self._dead):
            if self._state.store.get(DeathProof, node) is None:
                self._out.put.append(DeathProof(id=node, method="human", who=self._operation, at=self._state.clock.now()))
        for node in self.silent:
            # Your word was for another moment, and may have been taken back since.
            proof = self._state.store.get(DeathProof, node)
            self._out.delete += [proof] if proof else []
            self._say(f"{self._name(node)} does not answer: what it ran stays its own")

    def _strangers(self) -> None:
        store = self._state.store
        known = {volume.instance for volume in store.all(Volume)} | {instance.id for instance in store.all(Instance)}
        for node, fact in self._facts.items():
            for guest in fact.guests:
                if guest.instance not in known and guest.state != "gone":
                    name = guest.name or guest.instance
                    self._say(f"{name} on {self._name(node)}: newer than the copy, which does not know it; it runs on")

    def _say(self, line: str) -> None:
        self._out.lines.append(line)

    def _name(self, node: str) -> str:
        found = self._state.store.get(Node, node)
        return found.name if found else node
