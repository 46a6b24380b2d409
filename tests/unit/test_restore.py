"""contrib/atoll_store.py: an old backup becomes a store that agents accept and that knows where guests are."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from pathlib import Path

import pytest

from atoll.model.errors import Conflict, InvalidInput, StoreLocked
from atoll.model.objects import Claim, DeathProof, Hold, Instance, Job, JobState, Migration, Node, Step
from atoll.store.cache import LeaderStore
from atoll.store.sqlite import SqliteStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "contrib"))
from atoll_store import JUMP, backup, parse_guests, rebuild, restore

LIST = "node1 i-1\nnode2\n\nnode3 i-2\n"


async def make(directory: Path) -> int:
    """A store with two nodes, three instances, a job under way, and one that needs attention. Gives its term."""
    store = await SqliteStore.open(directory)
    leader = await LeaderStore.open(store)
    nodes = [Node(id=f"n-{n}", name=f"node{n}", group="g", address="") for n in (1, 2, 3)]
    instances = [Instance(id=f"i-{n}", name=f"web{n}", group="g", memory=1, desired="running") for n in (1, 2, 3)]
    claims = [
        Claim(id="i-1", holder="n-2", generation=5, migration=Migration(target="n-3", job=7)),
        Claim(id="i-2", holder=None, generation=2),
        Claim(id="i-3", holder="n-2", generation=9),
    ]
    jobs = [
        Job(id="0000000006", operation="x", state=JobState.DONE),
        Job(id="0000000007", operation="x", state=JobState.RUNNING, summary="migrate web1"),
        Job(id="0000000008", operation="x", state=JobState.NEEDS_ATTENTION),
    ]
    steps = [Step(id="0000000007/0001", key="k", what="read"), Step(id="0000000006/0001", key="k", what="read")]
    more = [Hold(id="instance:i-3", job=8, reason="?", commands=()), DeathProof(id="n-3", method="human", who="x", at=1.0)]
    await leader.write(put=[*nodes, *instances, *claims, *jobs, *steps, *more])
    await store.close()
    return leader.term


async def rebuilt(tmp_path: Path, guests: str = LIST, silent: str = "") -> tuple[LeaderStore, SqliteStore, int]:
    before = await make(tmp_path / "old")
    backup(tmp_path / "old" / "atoll.db", tmp_path / "copy.db")
    await rebuild(tmp_path / "copy.db", tmp_path / "new", parse_guests(guests), silent)
    store = await SqliteStore.open(tmp_path / "new")
    return await LeaderStore.open(store), store, before


async def test_claims_follow_the_guests_and_every_number_jumps(tmp_path: Path) -> None:
    leader, store, before = await rebuilt(tmp_path)
    assert leader.require(Claim, "i-1") == Claim(id="i-1", holder="n-1", generation=5 + JUMP)
    assert leader.require(Claim, "i-2") == Claim(id="i-2", holder="n-3", generation=2 + JUMP)
    # Every node was asked, and none has it.
    assert leader.require(Claim, "i-3") == Claim(id="i-3", holder=None, generation=9 + JUMP)
    assert leader.require(Instance, "i-1").home == "n-1"
    assert leader.term > before + JUMP
    assert max(job.number for job in leader.all(Job)) == 8 + JUMP
    await store.close()


async def test_open_jobs_are_broken_off_with_all_that_they_held(tmp_path: Path) -> None:
    leader, store, _ = await rebuilt(tmp_path)
    assert [job.state for job in leader.all(Job)][:3] == [JobState.DONE, JobState.UNDONE, JobState.UNDONE]
    assert [step.id for step in leader.all(Step)] == ["0000000006/0001"]
    assert not leader.all(Hold)
    assert not leader.all(DeathProof)
    await store.close()


async def test_what_may_run_on_a_silent_node_stays_there(tmp_path: Path) -> None:
    leader, store, _ = await rebuilt(tmp_path, "node1 i-1\nnode3\n", "node2")
    holders = {claim.id: claim.holder for claim in leader.all(Claim)}
    assert holders == {"i-1": "n-1", "i-2": "n-2", "i-3": "n-2"}
    await store.close()


@pytest.mark.parametrize(
    ("guests", "error", "words"),
    [
        ("node1 i-1\nnode3\n", InvalidInput, "nothing of node node2"),
        ("node1 i-1\nnode2 i-1\nnode3\n", Conflict, "node1 and node2"),
        ("node1\nnode2\nnode3\nnode4 i-1\n", InvalidInput, "knows no node node4"),
        ("node1 web1\n", InvalidInput, "not of the form"),
    ],
)
async def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, guests: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        await rebuilt(tmp_path, guests)


async def test_the_old_store_is_kept_and_a_running_master_refuses(tmp_path: Path) -> None:
    await make(tmp_path / "store")
    backup(tmp_path / "store" / "atoll.db", tmp_path / "copy.db")
    store = await SqliteStore.open(tmp_path / "store")
    with pytest.raises(StoreLocked):
        restore(tmp_path / "copy.db", tmp_path / "store", parse_guests(LIST), "")
    await store.close()
    (tmp_path / "store" / "atoll.db").write_bytes(b"damaged")
    lines = await asyncio.to_thread(restore, tmp_path / "copy.db", tmp_path / "store", parse_guests(LIST + "node2 i-9\n"), "")
    assert lines[0] == "web1: node1"
    assert lines[-2] == "i-9 on node2: made after the backup, which does not know it"
    (kept,) = tmp_path.glob("store.bad-*")
    assert (kept / "atoll.db").read_bytes() == b"damaged"
    term = sqlite3.connect(tmp_path / "store" / "atoll.db").execute("SELECT body FROM obj WHERE key = 'meta/term'").fetchone()
    assert int(term[0]) > JUMP
    assert not (tmp_path / "store.new").exists()
