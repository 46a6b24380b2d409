"""Becoming the master with a copy of the store: on a candidate with the copy that was shipped, anywhere with a backup.

Order matters. First it is made sure that the old master does not lead any more; then the agents take the new term, from which moment the
old one's orders are refused; then the store is built beside the old place, and at last put there. Whatever breaks on the way: the same
command again begins anew, with a higher term.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from atoll.agent.hostsetup import settle_in
from atoll.master.authority import in_order, opened
from atoll.master.health import HealthMonitor
from atoll.master.recall import TERM, recall
from atoll.master.revive import JUMP, Revived, Reviver
from atoll.master.setup import MASTER_KEY, own_url
from atoll.master.shipping import ROLE
from atoll.model.errors import AtollError, HostError, InUse, InvalidInput, NeedsProof, NodeAnswers, NotFound, Unreachable
from atoll.model.messages import Call, Recalled
from atoll.model.objects import Authority, Cluster, Node
from atoll.operations.all import OPERATIONS
from atoll.operations.state import State
from atoll.rpc.agents import quiet
from atoll.rpc.contract import Transport
from atoll.rpc.https import HttpsTransport
from atoll.runtime import certs
from atoll.runtime.clock import Clock, SystemClock
from atoll.runtime.config import Config, dump
from atoll.runtime.files import fsync_dir, lock_exclusively, lock_holder, write_durably
from atoll.runtime.masters import write_masters
from atoll.runtime.secrets import SecretBox
from atoll.runtime.tls import client_context, fresh_client
from atoll.store.cache import LeaderStore
from atoll.store.contract import Store, Transaction
from atoll.store.sqlite import SqliteStore

#: Seconds for agents to answer, for a master to be silent before it counts as gone, and that running steps are waited for.
ANSWER, SILENT, STEPS = 4.0, 6.0, 20.0
#: Entries of one transaction when the store is built.
CHUNK = 5000


@dataclass(frozen=True)
class Copy:
    """What the new master begins with: the store's entries, and the keys by file name (see ``setup.read_keyring``). ``master``: the id of
    the node whose master made it."""

    entries: Mapping[str, bytes]
    keyring: Mapping[str, str] = field(repr=False)
    master: str = ""

    def authorities(self) -> list[Authority]:
        """The CAs that the store knows, the current one first."""
        return in_order(Authority.model_validate_json(value) for key, value in self.entries.items() if key.startswith("authorities/"))

    @property
    def ca(self) -> certs.KeyPair:
        """The certificate authority that signs: the store's, else that of the keys. Errors: InvalidInput, HostError."""
        known = self.authorities()
        if known and MASTER_KEY in self.keyring:
            return opened(SecretBox.of(self.keyring[MASTER_KEY], Path(MASTER_KEY)), known[0])
        if "ca.pem" not in self.keyring or "ca.key" not in self.keyring:
            raise InvalidInput("the key of the certificate authority is missing in this copy", hint="use another copy")
        return certs.KeyPair(self.keyring["ca.pem"], self.keyring["ca.key"])

    @property
    def trusted(self) -> str:
        """All CAs that are trusted (PEM); more than one while the CA is being changed. Errors: those of ``ca``."""
        return "".join(authority.certificate for authority in self.authorities()) or self.ca.cert_pem

    def nodes(self) -> list[Node]:
        """The nodes that it knows."""
        return [Node.model_validate_json(value) for key, value in sorted(self.entries.items()) if key.startswith("nodes/")]

    @property
    def term(self) -> int:
        """The term of the master that made it."""
        return int(self.entries.get(TERM, b"0"))

    @property
    def cluster(self) -> Cluster:
        """The cluster. Errors: InvalidInput."""
        if "cluster/cluster" not in self.entries:
            raise InvalidInput("this copy of the store has no cluster in it", hint="use another copy")
        return Cluster.model_validate_json(self.entries["cluster/cluster"])


