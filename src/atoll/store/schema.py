"""The layout of what the store keeps, and how an older one becomes the present one. The same for every store.

``meta/schema`` holds the number of the layout; a store without it is from 0.1.0 and has layout 1. Each entry of ``STEPS`` leads from one
number to the next. All steps that are needed run in one transaction together with the new number: a crash leaves the old layout or the
new one. There is no way back but the backup that the master makes before.

To change a layout (a field renamed, removed, or with another meaning; a new field with a default needs nothing): raise ``SCHEMA``, add the
step, and keep the old release's store with scripts/make_release_fixture.py before you begin.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from atoll.model.errors import StoreError
from atoll.store.contract import Entry, Store, Transaction

log = structlog.get_logger()
KEY = "meta/schema"
#: The layout that this version reads and writes.
SCHEMA = 1

#: All objects by key, as parsed JSON. A step changes the dictionary: values replaced, keys added and removed.
Objects = dict[str, Any]
#: Layout -> what makes the next one of it.
STEPS: dict[int, Callable[[Objects], None]] = {}
#: Called with the old and the new number before anything is changed.
Before = Callable[[int, int], Awaitable[None]]


async def layout_of(store: Store, schema: int = SCHEMA) -> int:
    """The number of the store's layout. Asked before anything is written, a term included. Errors: StoreError for a newer one."""
    mark = await store.get(KEY)
    try:
        found = int(mark.value) if mark else 1
    except ValueError:
        raise StoreError(f"{KEY} of the store is not a number", hint="restore a backup: docs/howto/restore-the-master.md") from None
    if found > schema:
        raise StoreError(
            f"the store was written by a newer Atoll (layout {found}; this one knows up to {schema})",
            hint="run that version again; or restore the backup that it made first: docs/howto/upgrade.md",
        )
    return found


async def bring_up(
    store: Store,
    guard: Mapping[str, int],
    before: Before | None = None,
    *,
    schema: int = SCHEMA,
    steps: Mapping[int, Callable[[Objects], None]] = STEPS,
) -> int:
    """Make the store's layout the present one; the revision of the transaction that did it, 0 if none was needed.

    ``guard``: keys with revisions that must not have changed, such as the leader's term.

    Errors: StoreError for a newer layout, one that no step leads from, or an object that is not JSON; CompareFailed when ``guard`` does
    not hold; those of ``before`` and of the store, and then nothing was changed.
    """
    found, mark = await layout_of(store, schema), await store.get(KEY)
    if found == schema and mark is not None:
        return 0
    put: dict[str, bytes] = {}
    delete: tuple[str, ...] = ()
    compare = {**guard, KEY: mark.revision if mark else 0}
    if found < schema:
        entries, _ = await store.list("")
        put, delete = _changes(entries, found, schema, steps)
        compare.update({key: 0 for key in put})
        compare.update({entry.key: entry.revision for entry in entries if entry.key in put or entry.key in delete})
        if before is not None:
            await before(found, schema)
    revision = await store.transact(Transaction(put={**put, KEY: str(schema).encode()}, delete=delete, compare=compare))
    if found < schema:
        log.info("the store's layout was changed", before=found, now=schema, changed=len(put), removed=len(delete))
    return revision


def _changes(
    entries: Sequence[Entry], found: int, schema: int, steps: Mapping[int, Callable[[Objects], None]]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """What is to be written and deleted."""
    old = {entry.key: entry.value for entry in entries if not entry.key.startswith("meta/")}
    objects: Objects = {}
    for key, value in old.items():
        try:
            objects[key] = json.loads(value)
        except ValueError:
            raise StoreError(f"{key} of the store is not JSON", hint="restore a backup: docs/howto/restore-the-master.md") from None
    before = {key: json.dumps(value, sort_keys=True) for key, value in objects.items()}
    for number in range(found, schema):
        if number not in steps:
            raise StoreError(
                f"the store has layout {number}, and this version knows no way from there to {schema}",
                hint="upgrade through the versions between: docs/howto/upgrade.md",
            )
        steps[number](objects)
    put = {
        key: json.dumps(value, separators=(",", ":")).encode()
        for key, value in objects.items()
        if before.get(key) != json.dumps(value, sort_keys=True)
    }
    return put, tuple(sorted(set(old) - set(objects)))
