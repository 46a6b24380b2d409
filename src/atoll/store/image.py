"""A store's content as bytes: base copies and changes for master candidates, and backups. Made and read here only; opaque elsewhere."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from atoll.model.errors import StoreError
from atoll.store.contract import Entry, Event, Store

#: The format of a base copy and of changes; a reader refuses a newer one.
FORMAT = 1


@runtime_checkable
class Snapshots(Protocol):
    """A store that can be read as a whole beside its transactions."""

    async def snapshot(self) -> tuple[Sequence[Entry], int]:
        """All entries and the revision at that moment."""


async def whole(store: Store) -> tuple[Sequence[Entry], int]:
    """All entries of a store and its revision at that moment. Errors: those of the store."""
    if isinstance(store, Snapshots):
        return await store.snapshot()
    return await store.list("")


def pack(entries: Iterable[Entry], revision: int) -> bytes:
    """A base copy."""
    return _pack({"format": FORMAT, "revision": revision, "entries": [[entry.key, _text(entry.value)] for entry in entries]})


def pack_changes(batches: Iterable[Sequence[Event]]) -> bytes:
    """Changes of some revisions, in order."""
    events = [[event.key, None if event.value is None else _text(event.value)] for batch in batches for event in batch]
    return _pack({"format": FORMAT, "events": events})


def unpack(base: bytes, changes: Iterable[bytes] = ()) -> dict[str, bytes]:
    """Key -> value: a base copy with all changes after it. Errors: StoreError."""
    found = {key: _bytes(value) for key, value in _unpack(base, "entries")}
    for change in changes:
        for key, value in _unpack(change, "events"):
            if value is None:
                found.pop(key, None)
            else:
                found[key] = _bytes(value)
    return found


def _pack(data: dict[str, object]) -> bytes:
    return zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 1)


def _unpack(data: bytes, field: str) -> list[tuple[str, str | None]]:
    try:
        found = json.loads(zlib.decompress(data))
        if found["format"] > FORMAT:
            raise StoreError("this copy of the store was made by a newer Atoll", hint="upgrade this node")
        return [(key, value) for key, value in found[field]]
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"this copy of the store cannot be read: {error}", hint="use another copy") from None


def _text(value: bytes) -> str:
    # Values are JSON as a rule; whatever else they are comes back unchanged.
    return value.decode("utf-8", "surrogateescape")


def _bytes(value: str | None) -> bytes:
    return (value or "").encode("utf-8", "surrogateescape")
