"""The directory of a pool. It is opened once for each call, checked, and everything is done relative to that open directory: an
unmount in between cannot redirect a write into what lies below."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atoll.model.errors import AtollError, Conflict, HostError, InvalidInput, PoolFull, PoolUnavailable
from atoll.model.messages import PoolRef

MARKER = ".atoll-pool"
_GONE = frozenset({errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ESHUTDOWN})


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    point: str
    fstype: str


def mount_of(fd: int) -> Mount:
    """The mount that an open file lies on."""
    number = next(line.split()[1] for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("mnt_id:"))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[0] == number:
            return Mount(_unescape(fields[4]), fields[fields.index("-") + 1])
    raise HostError(f"/proc/self/mountinfo does not list mount {number}")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def explain(error: OSError, what: str) -> AtollError:
    """What an error of the file system means for a pool."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PoolFull(f"{what}: no space left")
    if error.errno in _GONE:
        return PoolUnavailable(f"{what}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PoolUnavailable(f"{what}: {error.strerror}", hint="look at the directory's permissions and mount options")
    return HostError(f"{what}: {error.strerror}")


class Directory:
    """A pool's directory. ``shared``: it must not lie on the root file system unless the option ``mount`` says so."""

    def __init__(self, ref: PoolRef, *, shared: bool, sub: str = "") -> None:
        self._ref, self._shared, self._sub = ref, shared, sub
        self.path = str(Path(ref.options["path"]) / sub) if sub else ref.options["path"]

    @contextlib.contextmanager
    def open(self, *, unmarked: bool = False) -> Iterator[int]:
        """The directory's descriptor, after the checks. ``unmarked``: the pool's mark may still be missing.

        Errors: PoolUnavailable, Conflict (another pool's directory), InvalidInput.
        """
        if not os.path.isabs(self.path):
            raise InvalidInput(f"the path of pool {self._ref.name} is not absolute: {self.path}", hint="path=/srv/shared/images")
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            where = f" on {self._ref.node}" if self._ref.node else ""
            raise PoolUnavailable(
                f"directory {self.path} of pool {self._ref.name}{where}: {error.strerror}", hint="mount it, or make the directory"
            ) from None
        try:
            self._check_mount(fd)
            if not unmarked:
                self.check_mark(fd)
            yield fd
        except OSError as error:
            raise explain(error, f"pool {self._ref.name} ({self.path})") from error
        finally:
            os.close(fd)

    def _check_mount(self, fd: int) -> None:
        wanted = self._ref.options.get("mount", "auto") or "auto"
        if wanted == "none" or (wanted == "auto" and not self._shared):
            return
        mount = mount_of(fd)
        if wanted == "auto" and mount.point == "/":
            raise PoolUnavailable(
                f"{self.path} lies on the root file system, so the share of pool {self._ref.name} is not mounted; "
                "nothing is written into a bare mount point",
                hint=f"mount the share on {self._ref.node or 'the node'}; or, if it is meant so, set mount=none",
            )
        if wanted != "auto" and mount.point != os.path.normpath(wanted):
            raise PoolUnavailable(
                f"{self.path} lies on the mount {mount.point}, but pool {self._ref.name} must be on {wanted}, which is not mounted",
                hint=f"mount {wanted}",
            )

    def check_mark(self, fd: int) -> None:
        """Errors: PoolUnavailable when the mark is missing, Conflict when it is another pool's."""
        mark = self.read_mark(fd)
        if mark is None:
            raise PoolUnavailable(
                f"{self.path} is not marked as pool {self._ref.name}: the share is not mounted, or it is another one; "
                "nothing is written into a bare mount point",
                hint=f"mount the share, then: atoll pool check {self._ref.name}",
            )
        self._check_owner(mark)

    def _check_owner(self, mark: dict[str, str]) -> None:
        if mark.get("pool") != self._ref.id:
            whose = f"pool {mark.get('name', '?')} ({mark.get('pool', '?')})"
            raise Conflict(f"{self.path} belongs to {whose}", hint=f"choose another directory, or remove {self.path}/{MARKER}")

    def read_mark(self, fd: int) -> dict[str, str] | None:
        """The mark, or None."""
        try:
            handle = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            return None
        with os.fdopen(handle) as file:
            try:
                mark: dict[str, str] = json.load(file)
            except ValueError:
                raise Conflict(f"{self.path}/{MARKER} cannot be read", hint="look at it; remove it if the directory is free") from None
        return mark

    def mark(self, fd: int) -> None:
        """Mark the directory as this pool's, durably; marked already is success. Errors: Conflict."""
        present = self.read_mark(fd)
        if present is not None:
            self._check_owner(present)
            return
        mark = {"pool": self._ref.id, "cluster": self._ref.cluster, "name": self._ref.name, "mount": mount_of(fd).point}
        partial = MARKER + ".new"
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=fd)
        with os.fdopen(handle, "w") as file:
            json.dump(mark, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, MARKER, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)

    def unmark(self, fd: int) -> None:
        """Remove this pool's mark; another's stays."""
        mark = self.read_mark(fd)
        if mark is not None and mark.get("pool") == self._ref.id:
            os.unlink(MARKER, dir_fd=fd)
            os.fsync(fd)
