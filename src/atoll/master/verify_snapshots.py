"""What ``cluster verify`` finds of snapshots: those that no record owns, that are missing, and what was deleted and is still there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.model.objects import Pool, Snapshot, SnapshotState

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State


class SnapshotFindings:
    """What a pool's storage shows of snapshots, beside what the records say. ``working_on``: whether a job has to do with an id."""

    def __init__(self, state: State, engine: Engine, working_on: Callable[[str], bool]) -> None:
        self._state, self._engine, self._working_on = state, engine, working_on

    def records(self) -> Iterator[Finding]:
        """Records that no job finishes."""
        for snapshot in self._state.store.all(Snapshot):
            if snapshot.state is not SnapshotState.COMPLETED and not self._busy(snapshot.id):
                commands = (f"atoll snapshot delete {snapshot.name}",)
                age = self._state.clock.now() - snapshot.created
                what = f"snapshot is {snapshot.state}, and no job works on it"
                yield Finding("warning", what, snapshot.name, snapshot.id, age, commands)

    def compared(self, pool: Pool, shown: list[dict[str, Any]]) -> Iterator[Finding]:
        """Orphan and missing ones; ``shown``: what the storage has."""
        known = {s.id: s for s in self._state.store.all(Snapshot) if s.pool == pool.id}
        for stat in shown:
            if stat["snapshot"] not in known and not self._busy(stat["snapshot"]):
                why = f"a snapshot with one of our ids, of image {stat['source']}, that no record owns; it keeps that image on the storage"
                commands = ("delete it with the storage's own tools, such as rbd snap rm",)
                yield Finding("warning", "orphan snapshot", f"{stat['snapshot']} in {pool.name}", why, None, commands)
        present = {stat["snapshot"] for stat in shown}
        for snapshot in known.values():
            if snapshot.id not in present and snapshot.state is SnapshotState.COMPLETED and not self._busy(snapshot.id):
                why = "it was deleted by hand, so that no volume can be made from it; drop its record"
                commands = (f"atoll snapshot delete {snapshot.name}",)
                yield Finding("error", "snapshot is missing", f"{snapshot.name} in {pool.name}", why, None, commands)

    def waiting(self, pool: Pool, shown: list[dict[str, Any]]) -> Iterator[Finding]:
        """What was deleted and is still there."""
        for item in shown:
            yield Finding("info", "deleted, and still on the storage", f"{item['what']} in {pool.name}", item["why"], None)

    def _busy(self, ident: str) -> bool:
        return self._engine.busy(f"snapshot:{ident}") or self._working_on(ident)
