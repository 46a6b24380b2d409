"""The pool half: one sub-directory for each node in a directory that all nodes see; ``sync`` copies between them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from atoll.model.errors import NotFound
from atoll.model.messages import PoolRef, PoolStatus
from atoll.storage.files.pool import FilePool


class Pool(FilePool):
    """Files of this node's sub-directory, and a copy from the primary's to the secondary's."""

    def __init__(self, ref: PoolRef) -> None:
        super().__init__(ref, shared=False, sub=ref.node)

    def prepare(self, *, create: bool) -> PoolStatus:
        """Each node makes its own sub-directory."""
        if create:
            Path(self.directory.path).mkdir(exist_ok=True)
        return super().prepare(create=create)

    def sync(self, logical_id: str, primary: str, secondary: str) -> None:
        """Bring the second copy up to the first, durably. Errors: NotFound."""
        base = Path(self.ref.options["path"])
        source, target = base / primary / logical_id, base / secondary / logical_id
        if not source.exists() or not target.exists():
            raise NotFound(f"{logical_id} has not both of its copies")
        partial = target.with_name(f".atoll-sync-{logical_id}")
        shutil.copyfile(source, partial)
        status = target.stat()
        os.chmod(partial, status.st_mode)
        os.chown(partial, status.st_uid, status.st_gid)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
