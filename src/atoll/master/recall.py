"""Asks agents for what they remember, in the name of no term: whether another master leads, and what a copy of the store does not know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atoll.model.errors import AtollError, Deposed
from atoll.model.messages import Call, Recalled
from atoll.model.objects import Node
from atoll.rpc.agents import quiet
from atoll.rpc.contract import Transport
from atoll.runtime.files import read_json, write_durably
from atoll.store.contract import Store

#: The key of the newest term in the store.
TERM = "meta/term"
#: Seconds that a starting master waits for the agents' words; those that hear it later tell it later.
LISTEN = 1.0


async def recall(transport: Transport, nodes: Iterable[Node], deadline: float) -> dict[str, Recalled]:
    """What each agent that answers within ``deadline`` seconds remembers, by node id."""
    found: dict[str, Recalled] = {}

    async def one(node: Node) -> None:
        try:
            found[node.id] = Recalled(**await transport.call(node, Call(term=0, method="recall", deadline=deadline), quiet))
        except AtollError:
            return

    tasks = [asyncio.ensure_future(one(node)) for node in nodes]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=deadline)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def marker(store_dir: Path) -> Path:
    """The file in a store that says that its master was deposed."""
    return store_dir / "deposed.json"


def note_deposed(store_dir: Path, why: str, masters: Iterable[str] = ()) -> None:
    """Remember it, so that this store never leads again. Errors: HostError."""
    write_durably(marker(store_dir), json.dumps({"why": why, "masters": list(masters)}))


def refuse_deposed(store_dir: Path) -> None:
    """Errors: Deposed when it was noted."""
    found: dict[str, Any] | None = read_json(marker(store_dir))
    if found is not None:
        where = f"; nodes follow {', '.join(found['masters'])}" if found.get("masters") else ""
        raise Deposed(f"another master has taken over: {found.get('why', '')}{where}")


async def check_leads(store: Store, store_dir: Path, transport: Transport, *, listen: float = LISTEN) -> None:
    """Before a master takes a term: has another one begun? Asked of every agent that answers.

    An agent that cannot be asked now is asked again later: it refuses the orders of an old term, and a candidate must have answered
    before anything is begun. Errors: Deposed.
    """
    refuse_deposed(store_dir)
    entry = await store.get(TERM)
    term = int(entry.value) if entry else 0
    nodes = [Node.model_validate_json(found.value) for found in (await store.list("nodes/"))[0]]
    for fact in (await recall(transport, [n for n in nodes if not n.offline], listen)).values():
        if fact.term > term:
            why = f"node {fact.node} has heard a master with term {fact.term}; the store here knows {term}"
            note_deposed(store_dir, why, fact.masters)
            refuse_deposed(store_dir)