class Succession:
    """One attempt. ``dead``: names of nodes that a person calls dead; ``me``: this node's record, which may be new to the copy."""

    def __init__(self, config: Config, path: Path, copy: Copy, me: Node, dead: tuple[str, ...], operation: str) -> None:
        self._config, self._path, self._copy, self._me, self._operation = config, path, copy, me, operation
        by_name = {node.name: node for node in copy.nodes()}
        for name in dead:
            if name not in by_name:
                raise NotFound(f"the copy of the store knows no node {name!r}", hint=f"nodes: {', '.join(sorted(by_name))}")
        self._dead = {by_name[name].id for name in dead}
        self._nodes = {node.id: node for node in copy.nodes()} | {me.id: me}
        #: Where this node's certificate as a master lies until it is needed.
        self._tls = config.state_dir / "succession"

    async def run(self, dry_run: bool) -> list[str]:
        """Do it, up to the point where the master is to be started. Gives lines for people.

        Errors: NodeAnswers while the old master leads, NeedsProof when nobody knows whether it does, StaleTerm when another candidate
        is faster, InUse when a master works here, Unreachable, StoreError, HostError.
        """
        assert OPERATIONS
        config = self._config
        pid = lock_holder(config.store_dir / "lock")
        if pid is not None:
            raise InUse(f"a master works on this node (process {pid})", hint="atoll cluster info; or stop it: systemctl stop atoll-master")
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = lock_exclusively(config.state_dir / "succession.lock")
        try:
            pair = certs.issue(self._copy.ca, "master", self._me.id, self._me.name, [config.address])
            certs.save(self._tls, self._copy.trusted, pair.cert_pem, pair.key_pem)
            return await self._succeed(HttpsTransport(fresh_client(self._tls)), dry_run)
        finally:
            for left in (self._tls, self._scratch):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)

    async def _succeed(self, transport: HttpsTransport, dry_run: bool) -> list[str]:
        try:
            facts = await self._facts(transport)
            await self._refuse_living_master(transport, facts)
            term = max([self._copy.term, *(fact.term for fact in facts.values())]) + JUMP + zlib.crc32(self._me.id.encode()) % 1000
            if not dry_run:
                await take_term(transport, self._nodes, self._me.id, facts, term)
                facts = await settled(transport, self._nodes, self._me.id, facts)
            revived = await self._build(facts, term)
            if not dry_run:
                self._install(term)
            return revived.lines
        finally:
            await transport.close()

    @property
    def _scratch(self) -> Path:
        return self._config.store_dir.with_name("store.new")

    # --- who is there ---

    async def _facts(self, transport: HttpsTransport) -> dict[str, Recalled]:
        facts = await recall(transport, self._nodes.values(), ANSWER)
        if self._me.id not in facts:
            if (self._config.state_dir / "agent.db").exists():
                raise Unreachable(f"the agent of this node ({self._me.name}) does not answer", hint="systemctl start atoll-agent")
            # It never had one: nothing can run here, and nothing was promised.
            facts[self._me.id] = Recalled(node=self._me.name, term=0)
        for node in self._dead & set(facts):
            raise NodeAnswers(
                f"node {self._nodes[node].name} answers; it is not dead", hint=f"leave --node-is-dead {self._nodes[node].name} away"
            )
        return facts

    async def _refuse_living_master(self, transport: HttpsTransport, facts: dict[str, Recalled]) -> None:
        """Whoever was heard by an agent within the last seconds leads; who cannot be asked may lead."""
        for node, fact in facts.items():
            if fact.master_pid is not None:
                name = self._nodes[node].name
                raise NodeAnswers(
                    f"a master works on node {name} (process {fact.master_pid})",
                    hint=f"stop it for good, on {name}: systemctl disable --now atoll-master",
                )
        end = time.monotonic() + SILENT + 2.0
        while (near := next((f for f in facts.values() if f.heard is not None and f.heard < SILENT), None)) is not None:
            if time.monotonic() > end:
                raise NodeAnswers(
                    f"a master leads: node {near.node} was answered {near.heard:.0f} s ago by {', '.join(near.masters) or 'it'}",
                    hint="atoll cluster info, there; if it is to be replaced, stop it first: systemctl disable --now atoll-master",
                )
            await asyncio.sleep(1.0)
            facts.update(await recall(transport, self._nodes.values(), ANSWER))
        for url in {url for fact in facts.values() for url in fact.masters} - {own_url(self._config)}:
            if await self._serves(url):
                raise NodeAnswers(f"a master answers at {url}", hint="stop it first, there: systemctl disable --now atoll-master")
        old = self._nodes.get(self._copy.master)
        if old is not None and old.id not in facts and old.id not in self._dead:
            raise NeedsProof(
                f"node {old.name}, where the master was, does not answer: if it still leads, there will be two masters",
                hint=f"make sure that {old.name} is off, then repeat with --node-is-dead {old.name}",
            )

    async def _serves(self, url: str) -> bool:
        """Whether anybody speaks HTTP there; what it says does not matter."""
        if not urlsplit(url).hostname:
            return False
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context(self._tls, certificate=False))) as session,
                session.get(f"{url}/v1/cluster", timeout=aiohttp.ClientTimeout(total=3.0)),
            ):
                return True
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _build(self, facts: Mapping[str, Recalled], term: int) -> Revived:
        shutil.rmtree(self._scratch, ignore_errors=True)
        store = await SqliteStore.open(self._scratch)
        try:
            return await rebuild(store, self._copy.entries, term, self._me, facts, self._dead, self._operation)
        finally:
            await store.close()

    def _install(self, term: int) -> None:
        """Keys and configuration first; the store in its place makes this node the master."""
        config = self._config
        certs.save(config.master_tls_dir, *((self._tls / name).read_text() for name in ("ca.pem", "cert.pem", "key.pem")))
        for name, text in self._copy.keyring.items():
            if name != MASTER_KEY and name != "ca.pem":
                write_durably(config.master_tls_dir / name, text, 0o600)
        key = config.etc_dir / MASTER_KEY
        if key.exists() and key.read_text() != self._copy.keyring[MASTER_KEY]:
            key.rename(key.with_name(f"{MASTER_KEY}.{_stamp()}"))
        write_durably(key, self._copy.keyring[MASTER_KEY], 0o600)
        url = own_url(config)
        write_masters(config.state_dir, (url,), term)
        write_durably(self._path, dump(config.model_copy(update={"masters": (url,)})), 0o644)
        try:
            if config.store_dir.exists():
                config.store_dir.rename(config.store_dir.with_name(f"store.{_stamp()}"))
            self._scratch.rename(config.store_dir)
        except OSError as error:
            raise HostError(f"cannot put the store in its place: {error.strerror}", hint="type it again") from None
        fsync_dir(config.state_dir)


