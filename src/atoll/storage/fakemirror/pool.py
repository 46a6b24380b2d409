"""The pool half: one sub-directory for each node in a directory that all nodes see; ``sync`` copies between them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from atoll.model.messages import PoolRef, PoolStatus
from atoll.model.units import MIB
from atoll.storage.files import images, making
from atoll.storage.files.directory import Directory
from atoll.storage.files.pool import FilePool


class Pool(FilePool):
    """Files of this node's sub-directory, and a copy from the primary's to the secondary's."""

    def __init__(self, ref: PoolRef) -> None:
        super().__init__(ref, shared=False, sub=ref.node)

    def prepare(self, *, create: bool) -> PoolStatus:
        """Each node makes its own sub-directory."""
        if create:
            with Directory(self.ref, shared=False).open(unmarked=True) as fd, contextlib.suppress(FileExistsError):
                os.mkdir(images.check_plain(self.ref.node), 0o755, dir_fd=fd)
                os.fsync(fd)
        return super().prepare(create=create)

    def sync(self, logical_id: str, primary: str, secondary: str) -> None:
        """Bring the second copy up to the first, durably. Errors: NotFound, DiskInUse (somebody writes one of them)."""
        locking = self._options.locking
        with (
            Directory(self.ref, shared=False, sub=images.check_plain(primary)).open() as here,
            Directory(self.ref, shared=False, sub=images.check_plain(secondary)).open() as there,
            images.opened(here, logical_id) as source,
        ):
            images.refuse_writer(source, logical_id, locking=locking)
            with images.opened(there, logical_id) as old:
                images.refuse_writer(old, logical_id, locking=locking)
            partial = images.TEMPORARY + logical_id
            with making.temporary(there, partial, locking=locking) as target:
                status = os.fstat(source)
                os.fchmod(target, status.st_mode & 0o777)
                os.fchown(target, status.st_uid, status.st_gid)
                os.ftruncate(target, status.st_size)
                for start, end in _data(source, status.st_size):
                    for at in range(start, end, MIB):
                        _write(target, os.pread(source, min(MIB, end - at), at), at)
                making.place(there, target, partial, logical_id)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where an image has data: what lies between is a hole, and stays one in the copy."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def _write(fd: int, data: bytes, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done
