"""One command at a time works on a lab.

The lock is inherited by all helpers, so whoever gets it knows that no helper of a killed command is at work any more.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.model.errors import InUse


def _path(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


@contextmanager
def lab_lock(directory: Path, deadline: float = 30.0) -> Iterator[int]:
    """Hold the lock of the lab in ``directory``; gives the file descriptor that helpers inherit. It is beside the lab, not in it.

    Raises InUse after ``deadline`` seconds.
    """
    path = _path(directory)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    end = time.monotonic() + deadline
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
            os.close(handle)
            if time.monotonic() > end:
                raise InUse(f"another command works on the lab {directory.name} (process {holder or '?'})", hint=f"ps {holder}") from None
            time.sleep(0.02)
            continue
        # The one before us removes the file when it is done: a lock on a removed file protects nothing.
        if _same(handle, path):
            break
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        if not directory.exists() and _same(handle, path):
            path.unlink()
        os.close(handle)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def holder(directory: Path) -> int:
    """The pid of the command that last took the lock; 0 when unknown."""
    try:
        return int(_path(directory).read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0
