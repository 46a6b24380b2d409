"""The pool half: a directory on a file system that every node mounts."""

from __future__ import annotations

from atoll.model.messages import PoolRef
from atoll.storage.files.pool import FilePool


def Pool(ref: PoolRef) -> FilePool:
    """The driver for one pool."""
    return FilePool(ref, shared=True)
