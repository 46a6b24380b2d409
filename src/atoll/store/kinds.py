"""All objects of one kind, in memory: by id, in order, and by name."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, TypeVar

from atoll.model.objects import Stored

T = TypeVar("T", bound=Stored)


class Shelf(Generic[T]):
    """The objects of class ``cls``."""

    def __init__(self, cls: type[T]) -> None:
        self.cls = cls
        self._named = "name" in cls.model_fields
        self._objects: dict[str, T] = {}
        self._ids: list[str] = []
        self._names: dict[str, set[str]] = {}
        self._sorted: list[T] | None = None

    def get(self, ident: str) -> T | None:
        return self._objects.get(ident)

    def all(self) -> list[T]:
        """All of them by id; the list is the caller's."""
        if self._sorted is None:
            self._sorted = [self._objects[ident] for ident in self._ids]
        return list(self._sorted)

    def prefix(self, prefix: str) -> list[T]:
        """Those whose id starts with the prefix, by id."""
        found = []
        for at in range(bisect_left(self._ids, prefix), len(self._ids)):
            if not self._ids[at].startswith(prefix):
                break
            found.append(self._objects[self._ids[at]])
        return found

    def by_name(self, name: str) -> T | None:
        """The one with this name; with several, the one with the lowest id."""
        ids = self._names.get(name)
        return self._objects[min(ids)] if ids else None

    def put(self, item: T) -> T | None:
        """Add or replace it; what was there before."""
        before = self._objects.get(item.id)
        if before is None:
            insort(self._ids, item.id)
        self._objects[item.id] = item
        self._index(before, item)
        return before

    def remove(self, ident: str) -> T | None:
        """Take it away; what was there before."""
        before = self._objects.pop(ident, None)
        if before is not None:
            del self._ids[bisect_left(self._ids, ident)]
            self._index(before, None)
        return before

    def _index(self, before: T | None, after: T | None) -> None:
        self._sorted = None
        if not self._named:
            return
        if before is not None:
            ids = self._names[before.name]  # type: ignore[attr-defined]
            ids.discard(before.id)
            if not ids:
                del self._names[before.name]  # type: ignore[attr-defined]
        if after is not None:
            self._names.setdefault(after.name, set()).add(after.id)  # type: ignore[attr-defined]
