"""The mark of a pool: an object that says whose Ceph pool (and namespace) this is."""

from __future__ import annotations

import json
from typing import Any

import rados

from atoll.model.errors import Conflict, PoolUnavailable
from atoll.model.messages import PoolRef

#: The mark itself. Its omap keeps the addresses of the agents' own connections, so that none is taken for a guest's.
MARK = "atoll_pool"
_LIMIT = 4096
_ANYWAY, _EXCLUSIVE = 0, 1
_TRASH = "rbd_trash"


def read(ioctx: Any, where: str) -> dict[str, str] | None:
    """The mark, None when there is none. Errors: Conflict when the object is not a mark."""
    try:
        text = ioctx.read(MARK, _LIMIT)
    except rados.ObjectNotFound:
        return None
    try:
        mark = json.loads(text)
    except ValueError:
        mark = None
    if not isinstance(mark, dict):
        raise Conflict(
            f"the object {MARK} in Ceph pool {where} is not the mark of a pool", hint=f"rados -p POOL rm {MARK}, if the pool is free"
        )
    return mark


def check(ioctx: Any, ref: PoolRef, where: str) -> None:
    """Errors: PoolUnavailable (not marked), Conflict (another pool's)."""
    mark = read(ioctx, where)
    if mark is None:
        raise PoolUnavailable(
            f"Ceph pool {where} is not marked as pool {ref.name}: it is another one, or the object {MARK} was removed",
            hint=f"if it is the right one: atoll pool mark {ref.name}",
        )
    if mark.get("pool") != ref.id:
        cluster = "" if mark.get("cluster") == ref.cluster else " of another cluster"
        raise Conflict(
            f"Ceph pool {where} belongs to pool {mark.get('name', '?')} ({mark.get('pool', '?')}){cluster}",
            hint=f"choose another Ceph pool or namespace; if that pool is gone: rados -p POOL rm {MARK}",
        )


def write(ioctx: Any, ref: PoolRef, where: str) -> None:
    """Mark it; marked already is success. Of two that mark at the same time, one loses. Errors: Conflict (another pool's)."""
    text = json.dumps({"pool": ref.id, "cluster": ref.cluster, "name": ref.name}).encode()
    with rados.WriteOpCtx() as operation:
        operation.new(_EXCLUSIVE)
        operation.write_full(text)
        try:
            ioctx.operate_write_op(operation, MARK)
        except rados.ObjectExists:
            pass
    check(ioctx, ref, where)


def make_trash(ioctx: Any) -> None:
    """Make the object in which Ceph lists what is in the trash; there already is success. Ceph makes it when it is needed first, which it
    could not while it is full: then nothing could be deleted."""
    with rados.WriteOpCtx() as operation:
        operation.new(_ANYWAY)
        ioctx.operate_write_op(operation, _TRASH)


def remove(ioctx: Any, ref: PoolRef, where: str) -> bool:
    """Remove this pool's mark; another's stays, and none is success. Whether it was there."""
    mark = read(ioctx, where)
    if mark is None or mark.get("pool") != ref.id:
        return False
    ioctx.remove_object(MARK)
    return True
