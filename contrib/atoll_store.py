#!/usr/bin/env python3
"""Back up the master's store, and put a backup in its place. See docs/howto/restore-the-store.md.

    .venv/bin/python contrib/atoll_store.py backup FILE
    .venv/bin/python contrib/atoll_store.py restore FILE --guests LIST [--silent NODE]

A backup is old: guests have moved since. So the restored store is told where they are now, and everything that orders things in time (term,
job numbers, generations) jumps ahead of whatever the agents have seen. Otherwise they would rightly take the master for a stale one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from atoll.master.setup import store_dir
from atoll.model.errors import AtollError, Conflict, InvalidInput
from atoll.model.objects import Claim, DeathProof, Hold, IdempotencyKey, Instance, Job, JobState, Node, Step, Stored
from atoll.runtime.config import load
from atoll.runtime.files import fsync_dir
from atoll.store.cache import LeaderStore
from atoll.store.contract import Transaction
from atoll.store.local import lock_directory
from atoll.store.sqlite import SqliteStore
from atoll.store.sqlite_file import backup

#: Further ahead than any cluster gets between two backups.
JUMP = 1_000_000
TERM = "meta/term"


def parse_guests(text: str) -> dict[str, list[str]]:
    """Lines ``NODE INSTANCE-ID`` as instance -> nodes; a node without guests is a line of its own. Errors: InvalidInput."""
    found: dict[str, list[str]] = {"": []}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) > 2 or (len(words) == 2 and not words[1].startswith("i-")):
            raise InvalidInput(f"{line!r} is not of the form NODE INSTANCE-ID", hint="see docs/howto/restore-the-store.md")
        found[""].append(words[0])
        if len(words) == 2:
            found.setdefault(words[1], []).append(words[0])
    return found


def placed(instance: Instance, claim: Claim, nodes: Mapping[str, str], where: list[str], silent: str) -> Claim:
    """The claim as it must be now. ``nodes``: name -> id; ``where``: names of the nodes that have its guest. Errors: Conflict."""
    if len(where) > 1:
        raise Conflict(
            f"instance {instance.name} ({instance.id}) is on {' and '.join(where)}",
            hint="end the copies but one on their nodes, and make the list again",
        )
    if where:
        holder: str | None = nodes[where[0]]
    elif silent:
        # It may run on the node that nobody can ask: only your word, later, moves it from there.
        holder = nodes[silent] if claim.holder is not None or instance.desired == "running" else None
    else:
        holder = None
    return claim.model_copy(update={"holder": holder, "generation": claim.generation + JUMP, "migration": None})


def corrected(leader: LeaderStore, guests: Mapping[str, list[str]], silent: str, now: float) -> tuple[list[Stored], list[Stored]]:
    """What to write and what to delete in a restored store. Errors: InvalidInput, Conflict."""
    nodes = {node.name: node.id for node in leader.all(Node)}
    named = {*guests[""], *([silent] if silent else [])}
    for missing in sorted(set(nodes) - named):
        raise InvalidInput(
            f"the list says nothing of node {missing}", hint=f"ask it; a line '{missing}' says that it has none; or --silent {missing}"
        )
    for unknown in sorted({name for names in guests.values() for name in names} - set(nodes)):
        raise InvalidInput(f"the backup knows no node {unknown}", hint="it joined later; stop its guests, and let it join again")
    put: list[Stored] = []
    for instance in leader.all(Instance):
        claim = leader.get(Claim, instance.id) or Claim(id=instance.id)
        where = guests.get(instance.id, [])
        put.append(placed(instance, claim, nodes, where, silent))
        if where:
            put.append(instance.model_copy(update={"desired": "running", "home": nodes[where[0]], "stopped_by": ""}))
    delete: list[Stored] = [*leader.all(Hold), *leader.all(DeathProof)]
    open_jobs = [job for job in leader.all(Job) if not job.state.ended]
    for job in open_jobs:
        # What became of them after the backup is not known: neither to repeat nor to undo them would be right.
        put.append(job.model_copy(update={"state": JobState.UNDONE, "ended": now, "reason": "broken off: the store was restored"}))
        delete += [*leader.prefix(Step, f"{job.id}/"), *(k for k in leader.all(IdempotencyKey) if k.job == job.number)]
    last = max((job.number for job in leader.all(Job)), default=0)
    done = {"state": JobState.DONE, "created": now, "started": now, "ended": now, "who": "root"}
    put.append(Job(id=f"{last + JUMP:010d}", operation="store.restore", summary="restore the store from a backup", **done))
    return put, delete


async def rebuild(source: Path, directory: Path, guests: Mapping[str, list[str]], silent: str) -> list[str]:
    """Make ``directory`` a store from the backup. Gives lines for people. Errors: those of the store, InvalidInput, Conflict."""
    directory.mkdir(mode=0o700)
    backup(source, directory / "atoll.db")
    store = await SqliteStore.open(directory)
    try:
        entry = await store.get(TERM)
        if entry is None:
            raise InvalidInput(f"{source} is no backup of a store", hint="atoll_store.py backup FILE makes one")
        await store.transact(Transaction(put={TERM: str(int(entry.value) + JUMP).encode()}))
        leader = await LeaderStore.open(store)
        put, delete = corrected(leader, guests, silent, time.time())
        await leader.write(put=put, delete=delete)
        names = {node.id: node.name for node in leader.all(Node)}
        claims = [c for c in put if isinstance(c, Claim)]
        jobs = [j for j in put if isinstance(j, Job)][:-1]
        lines = [f"{leader.require(Instance, c.id).name}: {names[c.holder] if c.holder else 'runs nowhere'}" for c in claims]
        lines += [f"job {job.number} was broken off: {job.summary}" for job in jobs]
        strangers = [(i, nodes) for i, nodes in guests.items() if i and leader.get(Instance, i) is None]
        return lines + [f"{i} on {' and '.join(nodes)}: made after the backup, which does not know it" for i, nodes in strangers]
    finally:
        await store.close()


def restore(source: Path, directory: Path, guests: Mapping[str, list[str]], silent: str) -> list[str]:
    """Put the backup in the place of the store in ``directory``, which is kept beside it. Errors: also StoreLocked (a master runs)."""
    scratch = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = lock_directory(directory)
    try:
        lines = asyncio.run(rebuild(source, scratch, guests, silent))
        kept = directory.with_name(f"{directory.name}.bad-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(kept)
        scratch.rename(directory)
        fsync_dir(directory.parent)
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)
    return [*lines, f"the old store is in {kept}"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Back up and restore the store of an Atoll master.")
    parser.add_argument("--config", help="this node's configuration file (default /etc/atoll/atoll.toml)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("backup", help="write a consistent copy, while the master runs").add_argument("file", type=Path)
    again = verbs.add_parser("restore", help="put a copy in the place of the store, while the master is stopped")
    again.add_argument("file", type=Path)
    again.add_argument("--guests", required=True, type=Path, help="lines NODE INSTANCE-ID; a line NODE for one without guests")
    again.add_argument("--silent", default="", metavar="NODE", help="the one node that cannot be asked")
    options = parser.parse_args()
    try:
        directory = store_dir(load(options.config))
        if options.verb == "backup":
            if not (directory / "atoll.db").exists():
                raise InvalidInput(f"there is no store in {directory}", hint="run this on the master")
            backup(directory / "atoll.db", options.file)
            return
        if not options.file.exists():
            raise InvalidInput(f"there is no {options.file}", hint="name the backup")
        for line in restore(options.file, directory, parse_guests(options.guests.read_text()), options.silent):
            print(line)
    except (AtollError, OSError, UnicodeDecodeError) as error:
        hint = f"\nNext: {error.hint}" if isinstance(error, AtollError) and error.hint else ""
        print(f"Error: {error}{hint}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, AtollError) else 9)


if __name__ == "__main__":
    main()
