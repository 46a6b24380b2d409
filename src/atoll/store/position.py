"""How far a store has come, in a file of its own, so that a store that has gone back in time is noticed.

SQLite takes a write-ahead log that is missing, cut off or damaged for an old, quiet one: what was only in the log is gone, and nothing says
so. The number of the newest commit, kept beside the database, tells. It is written after each commit and without an fsync, which costs
some microseconds: after a power cut the file may be up to half a minute old, and then it notices less, but never anything wrong.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import structlog

from atoll.store.local import create_private

log = structlog.get_logger()
#: Bytes of the file: one write never crosses a page.
_WIDTH = 21


class Position:
    """The file ``path``. One thread uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        self._told = False

    def open(self) -> int:
        """The highest revision that was noted; 0 when nothing is known. Errors: StoreError."""
        create_private(self.path)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        text = os.pread(self._handle, _WIDTH, 0)
        return int(text) if len(text) == _WIDTH and text.strip().isdigit() else 0

    def when(self) -> str:
        """When it was noted last, in words."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.path.stat().st_mtime))

    def note(self, revision: int) -> None:
        """What was committed; only after the commit is durable."""
        if self._handle == -1:
            return
        try:
            os.pwrite(self._handle, b"%0*d\n" % (_WIDTH - 1, revision), 0)
        except OSError as error:
            # The commit itself is durable. An old note notices less.
            if not self._told:
                log.warning("the store's position cannot be noted", path=str(self.path), error=error.strerror)
            self._told = True

    def close(self) -> None:
        """Let go of the file."""
        handle, self._handle = self._handle, -1
        if handle != -1:
            os.close(handle)
