#!/usr/bin/env python3
"""Keeps what a release leaves on disks, for the tests of upgrades: ``.venv/bin/python scripts/make_release_fixture.py VERSION``.

Run it once, with the code of the release, and commit what it writes to tests/fixtures/releases: ``store-VERSION.sql`` (a master's store
with at least one object of every kind and jobs in every state, two of them broken off in the middle) and ``agent-VERSION.sql`` (an agent's
memory). tests/simulation/test_upgrade.py opens every one of them with the present code.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from pathlib import Path

from atoll.api.leader import Caller
from atoll.lab.box import Box, simulate
from atoll.model.objects import DeathProof, Token
from atoll.model.units import GIB
from atoll.runtime import faults
from atoll.runtime.secrets import digest
from atoll.store.contract import Transaction
from atoll.store.memory import Durable
from atoll.store.sqlite import SqliteStore

DIRECTORY = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "releases"


async def story() -> tuple[Durable, list[str]]:
    """The durable store of a cluster whose master died in the middle, and node1's memory as SQL."""
    box = await Box.make()
    await box.add_pool()
    await box.add_pool("local", "file")
    await box.do("group.modify", "default", default_pools={"sharedfile": "shared"})
    web = {"disks": [{"size": 2 * GIB}, {"size": GIB}], "memory": GIB, "template": "shared"}
    await box.do("instance.add", name="web1", node="node1", **web)
    await box.do("instance.add", name="web2", node="node2", **web)
    await box.do("instance.add", name="db1", node="node1", template="local", disks=[{"size": GIB}], memory=GIB, nics=[{"mode": "user"}])
    await box.do("instance.stop", "web2", timeout=1.0)
    await box.do("instance.tags", "web1", add=["tier:front"])
    await box.do("volume.create", name="spare", pool="shared", size=GIB)
    await box.master.submit("volume.create", "", {"name": "keyed", "pool": "shared", "size": GIB}, who=Caller("root", "admin"), key="k1")
    await _needs_attention(box)
    await box.master.state.store.write(
        put=[
            DeathProof(id=box.nodes["node3"], method="human", who="root", at=box.clock.now()),
            Token(id="a" * 32, purpose="api", digest=digest("api"), name="monitoring", role="reader"),
            Token(id="b" * 32, purpose="join", digest=digest("j"), name="node4", role="node", group="group-00000000000000001", expires=1.0),
        ]
    )
    await _broken_off(box)
    memory = list(box._databases["node1"].iterdump())
    return box.durable, memory


async def _needs_attention(box: Box) -> None:
    """The node dies while it starts a guest: the job cannot know."""
    await box.do("instance.add", name="held1", node="node3", disks=[{"size": GIB}], memory=GIB, template="shared", start=False)

    async def strike(name: str) -> None:
        if name == "agent:guest.start:before":
            faults.handler = None
            box.cut.add("node3")
            await asyncio.Event().wait()

    faults.handler = strike
    number = (await box.submit("instance.start", "held1", node="node3")).job
    assert number is not None
    job = await box.end_of(number)
    assert job.state == "needs-attention", job


async def _broken_off(box: Box) -> None:
    """A creation and a migration in the middle, and one that waits for its lock."""
    seen: set[str] = set()
    both = asyncio.Event()

    async def strike(name: str) -> None:
        if name in ("agent:volume.create:after", "agent:guest.migrate_out:after"):
            seen.add(name)
            if len(seen) == 2:
                both.set()
            await asyncio.Event().wait()

    faults.handler = strike
    await box.submit("instance.add", name="new1", node="node2", disks=[{"size": GIB}], memory=GIB, template="shared")
    await box.submit("instance.migrate", "web1", node="node2")
    await both.wait()
    await box.submit("instance.grow-disk", "web1", index=0, increment=GIB)
    faults.handler = None
    await box.crash_master()


async def write(durable: Durable, path: Path) -> list[str]:
    """The store's file as SQL, as this release's SQLite store writes it."""
    store = await SqliteStore.open(path, keep_revisions=10)
    for entry in sorted(durable.entries.values(), key=lambda entry: entry.revision):
        await store.transact(Transaction(put={entry.key: entry.value}))
    await store.close()
    connection = sqlite3.connect(path / "atoll.db")
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def main(version: str) -> None:
    durable, memory = simulate(story)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        store = asyncio.run(write(durable, Path(place)))
    for name, lines in (("store", store), ("agent", memory)):
        (DIRECTORY / f"{name}-{version}.sql").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
