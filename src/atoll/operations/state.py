"""What operations and views see of the cluster: the stored objects and what the agents report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Protocol

from atoll.model.errors import AmbiguousPool, Held, HostError, NodeAnswers, NotFound, WrongState
from atoll.model.messages import NodeReport, PoolRef, compatible
from atoll.model.objects import Authority, Claim, Cluster, DeathProof, Disk, Group, Hold, Instance, Node, Pool, Volume
from atoll.operations.health import PoolsHealth
from atoll.operations.replication import Replication
from atoll.runtime.clock import Clock
from atoll.runtime.secrets import SecretBox
from atoll.storage import registry
from atoll.storage.contract import DriverInfo
from atoll.store.cache import LeaderStore


class Health(Protocol):
    """What the master knows of its nodes from their reports."""

    def alive(self, node: str) -> bool:
        """Whether the node with this id has reported lately."""

    def doubt(self, node: str) -> float:
        """Seconds until the master has been without the node for so long that a person's word on it counts; 0 = now."""

    def report(self, node: str) -> NodeReport | None:
        """Its newest report, however old."""

    def since(self, node: str) -> float | None:
        """Seconds since its newest report; None = never."""


class Signer(Protocol):
    """The certificate authority of the master that leads."""

    def make(self) -> Authority:
        """A new one, ``coming``; it is not stored yet."""

    def bundle(self, *states: str) -> str:
        """The certificates (PEM) of the CAs in these states, all by default; the current one first."""

    def sign(self, csr: str, node: Node) -> str:
        """A certificate (PEM) for the node by the current CA. Errors: InvalidInput."""

    def expires(self) -> float:
        """When this master's own certificate ends, in seconds since 1970. Errors: HostError."""

    def settle(self) -> None:
        """Let this master's own files follow the store: whom it trusts, and its own certificate. Errors: HostError."""


