"""A snapshot as what a new volume begins with."""

from __future__ import annotations

from typing import Any

from atoll.model.errors import InvalidInput, NotSupported, ShrinkRefused, WrongState
from atoll.model.objects import Pool, Snapshot, SnapshotState
from atoll.model.units import format_size
from atoll.operations.state import State


def plan_source(state: State, snapshot: str, pool: Pool, size: int | None, *, other: Any) -> dict[str, Any]:
    """What making a volume from a snapshot (its id) needs, with the volume's size. ``other``: something else that it shall be made from.

    Errors: NotFound, InvalidInput, NotSupported, WrongState, ShrinkRefused.
    """
    found = state.store.find(Snapshot, snapshot)
    driver = state.driver(pool)
    if other:
        raise InvalidInput("a volume is made from a snapshot, or from an image, or adopts one", hint="leave the others away")
    if found.pool != pool.id:
        home = state.store.require(Pool, found.pool)
        raise InvalidInput(
            f"snapshot {found.name} is in pool {home.name}; a volume from it cannot be in pool {pool.name}",
            hint=f"atoll volume create --from-snapshot {found.name} --pool {home.name}",
        )
    if not driver.clones:
        raise NotSupported(f"driver {driver.name} cannot make volumes from snapshots")
    if found.state is not SnapshotState.COMPLETED:
        raise WrongState(f"snapshot {found.name} is {found.state}", hint="atoll job list")
    if size is not None and size < found.size:
        raise ShrinkRefused(
            f"snapshot {found.name} has {format_size(found.size)}; a volume from it cannot have {format_size(size)}",
            hint=f"leave the size away, or give at least {format_size(found.size)}",
        )
    return {"id": found.id, "logical_id": found.logical_id, "size": found.size if size is None else size}
