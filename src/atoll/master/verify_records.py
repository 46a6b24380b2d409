"""What ``cluster verify`` finds in the records alone: what has outlived its owner, and what contradicts itself. Each would be a bug, or a
store that somebody has changed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from atoll.api.leader import Finding
from atoll.model.objects import Claim, Group, Hold, Instance, Job, JobState, Node, Pool, Volume, VolumeState

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State

_REPORT = "atoll cluster support-bundle"


class RecordFindings:
    """Looks at the store. What a job works on is in between, and left alone."""

    def __init__(self, state: State, engine: Engine) -> None:
        self._state, self._engine = state, engine

    def look(self) -> list[Finding]:
        """All findings."""
        return [*self._holds(), *self._claims(), *self._instances(), *self._volumes(), *self._names()]

    def _holds(self) -> Iterator[Finding]:
        for hold in self._state.store.all(Hold):
            job = self._state.store.get(Job, f"{hold.job:010d}")
            if job is None or job.state.ended:
                why = f"job {hold.job} {'is forgotten' if job is None else f'is {job.state}'}; a master that begins drops such holds"
                yield Finding("error", "a hold has outlived its job", hold.id, why, None, ("systemctl restart atoll-master", _REPORT))

    def _claims(self) -> Iterator[Finding]:
        nodes = {node.id for node in self._state.store.all(Node)}
        for claim in self._state.store.all(Claim):
            instance = self._state.store.get(Instance, claim.id)
            if instance is None:
                if not self._engine.busy(f"instance:{claim.id}"):
                    yield Finding("error", "a claim of nothing", claim.id, "there is no such instance", None, (_REPORT,))
                continue
            gone = [node for node in claim.nodes if node not in nodes]
            if gone:
                why = f"its claim is on {gone[0]}, which is no node of the cluster"
                yield Finding("error", "a claim on no node", instance.name, why, None, (_REPORT,))
            if claim.migration is not None and not self._engine.busy(instance.resource) and not self._open(claim.migration.job):
                why = f"job {claim.migration.job}, which began it, has ended"
                commands = (f"atoll job info {claim.migration.job}", _REPORT)
                yield Finding("error", "a migration that nobody works on", instance.name, why, None, commands)

    def _open(self, number: int) -> bool:
        job = self._state.store.get(Job, f"{number:010d}")
        return job is not None and (job.state.active or job.state is JobState.NEEDS_ATTENTION)

    def _instances(self) -> Iterator[Finding]:
        store = self._state.store
        for instance in store.all(Instance):
            if self._engine.busy(instance.resource):
                continue
            if store.get(Group, instance.group) is None:
                why = f"{instance.group} is no group of the cluster"
                yield Finding("error", "an instance of no group", instance.name, why, None, (_REPORT,))
            for number, disk in enumerate(instance.disks):
                volume = store.get(Volume, disk.volume)
                if volume is None:
                    why = f"disk {number} is {disk.volume}, which has no record"
                    commands = (f"atoll instance info {instance.name}", _REPORT)
                    yield Finding("error", "a disk without a volume", instance.name, why, None, commands)
                elif volume.instance != instance.id:
                    why = f"disk {number} is {volume.name}, whose record says {volume.instance or 'nobody'}"
                    yield Finding("error", "a disk of two minds", instance.name, why, None, (f"atoll volume info {volume.name}", _REPORT))

    def _volumes(self) -> Iterator[Finding]:
        store = self._state.store
        for volume in store.all(Volume):
            owner = store.get(Instance, volume.instance or "")
            if self._engine.busy(volume.resource) or (owner and self._engine.busy(owner.resource)):
                continue
            if volume.state in (VolumeState.CREATING, VolumeState.DELETING):
                continue
            why = ""
            if store.get(Pool, volume.pool) is None:
                why = f"its pool {volume.pool} has no record"
            elif volume.instance and owner is None:
                why = f"it belongs to {volume.instance}, which has no record"
            elif owner and volume.id not in [disk.volume for disk in owner.disks]:
                why = f"it belongs to {owner.name}, which does not have it"
            elif missing := [node for node in (volume.node, volume.secondary) if node and store.get(Node, node) is None]:
                why = f"it is on {missing[0]}, which is no node of the cluster"
            elif (volume.state is VolumeState.IN_USE) != (volume.instance is not None):
                why = f"it is {volume.state}, and belongs to {owner.name if owner else 'nobody'}"
            if why:
                yield Finding("error", "a volume that fits nothing", volume.name, why, None, (f"atoll volume info {volume.name}", _REPORT))

    def _names(self) -> Iterator[Finding]:
        for kind in (Instance, Volume, Pool, Node, Group):
            seen: set[str] = set()
            for item in self._state.store.all(kind):
                name = str(getattr(item, "name", ""))
                if name in seen:
                    why = f"two of them have the same name; {item.id} is one"
                    yield Finding("error", f"{kind.noun} names are not unique", name, why, None, (_REPORT,))
                seen.add(name)
