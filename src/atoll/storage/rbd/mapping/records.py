"""Which images are mapped on this node, by which way: kept in the run directory, which like the mappings is gone after a reboot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from atoll.model.errors import DeadlineExceeded
from atoll.runtime.files import read_json, write_durably
from atoll.storage.rbd.mapping.way import Image

#: Seconds to wait for whoever maps or unmaps the same volume.
_PATIENCE = 25.0
_held: list[int] = []


class Record(BaseModel):
    """An image that is mapped here, or whose mapping was begun."""

    model_config = ConfigDict(frozen=True)
    image: Image
    way: str


def directory() -> Path:
    """Where records lie, and what belongs to single mappings (``VOLUME.*``)."""
    return Path(os.environ.get("ATOLL_RUN_DIR") or "/run/atoll") / "maps"


def held() -> tuple[int, ...]:
    """The descriptors of the locks that this process holds."""
    return tuple(_held)


@contextlib.contextmanager
def locked(volume: str) -> Iterator[None]:
    """Nobody else on this node maps or unmaps the volume meanwhile. Errors: DeadlineExceeded."""
    directory().mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory() / f"{volume}.lock"
    end = time.monotonic() + _PATIENCE
    while (handle := _try(path)) is None:
        if time.monotonic() > end:
            raise DeadlineExceeded(f"{volume} is still being mapped or unmapped here", hint=f"fuser -v {path}")
        # Nothing tells when a lock of flock's is free but waiting without end.
        time.sleep(0.05)
    _held.append(handle)
    try:
        yield
    finally:
        _held.remove(handle)
        os.close(handle)


def _try(path: Path) -> int | None:
    """The lock, if it is free and the file is still the one of that name."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(handle).st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def find(volume: str) -> Record | None:
    """The record of a volume. Errors: HostError."""
    data = read_json(directory() / f"{volume}.json")
    return Record(**data) if data is not None else None


def everything() -> list[Record]:
    """All records. Errors: HostError."""
    found = (find(path.stem) for path in sorted(directory().glob("vol-*.json")))
    return [record for record in found if record is not None]


def keep(record: Record) -> None:
    """Write it, before the mapping is begun."""
    directory().mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(directory() / f"{record.image.volume}.json", json.dumps(record.model_dump(mode="json")))


def drop(volume: str) -> None:
    """Forget it, after the mapping has ended, with the lock held; not there is success."""
    (directory() / f"{volume}.json").unlink(missing_ok=True)
    (directory() / f"{volume}.lock").unlink(missing_ok=True)
