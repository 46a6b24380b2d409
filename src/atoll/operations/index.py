"""What several rows of a view need, read from the state once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from atoll.model.messages import GuestStatus, Space
from atoll.model.objects import Group, Hold, Instance, Job, JobState, Node, Pool, Snapshot, StorageCluster, Volume
from atoll.storage import registry
from atoll.storage.contract import DriverInfo

if TYPE_CHECKING:
    from atoll.operations.state import State

Row = dict[str, Any]
#: What is known of pools' space: (pool id, node id) -> space; the node id is "" where the pool is shared.
Spaces = Mapping[tuple[str, str], Space]


class Index:
    """What several rows need, read once per list."""

    def __init__(self, state: State, spaces: Spaces | None = None) -> None:
        self.state = state
        self.spaces: Spaces = spaces or {}
        self.nodes = {node.id: node for node in state.store.all(Node)}
        self.groups = {group.id: group for group in state.store.all(Group)}
        self.pools = {pool.id: pool for pool in state.store.all(Pool)}

    @cached_property
    def volumes(self) -> dict[str, Volume]:
        """Volumes by id."""
        return {volume.id: volume for volume in self.state.store.all(Volume)}

    @cached_property
    def instances(self) -> dict[str, Instance]:
        """Instances by id."""
        return {instance.id: instance for instance in self.state.store.all(Instance)}

    @cached_property
    def holds(self) -> dict[str, Hold]:
        """Holds by resource."""
        return {hold.id: hold for hold in self.state.store.all(Hold)}

    @cached_property
    def busy(self) -> dict[str, Job]:
        """The running job that has a resource for itself."""
        running = [job for job in self.state.store.active(Job) if job.state in (JobState.RUNNING, JobState.UNDOING)]
        return {resource: job for job in running for resource in job.locks.exclusive}

    @cached_property
    def guests(self) -> dict[tuple[str, str], GuestStatus]:
        """(node, instance) -> guest, from the newest reports, however old."""
        found = {}
        for node in self.nodes:
            report = self.state.health.report(node)
            for guest in report.guests if report else ():
                found[node, guest.instance] = guest
        return found

    @cached_property
    def pool_volumes(self) -> dict[str, list[Volume]]:
        """Pool id -> its volumes."""
        found: dict[str, list[Volume]] = defaultdict(list)
        for volume in self.volumes.values():
            found[volume.pool].append(volume)
        return found

    @cached_property
    def alive(self) -> dict[str, bool]:
        """Node id -> whether it answers."""
        return {node: self.state.health.alive(node) for node in self.nodes}

    @cached_property
    def secondaries(self) -> Counter[str]:
        """Node id -> how many instances have their second copy there."""
        return Counter(instance.secondary for instance in self.instances.values() if instance.secondary)

    @cached_property
    def claimed(self) -> Counter[str]:
        """Node id -> how many instances' claims it holds."""
        return Counter(node for instance in self.instances for node in self.state.claim(instance).nodes)

    def snapshot_name(self, snapshot: str) -> str:
        """The name of a snapshot; its id if it was deleted."""
        found = self.state.store.get(Snapshot, snapshot) if snapshot else None
        return found.name if found else snapshot

    def node_name(self, node: str | None) -> str | None:
        """The name of a node; its id if it was removed."""
        if node is None:
            return None
        return self.nodes[node].name if node in self.nodes else node

    def pool_name(self, pool: str) -> str:
        """The name of a pool; its id if it was removed."""
        return self.pools[pool].name if pool in self.pools else pool

    def storage_name(self, storage: str) -> str:
        """The name of a storage cluster; its id if it was removed."""
        found = self.state.store.get(StorageCluster, storage) if storage else None
        return found.name if found else storage

    def driver(self, pool: str) -> DriverInfo | None:
        """The capabilities of a pool's driver."""
        return registry.info(self.pools[pool].driver) if pool in self.pools else None

    def hold(self, resource: str) -> Row | None:
        """The hold on a resource."""
        hold = self.holds.get(resource)
        return {"job": hold.job, "reason": hold.reason, "commands": list(hold.commands)} if hold else None