async def take_term(transport: Transport, nodes: Mapping[str, Node], me: str, facts: Mapping[str, Recalled], term: int) -> None:
    """From here on no older master is obeyed. This node (``me``) first: whatever happens then, the old master learns of it here.

    Errors: StaleTerm when another candidate is faster; Unreachable.
    """

    async def hello(node: str) -> None:
        await transport.call(nodes[node], Call(term=term, method="hello", master=me, deadline=ANSWER), quiet)

    if facts[me].term:
        await hello(me)
    others = [node for node in facts if node != me]
    for node, error in zip(others, await asyncio.gather(*(hello(n) for n in others), return_exceptions=True), strict=True):
        if isinstance(error, AtollError):
            raise type(error)(f"node {nodes[node].name} did not take the new term: {error.message}", hint="type it again")
        if error is not None:
            raise error


async def settled(transport: Transport, nodes: Mapping[str, Node], me: str, facts: Mapping[str, Recalled]) -> dict[str, Recalled]:
    """What the agents remember once they have ended what the old master had ordered, or most of it. Errors: Unreachable."""
    loop = asyncio.get_running_loop()
    end = loop.time() + STEPS
    while True:
        now = await recall(transport, [nodes[node] for node in facts], ANSWER)
        now.setdefault(me, facts[me])
        gone = [nodes[node].name for node in facts if node not in now]
        if gone:
            raise Unreachable(f"node {gone[0]} does not answer any more", hint="type it again")
        if not any(fact.running for fact in now.values()) or loop.time() > end:
            return now
        await asyncio.sleep(0.5)


async def rebuild(
    store: Store,
    entries: Mapping[str, bytes],
    term: int,
    me: Node,
    facts: Mapping[str, Recalled],
    dead: set[str],
    operation: str,
    clock: Clock | None = None,
) -> Revived:
    """Fill an empty store with the copy, corrected by what the agents remember. Errors: those of ``Reviver`` and of the store."""
    everything = {**entries, TERM: str(term).encode()}
    keys = sorted(everything)
    for start in range(0, len(keys), CHUNK):
        await store.transact(Transaction(put={key: everything[key] for key in keys[start : start + CHUNK]}))
    leader = await LeaderStore.open(store)
    clock = clock or SystemClock()
    state = State(leader, HealthMonitor(clock), clock, random.SystemRandom())
    # Who may have been the master has its keys.
    others = [n for n in leader.all(Node) if n.id != me.id and ROLE in n.roles and not n.holds_keys]
    await leader.write(put=[_mine(leader, me), *(n.model_copy(update={"holds_keys": True}) for n in others)])
    revived = Reviver(state, facts, dead, operation, "root").work()
    await leader.write(put=revived.put, delete=revived.delete)
    return revived


def _mine(leader: LeaderStore, me: Node) -> Node:
    """This node's record, as that of the master."""
    found = leader.get(Node, me.id) or me
    update = {"roles": tuple(sorted({*found.roles, ROLE})), "holds_keys": False, "address": me.address, "port": me.port}
    shown = ("certificate_serial", "previous_serial", "certificate_issued", "certificate_expires")
    return found.model_copy(update={**update, **{name: getattr(me, name) for name in shown}})


def _stamp() -> str:
    return f"before-{time.strftime('%Y%m%d-%H%M%S')}"


def take_over(config: Config, path: Path, copy: Copy, me: Node, dead: tuple[str, ...], operation: str, dry_run: bool) -> list[str]:
    """See ``Succession.run``; then the master is started where systemd runs. Gives lines for people."""
    if os.geteuid() != 0 and config.etc_dir == Path("/etc/atoll"):
        raise InvalidInput("only root may do this", hint="use sudo")
    lines = asyncio.run(Succession(config, path, copy, me, dead, operation).run(dry_run))
    if not dry_run:
        lines += settle_in(config, path, ("master", "agent"))
    return lines
