"""The audit log: who asked for what, when, from where, and what came of it. Lines of JSON in a file that is only appended to.

A thread of its own writes, so that a full or hanging disk never keeps a request waiting. What could not be written is counted, and the
first line that can be written again says so.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from atoll.runtime.secrets import redact

log = structlog.get_logger()
#: Bytes after which a new file is begun, and how many older ones are kept.
SIZE, KEEP = 32 << 20, 10
#: Lines that may wait for the disk.
WAITING = 10_000
#: Seconds to write what waits when the daemon ends.
LAST = 3.0


class AuditLog:
    """``path``: the newest file (0600); older ones have ``.1`` and so on behind. ``now``: seconds since 1970."""

    def __init__(self, path: Path, now: Callable[[], float], *, size: int = SIZE, keep: int = KEEP) -> None:
        self._path, self._now, self._size, self._keep = path, now, size, keep
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._busy = False
        self._lost = 0
        #: Why it cannot be written, and since when; empty: it can.
        self.trouble = ""
        self.trouble_since = 0.0
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry soon, with the time; values of secret fields are hidden. Never waits, never fails."""
        at = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"at": at, **redact(entry)}, default=str, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        with self._changed:
            if len(self._lines) >= WAITING:
                self._lost += 1
                return
            self._lines.append(line)
            self._changed.notify_all()

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(LAST)

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until nothing waits any more; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._busy, seconds)

    @property
    def lost(self) -> int:
        """How many entries could not be written and are not reported in the log itself yet."""
        return self._lost

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ending)
                if not self._lines:
                    return
                batch = list(self._lines)
                self._lines.clear()
                self._busy = True
            try:
                self._write(batch)
                self._better()
            except OSError as error:
                self._worse(batch, error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _write(self, batch: list[bytes]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        if self._path.exists() and self._path.stat().st_size >= self._size:
            self._turn()
        handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            data = b"".join([*self._before(handle), *batch])
            while data:
                data = data[os.write(handle, data) :]
            os.fdatasync(handle)
        finally:
            os.close(handle)

    def _before(self, handle: int) -> Iterator[bytes]:
        """What goes before a batch: an end for a line that a full disk cut off, and the count of what was lost."""
        end = os.lseek(handle, 0, os.SEEK_END)
        if end and os.pread(handle, 1, end - 1) != b"\n":
            yield b"\n"
        if self._lost:
            at = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            yield json.dumps({"at": at, "event": "lost", "entries": self._lost, "why": self.trouble}).encode() + b"\n"

    def _turn(self) -> None:
        """Begin a new file."""
        for number in range(self._keep, 0, -1):
            older = self._file(number)
            if number == self._keep:
                older.unlink(missing_ok=True)
            elif older.exists():
                older.rename(self._file(number + 1))
        self._path.rename(self._file(1))

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _better(self) -> None:
        if self.trouble:
            log.info("the audit log can be written again", lost=self._lost)
        with self._changed:
            self._lost, self.trouble, self.trouble_since = 0, "", 0.0

    def _worse(self, batch: list[bytes], error: OSError) -> None:
        if not self.trouble:
            log.error("the audit log cannot be written; requests go on without it", path=str(self._path), error=error.strerror)
            self.trouble_since = self._now()
        self.trouble = f"{self._path}: {error.strerror}"
        with self._changed:
            self._lost += len(batch)

    # --- reading ---

    def newest(self, limit: int, fits: Callable[[dict[str, Any]], bool] = lambda entry: True) -> list[dict[str, Any]]:
        """The newest entries that fit, oldest first. Reads files backwards, so call it in a thread. Errors: OSError."""
        found: list[dict[str, Any]] = []
        for number in range(self._keep + 1):
            path = self._file(number)
            if not path.exists():
                continue
            for line in _backwards(path):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off by a full disk
                if isinstance(entry, dict) and fits(entry):
                    found.append(entry)
                    if len(found) >= limit:
                        return found[::-1]
        return found[::-1]


def _backwards(path: Path, block: int = 1 << 16) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        rest = b""
        while at:
            size = min(block, at)
            at -= size
            file.seek(at)
            first, *others = (file.read(size) + rest).split(b"\n")
            yield from (line for line in reversed(others) if line)
            rest = first
        if rest:
            yield rest
