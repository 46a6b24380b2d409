"""Snapshots of a simulated cluster's storage, of pools whose driver makes any. Nobody is ever shut out there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.model.errors import NotFound
from atoll.model.messages import PoolRef

if TYPE_CHECKING:
    from atoll.lab.boxstorage import SharedDisks


class BoxSnapshots:
    """This part of a ``BoxStorage``."""

    _disks: SharedDisks

    def _place(self, ref: PoolRef) -> dict[str, dict[str, Any]]:
        raise NotImplementedError

    def _find(self, ref: PoolRef, logical_id: str) -> dict[str, Any]:
        raise NotImplementedError

    def _stat(self, ref: PoolRef, logical_id: str) -> Any:
        raise NotImplementedError

    def _writers(self, ref: PoolRef, logical_id: str) -> Any:
        raise NotImplementedError

    def _create(self, ref: PoolRef, spec: dict[str, Any]) -> str:
        raise NotImplementedError

    def _kept(self, ref: PoolRef) -> dict[str, dict[str, Any]]:
        return self._disks.snapshots.setdefault(ref.id, {})

    def _snapshot(self, ref: PoolRef, logical_id: str, snapshot: str) -> Any:
        image = self._find(ref, logical_id)
        records = self._disks.world.images.get(image["volume"], 0)
        made = {"size": image["size"], "content": image.get("content"), "records": records}
        kept = self._kept(ref).setdefault(snapshot, made)
        return {"logical_id": f"box@{snapshot}", "snapshot": snapshot, "size": kept["size"], "source": logical_id}

    def _delete_snapshot(self, ref: PoolRef, snapshot: str, logical_id: str = "", source: str = "") -> None:
        self._place(ref)
        self._kept(ref).pop(snapshot, None)

    def _snapshots(self, ref: PoolRef) -> Any:
        self._place(ref)
        found = self._kept(ref).items()
        return [{"logical_id": f"box@{s}", "snapshot": s, "size": made["size"], "source": ""} for s, made in found]

    def _waiting(self, ref: PoolRef) -> Any:
        return []

    def _clone(self, ref: PoolRef, spec: dict[str, Any], snapshot: str) -> str:
        made = self._kept(ref).get(snapshot.removeprefix("box@"))
        if made is None:
            raise NotFound(f"there is no snapshot {snapshot}")
        logical_id = self._create(ref, spec)
        self._find(ref, logical_id).update(content=made["content"], parent=snapshot)
        self._disks.world.images[spec["volume"]] = made["records"]
        return logical_id

    def _flatten(self, ref: PoolRef, logical_id: str) -> bool:
        return self._find(ref, logical_id).pop("parent", None) is not None

    def _note(self, ref: PoolRef, logical_id: str, node: str = "") -> Any:
        return []

    def _readmit(self, ref: PoolRef, node: str) -> Any:
        return []

    def _fence(self, ref: PoolRef, logical_id: str, whom: str, volume: str = "") -> Any:
        return []

    def _ready(self, ref: PoolRef, logical_id: str, whom: str, volume: str = "") -> Any:
        stat = self._stat(ref, logical_id)
        return {"stat": stat, "out": [], "writers": self._writers(ref, logical_id) if stat else []}

    def _revoke(self, ref: PoolRef, volume: str, node: str = "") -> None:
        return None
