"""All objects of one kind, in memory: by id, in order, and by name.

Objects that are over (``Stored.over``) are kept for long and asked for rarely. All but the newest of them are packed: as the compressed
JSON that the store has, from which they are made again when somebody asks. An object takes many times that.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from atoll.model.objects import Stored

T = TypeVar("T", bound=Stored)
#: How many objects that are over stay whole: those who wait for them ask at once.
WHOLE = 128


class Shelf(Generic[T]):
    """The objects of class ``cls``, with the revisions at which they were written."""

    def __init__(self, cls: type[T]) -> None:
        self.cls = cls
        self._named = "name" in cls.model_fields
        self._stated = "state" in cls.model_fields
        self._objects: dict[str, T | bytes] = {}
        self._ids: list[str] = []
        self._names: dict[str, str | set[str]] = {}
        self._sorted: list[T] | None = None
        self._active: set[str] = set()
        #: The newest of those that are over.
        self._whole: deque[str] = deque()
        self._states: Counter[str] = Counter()
        self._revisions: dict[str, int] = {}

    # --- reading ---

    def get(self, ident: str) -> T | None:
        found = self._objects.get(ident)
        return self._unpack(found) if isinstance(found, bytes) else found

    def all(self) -> list[T]:
        """All of them by id; the list is the caller's."""
        if len(self._active) != len(self._objects):
            return self._take(self._ids)
        if self._sorted is None:
            self._sorted = self._take(self._ids)
        return list(self._sorted)

    def active(self) -> list[T]:
        """Those that are not over, by id."""
        return self._take(sorted(self._active)) if len(self._active) != len(self._objects) else self.all()

    def ids(self, prefix: str = "") -> list[str]:
        """The ids that start with the prefix, in order."""
        if not prefix:
            return list(self._ids)
        first = bisect_left(self._ids, prefix)
        return self._ids[first : bisect_right(self._ids, prefix, lo=first, key=lambda ident: ident[: len(prefix)])]

    def prefix(self, prefix: str) -> list[T]:
        """Those whose id starts with the prefix, by id."""
        return self._take(self.ids(prefix))

    def by_name(self, name: str) -> T | None:
        """The one with this name; with several, the one with the lowest id."""
        ids = self._names.get(name)
        return self.get(ids if isinstance(ids, str) else min(ids)) if ids else None

    def states(self) -> Mapping[str, int]:
        """How many are in which state."""
        return +self._states

    def revision(self, ident: str) -> int:
        """The revision at which it was written; 0: there is none."""
        return self._revisions.get(ident, 0)

    def _take(self, ids: Iterable[str]) -> list[T]:
        found = [self._objects[ident] for ident in ids]
        return [self._unpack(item) if isinstance(item, bytes) else item for item in found]

    # --- changing ---

    def put(self, item: T, revision: int = 0) -> T | None:
        """Add or replace it; what was there before."""
        before = self.get(item.id)
        if before is None:
            insort(self._ids, item.id)
        self._objects[item.id] = item
        self._revisions[item.id] = revision
        self._index(before, item)
        if item.over:
            self._active.discard(item.id)
            self._whole.append(item.id)
            if len(self._whole) > WHOLE:
                self._pack(self._whole.popleft())
        else:
            self._active.add(item.id)
        return before

    def remove(self, ident: str) -> T | None:
        """Take it away; what was there before."""
        before = self.get(ident)
        if before is not None:
            del self._objects[ident], self._revisions[ident]
            del self._ids[bisect_left(self._ids, ident)]
            self._active.discard(ident)
            self._index(before, None)
        return before

    def drop(self, prefix: str) -> None:
        """Let go of those whose id starts with the prefix; they stay in the store."""
        for ident in self.ids(prefix):
            self.remove(ident)

    def _pack(self, ident: str) -> None:
        item = self._objects.get(ident)
        if item is not None and not isinstance(item, bytes) and item.over:
            # A small window: an object is small, and the usual one costs more to set up than to use.
            packer = zlib.compressobj(1, zlib.DEFLATED, 12, 4)
            self._objects[ident] = packer.compress(item.model_dump_json().encode()) + packer.flush()

    def _unpack(self, body: bytes) -> T:
        return self.cls.model_validate_json(zlib.decompress(body))

    def _index(self, before: T | None, after: T | None) -> None:
        self._sorted = None
        if self._stated:
            if before is not None:
                self._states[before.state] -= 1  # type: ignore[attr-defined]
            if after is not None:
                self._states[after.state] += 1  # type: ignore[attr-defined]
        if not self._named:
            return
        old: str = before.name if before is not None else ""  # type: ignore[attr-defined]
        new: str = after.name if after is not None else ""  # type: ignore[attr-defined]
        if before is not None and after is not None and old == new:
            return
        if before is not None:
            self._unname(old, before.id)
        if after is not None:
            # Names are unique but for moments: a set for each would take a tenth of a volume.
            others = self._names.get(new)
            self._names[new] = after.id if others is None else {after.id, *([others] if isinstance(others, str) else others)}

    def _unname(self, name: str, ident: str) -> None:
        ids = self._names[name]
        rest = set() if isinstance(ids, str) else ids - {ident}
        if rest:
            self._names[name] = rest
        else:
            del self._names[name]
