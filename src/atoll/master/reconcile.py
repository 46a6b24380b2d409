"""The loop that brings guests back: a missing one is restarted on its claim's node only, after that node's own word.

A guest that a full pool has stopped goes on when there is room (see ``resume``). The loop never moves a claim, never deletes anything, and
kills a guest only on a node that is not among its claim's holders.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from atoll.master.resume import Resumer
from atoll.model.errors import AtollError
from atoll.model.messages import GuestStatus
from atoll.model.objects import Hold, Instance, JobState, Node

if TYPE_CHECKING:
    from atoll.master.leader import MasterLeader

log = structlog.get_logger()
#: Seconds between looks; and the longest pause after a restart that failed.
PERIOD, LONGEST_PAUSE = 1.0, 60.0


class Reconciler:
    """Looks at every instance, and submits jobs."""

    def __init__(self, leader: MasterLeader) -> None:
        self._leader = leader
        #: Since when nothing has worked on the instance; only reports younger than that count.
        self._quiet: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._jobs: dict[str, int] = {}
        self._resumer = Resumer(leader.state, leader.space_monitor)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.look()
            except AtollError as error:
                log.warning("reconcile", error=error.message)

    async def look(self) -> None:
        """One look at everything."""
        state = self._leader.state
        now = state.clock.monotonic()
        for instance in state.store.all(Instance):
            if self._leader.engine.busy(instance.resource) or state.store.get(Hold, instance.resource):
                self._quiet.pop(instance.id, None)
                self._seen.pop(instance.id, None)
                continue
            self._quiet.setdefault(instance.id, now)
            try:
                await self._instance(instance, now)
            except AtollError as error:
                # Such as a disk that is held: that must not keep the other instances waiting.
                log.warning("reconcile", instance=instance.name, error=error.message)
        await self._strangers()

    async def _instance(self, instance: Instance, now: float) -> None:
        state = self._leader.state
        claim = state.claim(instance.id)
        holder = claim.holder
        if holder is None and claim.migration is None and instance.desired == "running":
            # An operation that was to start it elsewhere was undone: an agent's word has freed the claim, so it runs nowhere.
            await self._submit("instance.restart-missing", instance, now)
            return
        if holder is None or claim.migration is not None or not state.health.alive(holder):
            return
        if self._leader.health.heard_at(holder) <= self._quiet[instance.id]:
            return
        report = state.health.report(holder)
        assert report is not None
        guest = next((g for g in report.guests if g.instance == instance.id), None)
        if guest is not None and guest.state == "shutdown":
            await self._submit("instance.powered-off", instance, now)
        elif instance.desired == "running" and (guest is None or guest.state == "gone"):
            self._seen[instance.id] = self._seen.get(instance.id, 0) + 1
            if self._seen[instance.id] >= 2:
                await self._submit("instance.restart-missing", instance, now)
        else:
            self._seen.pop(instance.id, None)
            if guest is not None and guest.state == "running":
                self._failures.pop(instance.id, None)
                self._resumer.runs(instance.id, now)
            elif guest is not None and guest.state == "paused" and self._resumer.due(instance, guest, holder, now):
                log.warning("reconcile", operation="instance.resume", instance=instance.name)
                await self._leader.submit_internal("instance.resume", instance.id)
                self._quiet.pop(instance.id, None)

    async def _submit(self, operation: str, instance: Instance, now: float) -> None:
        if now < self._not_before.get(instance.id, 0.0):
            return
        last = self._jobs.get(instance.id)
        if last is not None:
            self._failures[instance.id] = self._failures.get(instance.id, 0) + 1
            if self._leader.engine.job(last).state is JobState.DONE and operation == "instance.powered-off":
                self._failures.pop(instance.id, None)
        failures = self._failures.get(instance.id, 0)
        self._not_before[instance.id] = now + min(2.0**failures, LONGEST_PAUSE)
        log.warning("reconcile", operation=operation, instance=instance.name, failures=failures)
        self._jobs[instance.id] = await self._leader.submit_internal(operation, instance.id)
        self._quiet.pop(instance.id, None)
        self._seen.pop(instance.id, None)

    async def _strangers(self) -> None:
        state = self._leader.state
        for node in state.store.all(Node):
            report = state.health.report(node.id)
            if report is None or not state.health.alive(node.id):
                continue
            for guest in report.guests:
                if self._stale(node, guest):
                    await self._leader.submit_internal("node.kill-stale", f"{node.id}/{guest.instance}")

    def _stale(self, node: Node, guest: GuestStatus) -> bool:
        """A copy of a known instance on a node that its claim does not name, by a report younger than the last work on it."""
        state = self._leader.state
        instance = state.store.get(Instance, guest.instance)
        if instance is None or guest.state == "gone" or node.id in state.claim(guest.instance).nodes:
            return False
        quiet = self._quiet.get(guest.instance)
        if quiet is None or self._leader.health.heard_at(node.id) <= quiet:
            return False
        key = f"stale {node.id} {guest.instance}"
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < 2:
            return False
        del self._seen[key]
        self._quiet.pop(guest.instance, None)
        return True
