"""A master candidate's copy of the store, as the agent keeps it: opaque data. A base copy, and a log of numbered, checksummed changes.

``base``: a line of JSON (stream, number, size, sha256, at), then the copy. ``log``: a line that names the base it belongs to, then
records: a line (number, after, size, sha256, at) and the change. Both files are whole or not there: a base is renamed into its place, and
a log that belongs to another base, or its torn end, does not count. What a method has returned from survives a power cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from atoll.model.errors import Conflict, HostError, NotFound, StaleTerm
from atoll.model.messages import ReplicaState
from atoll.runtime.files import fsync_dir, write_durably

#: Bytes of one line that describes a base or a record at most.
_LINE = 1024


@dataclass(frozen=True)
class Change:
    """One record: the change ``data`` leads from revision ``after`` to ``number``."""

    number: int
    after: int
    data: bytes
    at: float


class Replica:
    """The copy in ``directory`` (0700). Methods may be called from any thread, one at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._base, self._log, self._new = directory / "base", directory / "log", directory / "base.new"
        self._lock = threading.Lock()
        self._state: ReplicaState | None = None
        #: The base that is being received: stream, number, and how many parts have come.
        self._coming: tuple[int, int, int] | None = None

    @property
    def state(self) -> ReplicaState:
        """What there is. Errors: HostError."""
        with self._lock:
            return self._load()

    def part(self, stream: int, number: int, part: int, parts: int, data: bytes, about: dict[str, Any]) -> ReplicaState:
        """One part of a base copy, from 0 to ``parts`` - 1; with the last one it takes the place of everything before.

        ``about``: the ``sha256`` of the whole copy, when it was made (``at``) and by whom (``master``). Errors: Conflict when a part is
        missing or damaged (begin again), StaleTerm, HostError.
        """
        with self._lock:
            self._check_stream(stream)
            state = self._load()
            if (state.stream, state.number) > (stream, number):
                return state  # a late copy of an order: what is here is newer
            if part == 0:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._new.unlink(missing_ok=True)
            elif self._coming != (stream, number, part):
                raise Conflict(f"part {part} of the copy came where another was expected", hint="the master sends the copy again")
            try:
                self._append_to(self._new, data)
            except OSError as error:
                raise HostError(f"cannot write {self._new}: {error.strerror}") from None
            self._coming = (stream, number, part + 1)
            if part + 1 == parts:
                self._coming = None
                self._take(stream, number, about)
            return self._load()

    def _take(self, stream: int, number: int, about: dict[str, Any]) -> None:
        body = self._new.read_bytes()
        if hashlib.sha256(body).hexdigest() != about["sha256"]:
            raise Conflict("the copy was damaged on its way", hint="the master sends it again")
        head = {"stream": stream, "number": number, "size": len(body), **about}
        self._state = None
        write_durably(self._base, _line(head) + body)
        # Until this is there, the old log does not count: it names another base.
        write_durably(self._log, _line({"stream": stream, "number": number}))
        self._new.unlink(missing_ok=True)

    def append(self, stream: int, changes: list[tuple[Change, str]]) -> ReplicaState:
        """Add changes with their sha256; those that are there already are left alone. Gives the state: when its stream or number is
        not what the master has sent, something is missing, and a base copy is wanted. Errors: Conflict (damaged), StaleTerm, HostError."""
        with self._lock:
            self._check_stream(stream)
            state = self._load()
            if state.stream != stream:
                return state
            lines = b""
            number, at = state.number, state.at
            for change, sha256 in changes:
                if change.number <= number:
                    continue
                if change.after != number:
                    break
                if hashlib.sha256(change.data).hexdigest() != sha256:
                    raise Conflict(f"change {change.number} was damaged on its way", hint="the master sends it again")
                head = {"number": change.number, "after": change.after, "size": len(change.data), "sha256": sha256, "at": change.at}
                lines += _line(head) + change.data + b"\n"
                number, at = change.number, change.at
            if lines:
                self._state = None
                try:
                    self._append_to(self._log, lines, at_most=state.log_size)
                except OSError as error:
                    raise HostError(f"cannot write {self._log}: {error.strerror}") from None
                self._state = state.model_copy(update={"number": number, "at": at, "log_size": state.log_size + len(lines)})
            return self._load()

    def forget(self) -> None:
        """Remove everything. Nothing there is success. Errors: HostError."""
        with self._lock:
            self._state, self._coming = None, None
            try:
                if self._directory.exists():
                    shutil.rmtree(self._directory)
                    fsync_dir(self._directory.parent)
            except OSError as error:
                raise HostError(f"cannot remove {self._directory}: {error.strerror}") from None

    def read(self) -> tuple[ReplicaState, bytes, list[Change]]:
        """The state, the base copy and the changes after it. Errors: NotFound when there is none, HostError when it is damaged."""
        with self._lock:
            self._state = None
            state = self._load()
            if not state.stream:
                what = "is damaged" if self._base.exists() else "is not there"
                raise NotFound(f"the copy of the store in {self._directory} {what}", hint="restore a backup: atoll cluster restore FILE")
            head, body = self._base_body()
            return state, body, [change for change, _ in self._records(state.stream, head["number"]) if change is not None]

    # --- files ---

    def _check_stream(self, stream: int) -> None:
        have = self._load().stream
        if stream < have:
            raise StaleTerm(f"a master with term {stream} ships its store, but this node has that of term {have}")

    def _load(self) -> ReplicaState:
        if self._state is None:
            self._state = self._look()
        return self._state

    def _look(self) -> ReplicaState:
        try:
            head, body = self._base_body()
        except (FileNotFoundError, ValueError):
            return ReplicaState()
        except OSError as error:
            raise HostError(f"cannot read {self._base}: {error.strerror}") from None
        state = ReplicaState(stream=head["stream"], number=head["number"], base_size=len(body), at=head["at"], master=head["master"])
        end = 0
        for change, position in self._records(head["stream"], head["number"]):
            end = position
            if change is not None:
                state = state.model_copy(update={"number": change.number, "at": change.at})
        if not end:
            # A base whose log was not made any more, by a power cut: begin it now.
            write_durably(self._log, _line({"stream": head["stream"], "number": head["number"]}))
            end = self._log.stat().st_size
        return state.model_copy(update={"log_size": end})

    def _base_body(self) -> tuple[dict[str, Any], bytes]:
        with open(self._base, "rb") as file:
            head: dict[str, Any] = json.loads(file.readline(_LINE))
            body = file.read()
        if hashlib.sha256(body).hexdigest() != head.get("sha256"):
            raise ValueError("the base copy is damaged")
        return head, body

    def _records(self, stream: int, number: int) -> Iterator[tuple[Change | None, int]]:
        """The good records of the log with the position of their ends; first (None, end of the first line), if it is this base's log."""
        try:
            with open(self._log, "rb") as file:
                first = _parsed(file.readline(_LINE))
                if first is None or (first.get("stream"), first.get("number")) != (stream, number):
                    return
                yield None, file.tell()
                while (found := _record(file)) is not None and found.after == number:
                    number = found.number
                    yield found, file.tell()
        except FileNotFoundError:
            return

    def _append_to(self, path: Path, data: bytes, at_most: int | None = None) -> None:
        """Append, durably. ``at_most``: what lies beyond is a torn end, and is cut off first."""
        new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if at_most is not None:
                os.ftruncate(handle, at_most)
            os.lseek(handle, 0, os.SEEK_END)
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            fsync_dir(path.parent)


def _line(head: dict[str, Any]) -> bytes:
    return json.dumps(head).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _record(file: BinaryIO) -> Change | None:
    """The next record; None at the end, torn or not."""
    head = _parsed(file.readline(_LINE))
    if head is None:
        return None
    try:
        data = file.read(head["size"])
        good = file.read(1) == b"\n" and hashlib.sha256(data).hexdigest() == head["sha256"]
        return Change(head["number"], head["after"], data, head["at"]) if good else None
    except (KeyError, TypeError):
        return None