class State:
    """The cluster as it is now. Reads are from memory; nothing here changes anything.

    ``signer`` is None where no certificates are used.
    """

    def __init__(self, store: LeaderStore, health: Health, clock: Clock, rng: random.Random, secrets: SecretBox | None = None) -> None:
        self.store, self.health, self.clock, self.rng = store, health, clock, rng
        self._secrets = secrets
        self.replication = Replication()
        self.signer: Signer | None = None
        #: How the pools' storage is; see ``master.watching``.
        self.pools_health = PoolsHealth()

    @property
    def secrets(self) -> SecretBox:
        """Seals what must not be in the store as it is. Errors: HostError (this master has no key)."""
        if self._secrets is None:
            raise HostError("this master has no key to seal secrets with", hint="bring the cluster's master.key to /etc/atoll")
        return self._secrets

    @property
    def cluster(self) -> Cluster:
        """The cluster's own record."""
        return self.store.require(Cluster, "cluster")

    @property
    def identity(self) -> str:
        """What marks on storage call this cluster."""
        return self.cluster.identity or self.cluster.ca_fingerprint

    @property
    def authority(self) -> Signer:
        """Who signs certificates. Errors: WrongState."""
        if self.signer is None:
            raise WrongState("this master has no certificate authority", hint="atoll cluster info")
        return self.signer

    def answers(self, node: str) -> bool:
        """Whether orders reach the node with this id: it has reported lately, and no proof of its death still stands."""
        return self.health.alive(node) and not self.proved_dead(node)

    async def listen(self, node: str) -> None:
        """Wait until a person's word that the node is dead may count: a new master has not heard it, and has not listened for long."""
        if not self.health.alive(node):
            await asyncio.sleep(self.health.doubt(node))

    def check_silent(self, node: str) -> None:
        """Refuse a person's word that the node is dead while it answers, or may have answered just now. Errors: NodeAnswers.

        Asked in the very moment in which the proof is written: a node that was answered meanwhile may begin what it was told before.
        """
        found = self.store.require(Node, node)
        if self.health.alive(node):
            raise NodeAnswers(f"node {found.name} answers; it is not dead")
        if doubt := self.health.doubt(node):
            raise NodeAnswers(
                f"node {found.name} may have answered a moment ago: this master listens for {doubt:.0f} s more before it takes your word",
                hint="type it again then",
            )

    def speaks(self, node: str) -> bool:
        """Whether the node's agent is at most one version away from this master; true for one that has not reported yet."""
        report = self.health.report(node)
        return report is None or compatible(report.protocol)

    def usable(self, node: Node) -> bool:
        """Whether new work may be given to the node: it answers and is neither offline nor drained."""
        return not node.offline and not node.drained and self.answers(node.id) and self.speaks(node.id)

    def claim(self, instance: str) -> Claim:
        """The claim of an instance; a free one with generation 0 if it never ran."""
        return self.store.get(Claim, instance) or Claim(id=instance)

    def proved_dead(self, node: str) -> bool:
        """Whether a proof of this node's death stands."""
        return self.store.get(DeathProof, node) is not None

    def disks_are_lost(self, node: str) -> bool:
        """Whether somebody has said that what was on this node's own disks will not come back."""
        proof = self.store.get(DeathProof, node)
        return proof is not None and proof.disks_are_lost

    def driver(self, pool: Pool) -> DriverInfo:
        """The capabilities of a pool's driver."""
        return registry.info(pool.driver)

    def ref(self, pool: Pool, node: Node) -> PoolRef:
        """The pool as a driver on that node sees it."""
        return PoolRef(
            id=pool.id,
            name=pool.name,
            driver=pool.driver,
            options=pool.options,
            node=node.name,
            cluster=self.identity,
            observed=pool.observed,
        )

    def volumes_of(self, instance: Instance) -> list[tuple[Disk, Volume]]:
        """The disks of an instance with their volumes, in disk order."""
        return [(disk, self.store.require(Volume, disk.volume)) for disk in instance.disks]

    def nodes_of_group(self, group: str) -> list[Node]:
        """The nodes of a group."""
        return [node for node in self.store.all(Node) if node.group == group]

    def mobility_domain(self, instance: Instance) -> list[Group]:
        """The groups that reach all of an instance's pools."""
        pools = [self.store.require(Pool, volume.pool) for _, volume in self.volumes_of(instance)]
        return [group for group in self.store.all(Group) if all(group.id in pool.groups for pool in pools)]

    def resolve_pool(self, text: str, group: str | None = None) -> Pool:
        """A pool by name, id, ``DRIVER:POOL`` or ``DRIVER`` (the group's default of that driver, or the only candidate).

        Errors: NotFound, AmbiguousPool (lists the candidates).
        """
        if ":" in text:
            driver, name = text.split(":", 1)
            pool = self.store.by_name(Pool, name)
            if pool is None or pool.driver != driver:
                raise NotFound(f"there is no pool {name!r} with driver {driver!r}", hint="atoll pool list")
            return pool
        pool = self.store.by_name(Pool, text) or self.store.get(Pool, text)
        if pool is not None:
            return pool
        candidates = [p for p in self.store.all(Pool) if p.driver == text and (group is None or group in p.groups)]
        if group is not None:
            default = self.store.require(Group, group).default_pools.get(text)
            candidates = [p for p in candidates if p.id == default] or candidates
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise NotFound(f"there is no pool {text!r}, and no pool with a driver of that name", hint="atoll pool list; atoll pool add")
        names = ", ".join(sorted(f"{text}:{p.name}" for p in candidates))
        raise AmbiguousPool(f"{text!r} may be any of {names}", hint=f"name one, such as -t {text}:{candidates[0].name}")

    def check_free(self, *resources: str) -> None:
        """Refuse resources that a job which needs attention holds. Errors: Held."""
        for resource in resources:
            hold = self.store.get(Hold, resource)
            if hold:
                raise Held(
                    f"{resource} is held by job {hold.job}: {hold.reason}", hint="; ".join(hold.commands), job=hold.job, resource=resource
                )

    def pool_nodes(self, pool: Pool) -> list[Node]:
        """The nodes whose agents can do the half of a shared pool now."""
        nodes = self.managers(self.driver(pool), pool.groups)
        return [n for n in nodes if not n.offline and self.answers(n.id) and self.speaks(n.id)]

    def managers(self, driver: DriverInfo, groups: Iterable[str]) -> list[Node]:
        """The nodes of these groups on which the driver's pool half runs, whether or not they answer."""
        nodes = [n for n in self.store.all(Node) if n.group in groups]
        chosen = [n for n in nodes if "storage-controller" in n.roles] if driver.runs_on == "controllers" else []
        return chosen or nodes

    def pool_node(self, pool: Pool, prefer: str | None = None, owner: str | None = None, exclude: Iterable[str] = ()) -> Node:
        """A node whose agent can do the pool's half: the owner of the disk for node-local pools, else one that answers.

        Errors: NodeUnavailable via WrongState text when none answers.
        """
        if self.driver(pool).node_local:
            if owner is None:
                raise WrongState(f"pool {pool.name} is node-local: a node must be named", hint="-n NODE")
            return self.store.require(Node, owner)
        candidates = [n for n in self.pool_nodes(pool) if n.id not in exclude]
        if not candidates:
            raise WrongState(f"no node that reaches pool {pool.name} answers", hint="atoll node list")
        # Where its storage gives no answer only if it gives none anywhere.
        candidates = [n for n in candidates if not self.stalled(pool, n)] or candidates
        return next((n for n in candidates if n.id == prefer), candidates[0])

    def stalled(self, pool: Pool, node: Node) -> bool:
        """Whether the node says that the pool's storage does not answer there."""
        report = self.health.report(node.id)
        return report is not None and pool.id in report.stalled_pools
