"""The pool half: a directory on the node's own file system."""

from __future__ import annotations

from atoll.model.messages import PoolRef
from atoll.storage.files.pool import FilePool


def Pool(ref: PoolRef) -> FilePool:
    """The driver for one pool."""
    return FilePool(ref, shared=False)
