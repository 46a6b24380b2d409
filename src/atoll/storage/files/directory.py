"""The directory of a pool. It is opened once for each call, checked, and everything is done relative to that open directory: an
unmount in between cannot redirect a write into what lies below."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from atoll.model.errors import AtollError, HostError, InvalidInput, InvalidSize, PoolFull, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.storage.files import marker, options
from atoll.storage.files.mountinfo import mount_of

_GONE = frozenset({errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ESHUTDOWN})


def explain(error: OSError, what: str) -> AtollError:
    """What an error of the file system means for a pool."""
    said = f"{what}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PoolFull(f"{what}: no space left")
    if error.errno == errno.EFBIG:
        return InvalidSize(f"{what}: its file system cannot hold a file of that size")
    if error.errno == errno.ENAMETOOLONG:
        return InvalidInput(f"{what}: the name is too long for its file system")
    if error.errno in _GONE:
        return PoolUnavailable(said)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PoolUnavailable(said, hint="look at the permissions (lsattr, too) and the mount options of what is named")
    return HostError(said)


class Directory:
    """A pool's directory. ``shared``: it must not lie on the root file system unless the option ``mount`` says so.
    ``sub``: the part of the directory that is meant."""

    def __init__(self, ref: PoolRef, *, shared: bool, sub: str = "") -> None:
        self._ref, self._shared, self._sub = ref, shared, sub

    @property
    def path(self) -> str:
        """Where it is. Errors: InvalidInput (bad options)."""
        return str(Path(options.parse(self._ref).path) / self._sub)

    @contextlib.contextmanager
    def open(self, *, unmarked: bool = False) -> Iterator[int]:
        """The directory's descriptor, after the checks. ``unmarked``: the pool's mark may still be missing.

        Errors: PoolUnavailable, Conflict (another pool's directory), InvalidInput (bad options).
        """
        path = self.path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            where = f" on {self._ref.node}" if self._ref.node else ""
            raise PoolUnavailable(
                f"directory {path} of pool {self._ref.name}{where}: {error.strerror}", hint="mount it, or make the directory"
            ) from None
        try:
            self._check_mount(fd, path)
            if not unmarked:
                self._check_mark(fd, path)
            yield fd
        except OSError as error:
            # Names are relative to the directory: which file it is about.
            about = f", {error.filename}" if isinstance(error.filename, str) and "/" not in error.filename else ""
            raise explain(error, f"pool {self._ref.name} ({path}{about})") from error
        finally:
            os.close(fd)

    def _check_mount(self, fd: int, path: str) -> None:
        wanted = options.parse(self._ref).mount
        if wanted == "none" or (wanted == "auto" and not self._shared):
            return
        mount = mount_of(fd)
        if wanted == "auto" and mount.point == "/":
            raise PoolUnavailable(
                f"{path} lies on the root file system, so the share of pool {self._ref.name} is not mounted; "
                "nothing is written into a bare mount point",
                hint=f"mount the share on {self._ref.node or 'the node'}; or, if it is meant so, set mount=none",
            )
        if wanted != "auto" and mount.point != os.path.realpath(wanted):
            raise PoolUnavailable(
                f"{path} lies on the mount {mount.point}, but pool {self._ref.name} must be on {wanted}, which is not mounted; "
                "nothing is written into a bare mount point",
                hint=f"mount {wanted}",
            )

    def _check_mark(self, fd: int, path: str) -> None:
        mark = marker.read(fd)
        if mark is None:
            raise PoolUnavailable(
                f"{path} is not marked as pool {self._ref.name}: the share is not mounted, or it is another one; "
                "nothing is written into a bare mount point",
                hint=f"mount the share; if its mark was removed: atoll pool mark {self._ref.name} -n {self._ref.node or 'NODE'}",
            )
        marker.check_owner(mark, self._ref, path)

    def mark(self, fd: int) -> None:
        """Mark the open directory as this pool's, durably; marked already is success. Errors: Conflict."""
        marker.write(fd, self._ref, self.path)

    def unmark(self, fd: int) -> bool:
        """Remove this pool's mark; another's stays. Whether it was there."""
        return marker.remove(fd, self._ref)
