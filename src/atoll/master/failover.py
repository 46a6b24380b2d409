"""``atoll cluster master-failover``: a candidate becomes the master with the copy of the store that was shipped to it."""

from __future__ import annotations

import time
from pathlib import Path

from atoll.agent.replica import Replica
from atoll.master.recall import TERM, marker
from atoll.master.setup import MASTER_KEY
from atoll.master.succession import Copy, take_over
from atoll.model.errors import InvalidInput, WrongState
from atoll.model.objects import Node
from atoll.runtime.config import load
from atoll.store import image
from atoll.store.sqlite_file import snapshot


def failover(path: Path, dead: tuple[str, ...], dry_run: bool = False) -> list[str]:
    """Take over from a master that is gone. ``dead``: nodes that a person calls dead. Gives lines for people.

    Errors: InvalidInput when this node is no candidate; NotFound when its copy is damaged; those of ``Succession.run``.
    """
    config = load(path)
    keyring = {path.name: path.read_text() for path in sorted(config.candidate_dir.glob("*")) if path.is_file()}
    missing = sorted({"ca.pem", "ca.key", MASTER_KEY} - set(keyring))
    if missing:
        raise InvalidInput(
            f"this node is no master candidate: there is no {config.candidate_dir / missing[0]}",
            hint="type it on a candidate, or restore a backup: atoll cluster restore FILE",
        )
    state, base, changes = Replica(config.replica_dir).read()
    entries = image.unpack(base, [change.data for change in changes])
    _refuse_own_store(config.store_dir, state.stream)
    entries[TERM] = str(state.stream).encode()
    copy = Copy(entries, keyring, state.master)
    me = next((node for node in copy.nodes() if node.name == config.node), None)
    if me is None:
        raise InvalidInput(f"the copy of the store knows no node {config.node!r}", hint="restore a backup: atoll cluster restore FILE")
    newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.at))
    lines = take_over(config, path, copy, _me(me, config.address, config.agent_port), dead, "cluster.master-failover", dry_run)
    return [f"The newest change in the copy is of {newest} (revision {state.number}).", *lines]


def _me(node: Node, address: str, port: int) -> Node:
    return node.model_copy(update={"address": address, "port": port})


def _refuse_own_store(store_dir: Path, stream: int) -> None:
    """A store here that is newer than the copy belongs to the master itself, stopped. Errors: WrongState."""
    database = store_dir / "atoll.db"
    if not database.exists() or marker(store_dir).exists():
        return
    term = next((int(entry.value) for entry in snapshot(database)[0] if entry.key == TERM), 0)
    if term >= stream:
        raise WrongState("this node is the master, and it is stopped", hint="systemctl start atoll-master")
