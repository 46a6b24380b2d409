"""What several operations share: lookups with their errors, placement's view of the cluster, locks, tags."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from atoll.jobs.steps import Changes
from atoll.model.errors import (
    AlreadyExists,
    InvalidInput,
    InvalidSize,
    NodeUnavailable,
    NotFound,
    PoolNotReachable,
    PoolObserved,
    WrongState,
)
from atoll.model.ids import check_name
from atoll.model.objects import Claim, Group, Instance, Locks, Node, Pool, Stored, Volume
from atoll.model.units import format_size
from atoll.operations.registry import Prepared
from atoll.operations.requests import Request, TagsChange
from atoll.operations.state import State
from atoll.placement.rules import Needs
from atoll.storage.contract import DriverInfo

#: Memory that a node keeps for itself, in bytes.
NODE_RESERVE = 256 << 20


def locks(shared: Iterable[str] = (), exclusive: Iterable[str] = ()) -> Locks:
    """Locks without repeats; what is locked exclusively need not be shared too."""
    alone = tuple(sorted(set(exclusive)))
    return Locks(shared=tuple(sorted(set(shared) - set(alone))), exclusive=alone)


def frozen(request: Request, **ids: Any) -> dict[str, Any]:
    """What a job keeps: the request with ids instead of names."""
    return {**request.model_dump(mode="json"), **ids}


def check_new_name(state: State, cls: type[Stored], name: str) -> str:
    """The name, if it is legal and free. Errors: InvalidInput, AlreadyExists."""
    check_name(name, f"{cls.noun} name")
    if state.store.by_name(cls, name) is not None:
        article = "an" if cls.noun[0] in "aeiou" else "a"
        raise AlreadyExists(f"there is already {article} {cls.noun} named {name!r}", hint=f"atoll {cls.noun} info {name}")
    return name


def name_lock(cls: type[Stored], name: str) -> str:
    """The lock on a name that shall be given."""
    return f"name:{cls.noun}:{name}"


class PlacementView:
    """The cluster as placement sees it: what agents report, less what was promised to instances that do not run yet."""

    def __init__(self, state: State) -> None:
        self._state = state

    def nodes(self) -> list[Node]:
        """All nodes."""
        return self._state.store.all(Node)

    def alive(self, node: str) -> bool:
        """Whether the node answers, and has been readmitted if it was called dead."""
        return self._state.answers(node)

    def speaks(self, node: str) -> bool:
        """Whether its agent is at most one version away from this master."""
        return self._state.speaks(node)

    def stalled(self, node: str) -> frozenset[str]:
        """The pools (ids) whose storage does not answer on the node, as it has reported."""
        report = self._state.health.report(node)
        return frozenset(report.stalled_pools) if report else frozenset()

    def free_memory(self, node: str) -> int:
        """Free memory less a reserve and what claims promise beyond what the report shows."""
        report = self._state.health.report(node)
        if report is None:
            return 0
        seen = {guest.instance for guest in report.guests}
        promised = 0
        for claim in self._state.store.all(Claim):
            if node in claim.nodes and claim.id not in seen:
                instance = self._state.store.get(Instance, claim.id)
                promised += instance.memory if instance else 0
        return report.memory_free - NODE_RESERVE - promised


def needs_of(state: State, instance: Instance, *, exclude: Iterable[str] = ()) -> Needs:
    """What an existing instance needs of a node."""
    pools = []
    only: frozenset[str] | None = None
    for _, volume in state.volumes_of(instance):
        pool = state.store.require(Pool, volume.pool)
        pools.append(pool)
        if state.driver(pool).node_local:
            reach = frozenset(n for n in (volume.node, volume.secondary) if n)
            only = reach if only is None else only & reach
    return Needs(memory=instance.memory, pools=tuple(pools), nodes=only, exclude=frozenset(exclude))


def check_size_for(driver: DriverInfo, size: int) -> int:
    """The size that the driver will give: rounded up to its granularity. Errors: InvalidSize."""
    rounded = -(-size // driver.granularity) * driver.granularity
    if rounded > driver.max_size:
        raise InvalidSize(f"{format_size(size)} is larger than a {driver.name} volume can be ({format_size(driver.max_size)})")
    return rounded


def refuse_observed(pool: Pool) -> None:
    """Errors: PoolObserved, with what to type to make it a pool like others."""
    if pool.observed:
        given = " ".join(f"-O {name}={value}" for name, value in sorted(pool.options.items()))
        raise PoolObserved(
            f"pool {pool.name} is only observed: nothing is ever written to it",
            hint=f"to use it, with a user that may write: atoll pool remove {pool.name} --force, then "
            f"atoll pool add {pool.name} -t {pool.driver} {given}",
        )


def check_pool_open(state: State, pool: Pool, group: str | None = None) -> None:
    """Refuse a pool that takes no new volumes, or that the group cannot reach."""
    refuse_observed(pool)
    if pool.state != "ready":
        raise WrongState(f"pool {pool.name} takes no new volumes: {pool.state_reason}", hint=f"atoll pool info {pool.name}")
    if group is not None and group not in pool.groups:
        name = state.store.require(Group, group).name
        raise PoolNotReachable(f"group {name} cannot reach pool {pool.name}", hint=f"atoll pool connect {pool.name} {name}")


def check_usable(state: State, node: Node) -> Node:
    """The node, if new work may be given to it. Errors: NodeUnavailable."""
    reason = ""
    if node.offline:
        reason = "is offline"
    elif node.drained:
        reason = "is drained"
    elif not state.answers(node.id):
        reason = "does not answer"
    elif not state.speaks(node.id):
        reason = "runs an agent that is more than one version away from this master"
    if reason:
        raise NodeUnavailable(f"node {node.name} {reason}")
    return node


def find_disk(state: State, instance: Instance, index: int | None, volume: str | None) -> int:
    """The index of a disk given by index or volume. Errors: NotFound, InvalidInput."""
    if (index is None) == (volume is None):
        raise InvalidInput("name the disk by its index or its volume, one of both", hint="atoll instance info INSTANCE")
    if index is None:
        wanted = state.store.find(Volume, volume or "").id
        index = next((i for i, disk in enumerate(instance.disks) if disk.volume == wanted), -1)
    if not 0 <= index < len(instance.disks):
        raise NotFound(
            f"instance {instance.name} has no such disk; it has {len(instance.disks)}", hint=f"atoll instance info {instance.name}"
        )
    return index


def replace(state: State, cls: type[Stored], ident: str, **fields: Any) -> Stored:
    """The object with other fields; for the functions of ``write`` steps."""
    return state.store.require(cls, ident).model_copy(update=fields)


def prepare_tags(cls: type[Stored]) -> Any:
    """The ``prepare`` of a noun's tags operation."""

    def prepare(state: State, target: str, request: TagsChange) -> Prepared:
        found = state.store.find(cls, target) if target else state.store.require(cls, "cluster")
        return Prepared(frozen(request, id=found.id), locks(exclusive=[found.resource]), f"change the tags of {cls.noun} {target}")

    return prepare


def run_tags(cls: type[Stored]) -> Any:
    """The ``run`` of a noun's tags operation."""

    async def run(job: Any, request: dict[str, Any]) -> Any:
        def change() -> Changes:
            found = job.state.store.require(cls, request["id"])
            tags = sorted((set(found.tags) | set(request["add"])) - set(request["remove"]))
            return Changes(put=[found.model_copy(update={"tags": tuple(tags)})], result={"tags": tags})

        await job.commit()
        return await job.write("tags", change)

    return run
