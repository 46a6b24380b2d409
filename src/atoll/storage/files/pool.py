"""The pool half of every driver that keeps images as files. Drivers compose it; none inherits from another driver."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import Literal

from atoll.model.errors import AtollError, InvalidInput, NotSupported, PoolUnavailable
from atoll.model.messages import Connection, PoolRef, PoolStatus, Space, VolumeStat, Writer
from atoll.model.places import OPEN_DIRECTORY, lies_in
from atoll.storage.contract import VolumeSpec
from atoll.storage.files import images, locks, making, marker, options
from atoll.storage.files.directory import Directory
from atoll.storage.files.mountinfo import mount_of

_PROBE = ".atoll-probe"
#: Probe locks that this process holds: pool and directory -> descriptor.
_held: dict[str, int] = {}


class FilePool:
    """A directory of images. ``shared``: all nodes see the same directory. ``sub``: this node's part of it."""

    def __init__(self, ref: PoolRef, *, shared: bool, sub: str = "") -> None:
        self.ref = ref
        self.directory = Directory(ref, shared=shared, sub=sub)
        self._owner = os.environ.get("ATOLL_GUEST_USER", "")

    @property
    def _options(self) -> options.FileOptions:
        return options.parse(self.ref)

    def prepare(self, *, create: bool) -> PoolStatus:
        """See ``PoolDriver``. Leftovers of broken-off creations are removed."""
        with self.directory.open(unmarked=create) as fd:
            self._check_private()
            if create:
                self.directory.mark(fd)
            if self._options.locking:
                making.clean(fd)
        return self.check()

    def _check_private(self) -> None:
        """Errors: InvalidInput when operators may import, and so read, what lies in the directory."""
        path = self.directory.path
        if lies_in(path, OPEN_DIRECTORY) or lies_in(os.path.realpath(path), os.path.realpath(OPEN_DIRECTORY)):
            raise InvalidInput(
                f"{path} lies in {OPEN_DIRECTORY}, where operators may take images from: they could read the disks of pool {self.ref.name}",
                hint="choose another directory, such as /srv/images",
            )

    def mark(self, expected: list[str]) -> None:
        """See ``PoolDriver``."""
        with self.directory.open(unmarked=True) as fd:
            if expected and not any(images.describe(fd, wanted) for wanted in expected):
                raise PoolUnavailable(
                    f"none of the {len(expected)} images of pool {self.ref.name} is in {self.directory.path}: this is not its directory",
                    hint=f"mount its share on {self.ref.node}, then: atoll pool check {self.ref.name}",
                )
            self.directory.mark(fd)

    def forget(self) -> None:
        """See ``PoolDriver``."""
        with self.directory.open(unmarked=True) as fd:
            if self.directory.unmark(fd):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_PROBE, dir_fd=fd)

    def check(self) -> PoolStatus:
        """See ``PoolDriver``."""
        try:
            with self.directory.open() as fd:
                mount = mount_of(fd)
                details = {"mount": mount.point, "file system": mount.fstype}
                if (mark := marker.read(fd)) and mark.get("fstype"):
                    details["marked on"] = str(mark["fstype"])
                if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
                    return PoolStatus(ok=False, reason=f"{self.directory.path} is mounted read-only", details=details)
            if self._owner and not making.may_enter(self.directory.path, self._owner):
                reason = f"guests run as user {self._owner}, which may not enter {self.directory.path}"
                return PoolStatus(ok=False, reason=reason, hint=f"chmod a+x {shlex.quote(self._barrier())}", details=details)
            return PoolStatus(ok=True, space=self.space(), details=details)
        except AtollError as error:
            return PoolStatus(ok=False, reason=error.message, hint=error.hint or "")

    def _barrier(self) -> str:
        """The uppermost directory that the guests' user may not enter."""
        path = Path(os.path.realpath(self.directory.path))
        return str(next((p for p in reversed((path, *path.parents)) if not making.may_enter(str(p), self._owner)), path))

    def space(self) -> Space:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            found = os.fstatvfs(fd)
            return Space(total=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)

    def create(self, spec: VolumeSpec) -> str:
        """See ``PoolDriver``."""
        chosen = self._options
        preallocation = options.preallocation_of(spec.options, chosen.preallocation)
        with self.directory.open() as fd:
            return making.create(
                fd, spec.name, spec.volume, spec.size, preallocation=preallocation, owner=self._owner, locking=chosen.locking
            )

    def delete(self, logical_id: str) -> None:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            if logical_id.startswith(images.TEMPORARY) and images.volume_of(logical_id):
                making.discard(fd, logical_id, locking=self._options.locking)
            else:
                images.delete(fd, logical_id, locking=self._options.locking)

    def grow(self, logical_id: str, size: int) -> int:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            return making.grow(fd, logical_id, size, preallocation=self._options.preallocation)

    def rename(self, logical_id: str, volume: str, name: str) -> str:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            return images.rename(fd, logical_id, volume, name, locking=self._options.locking)

    def stat(self, logical_id: str) -> VolumeStat | None:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            return images.describe(fd, logical_id)

    def volumes(self) -> list[VolumeStat]:
        """See ``PoolDriver``."""
        with self.directory.open() as fd:
            return images.everything(fd)

    def adopt(self, source: str, volume: str) -> VolumeStat:
        """See ``PoolDriver``. The image stays where it is and keeps its name."""
        with self.directory.open() as fd:
            return images.adopt(fd, source, locking=self._options.locking)

    def writers(self, logical_id: str) -> list[Writer]:
        """See ``PoolDriver``."""
        if not self._options.locking:
            return []
        with self.directory.open() as fd:
            return images.writers(fd, logical_id)

    def probe_writers(self, action: Literal["hold", "look", "drop"]) -> bool:
        """See ``PoolDriver``."""
        key = f"{self.ref.id} {self.directory.path}"
        if action == "drop":
            if key in _held:
                os.close(_held.pop(key))
            return True
        if not self._options.locking:
            return False
        with self.directory.open() as directory:
            fd = os.open(_PROBE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            if action == "look":
                try:
                    return locks.writer_seen(fd)
                finally:
                    os.close(fd)
            if key in _held:
                os.close(_held.pop(key))
            _held[key] = fd
            return locks.lock_for_writing(fd)

    def connection(self, logical_id: str, volume: str, size: int, node: str = "") -> Connection:
        """See ``PoolDriver``."""
        data = {
            "pool": self.ref.model_dump(mode="json"),
            "directory": self.directory.path,
            "logical_id": images.check_plain(logical_id),
            "locking": self._options.locking,
        }
        return Connection(driver=self.ref.driver, volume=volume, size=size, data=data)

    def sync(self, logical_id: str, primary: str, secondary: str) -> None:
        """See ``PoolDriver``."""
        raise NotSupported(f"driver {self.ref.driver} keeps no second copy")
