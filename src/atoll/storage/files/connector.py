"""The node half of drivers that keep images as files: nothing is mapped or mounted for guests, so nothing stays attached. For people and
OS scripts an image becomes a loop device."""

from __future__ import annotations

import contextlib
import os
import pwd
from typing import Literal

from atoll.model.errors import InvalidInput
from atoll.model.messages import Attached, Connection, PoolRef
from atoll.storage import registry
from atoll.storage.files import images, loops, making
from atoll.storage.files.directory import Directory


class FileConnector:
    """See ``Connector``."""

    def _directory(self, connection: Connection) -> Directory:
        ref = PoolRef(**connection.data["pool"])
        moved = ref.model_copy(update={"options": {**ref.options, "path": connection.data["directory"]}})
        return Directory(moved, shared=not registry.info(ref.driver).node_local)

    def attach(self, connection: Connection, access: Literal["kernelspace", "userspace"]) -> Attached:
        """See ``Connector``. The pool's mark is checked: a guest never opens a file in a bare mount point. The image is given to the
        guests' user of this node: an adopted one had another owner, and the user's number may differ between nodes."""
        directory, logical_id = self._directory(connection), connection.data["logical_id"]
        with directory.open() as fd, images.opened(fd, logical_id, os.O_RDWR) as image:
            self._give(image)
            direct = self._can_direct(fd, logical_id)
        path = f"{directory.path}/{logical_id}"
        blockdev = {
            "driver": "file",
            "filename": path,
            "locking": "on" if connection.data["locking"] else "off",
            "aio": "threads",
            "discard": "unmap",
            "cache": {"direct": direct, "no-flush": False},
        }
        return Attached(volume=connection.volume, path=path, blockdev=blockdev)

    def _give(self, image: int) -> None:
        owner = os.environ.get("ATOLL_GUEST_USER", "")
        # Without such a user, or without the right (root is nobody on some shares), the hypervisor will say what it cannot open.
        with contextlib.suppress(KeyError, PermissionError):
            if owner and os.geteuid() == 0 and os.fstat(image).st_uid != pwd.getpwnam(owner).pw_uid:
                making.give(image, owner)

    def _can_direct(self, directory: int, logical_id: str) -> bool:
        """Not every file system has O_DIRECT (tmpfs has not)."""
        try:
            with images.opened(directory, logical_id, os.O_RDWR | os.O_DIRECT):
                return True
        except (OSError, InvalidInput):
            return False

    def detach(self, connection: Connection) -> None:
        """See ``Connector``. Nothing is attached but what the hypervisor has open."""

    def resized(self, connection: Connection) -> int:
        """See ``Connector``."""
        with self._directory(connection).open() as fd, images.opened(fd, connection.data["logical_id"]) as image:
            return os.fstat(image).st_size

    def attached(self) -> list[str]:
        """See ``Connector``."""
        return []

    def map(self, connection: Connection, *, read_only: bool) -> Attached:
        """See ``Connector``."""
        directory, logical_id = self._directory(connection), connection.data["logical_id"]
        flags = os.O_RDONLY if read_only else os.O_RDWR
        with directory.open() as fd, images.opened(fd, logical_id, flags) as image:
            return Attached(volume=connection.volume, path=loops.attach(image, connection.volume, read_only=read_only))

    def unmap(self, connection: Connection) -> None:
        """See ``Connector``. The image is synced, too: a loop device's own flush may have been lost with whoever wrote."""
        was = connection.volume in loops.mapped()
        loops.detach(connection.volume)
        if was:
            with self._directory(connection).open() as fd, images.opened(fd, connection.data["logical_id"]) as image:
                os.fsync(image)

    def unmap_others(self, keep: list[str]) -> list[str]:
        """See ``Connector``."""
        gone = sorted(set(loops.mapped()) - set(keep))
        for volume in gone:
            loops.detach(volume, patience=0.0)
        return gone
