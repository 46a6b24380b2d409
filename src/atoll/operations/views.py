"""What people and programs see of the cluster: pure functions from the state to JSON rows.

Sizes are bytes, times seconds since 1970, names stand where the store has ids (with the ids beside them). Lists of 10,000 objects
are made with one pass over each kind: see ``Index``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from atoll.model.errors import HostError, NotFound
from atoll.model.messages import NodeReport, Progress
from atoll.model.objects import Authority, Group, Instance, Job, JobState, Node, Pool, Snapshot, Step, StorageCluster, Volume, VolumeState
from atoll.operations.health import NOT_YET
from atoll.operations.index import Index, Row, Spaces
from atoll.operations.instance_views import instance
from atoll.runtime import certs
from atoll.storage import registry
from atoll.storage.contract import DriverInfo

if TYPE_CHECKING:
    from atoll.operations.state import State


# --- cluster and groups ---


def cluster(state: State) -> Row:
    """The cluster with counts."""
    record, index = state.cluster, Index(state)
    jobs = state.store.active(Job)
    return {
        "name": record.name,
        "id": record.id,
        "hypervisor": record.hypervisor,
        "ca_fingerprint": record.ca_fingerprint,
        "ca_expires": _ca_expires(state),
        "master_certificate_expires": _master_expires(state),
        "driver_options": record.driver_options,
        "disk_parameters": record.disk_parameters,
        "storage_options": record.storage_options,
        "drivers": [info.name for info in registry.drivers()],
        "tags": list(record.tags),
        "master": index.node_name(state.replication.master or None),
        "term": state.store.term,
        "revision": state.store.revision,
        "nodes": len(index.nodes),
        "nodes_alive": sum(index.alive.values()),
        "groups": len(index.groups),
        "pools": len(index.pools),
        "volumes": len(index.volumes),
        "instances": len(index.instances),
        "jobs_active": sum(job.state.active for job in jobs),
        "jobs_needing_attention": sum(job.state is JobState.NEEDS_ATTENTION for job in jobs),
        "candidates": [{"name": index.node_name(node), **(replica(state, node) or {})} for node in state.replication.candidates],
    }


def replica(state: State, node: str) -> Row | None:
    """How far a master candidate's copy of the store is; None for other nodes."""
    return state.replication.row(node, state.store.revision, state.clock.monotonic())


def replica_words(state: State, item: Node) -> str:
    """The same in words, for lists; ``master`` for the node that leads."""
    if item.id == state.replication.master:
        return "master"
    found = replica(state, item.id)
    if found is None:
        return "keys not taken back" if item.holds_keys else ""
    if found["state"] != "behind":
        return str(found["state"])
    return f"{found['behind']} changes behind, {found['seconds']:.0f} s"


def _ca_expires(state: State) -> float | None:
    """When the CA that signs ends."""
    return min((certs.expires(a.certificate) for a in state.store.all(Authority) if a.state == "current"), default=None)


def _master_expires(state: State) -> float | None:
    """When the certificate of the master that leads ends; None = not known."""
    try:
        return state.signer.expires() if state.signer else None
    except HostError:
        return None


def group(item: Group, index: Index) -> Row:
    """A node group."""
    nodes = sorted(node.name for node in index.nodes.values() if node.group == item.id)
    return {
        "name": item.name,
        "id": item.id,
        "nodes": nodes,
        "instances": sum(instance.group == item.id for instance in index.instances.values()),
        "pools": sorted(pool.name for pool in index.pools.values() if item.id in pool.groups),
        "default_pools": {driver: index.pools[pool].name for driver, pool in item.default_pools.items() if pool in index.pools},
        "disk_parameters": item.disk_parameters,
        "storage": index.storage_name(item.storage),
        "storage_options": item.storage_options,
        "machine": item.pin.machine,
        "cpu_model": item.pin.cpu_model,
        "accelerator": item.pin.accelerator,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


# --- nodes ---


def node_state(item: Node, index: Index) -> str:
    """One word: dead-proved, offline, unreachable, drained, joining (its pools are being prepared) or ok."""
    if index.state.proved_dead(item.id):
        return "dead-proved"
    if item.offline:
        return "offline"
    if not index.alive[item.id]:
        return "unreachable"
    if item.drained:
        return "drained"
    return "ok" if item.ready else "joining"


def node(item: Node, index: Index) -> Row:
    """A node. ``disk_total`` and ``disk_free`` count its node-local pools only; None where space is shared or not known."""
    report = index.state.health.report(item.id)
    local = [pool.id for pool in index.pools.values() if _local_to(pool, item)]
    space = [index.spaces[pool, item.id] for pool in local if (pool, item.id) in index.spaces]
    return {
        "name": item.name,
        "id": item.id,
        "group": index.groups[item.group].name if item.group in index.groups else item.group,
        "state": node_state(item, index),
        "alive": index.alive[item.id],
        "ready": item.ready,
        "last_seen": index.state.health.since(item.id),
        "memory_total": report.memory_total if report else None,
        "memory_free": report.memory_free if report else None,
        "cpus": report.cpus if report else None,
        "disk_total": sum(s.total for s in space) if space else None,
        "disk_free": sum(s.free for s in space) if space else None,
        "guests": sum(guest.state in ("running", "paused", "hung") for guest in report.guests) if report else 0,
        "claims": index.claimed[item.id],
        "secondaries": index.secondaries[item.id],
        "address": item.address,
        "port": item.port,
        "roles": list(item.roles),
        "storage": item.storage,
        "storage_roles": list(item.storage_roles),
        "storage_options": item.storage_options,
        "replica": replica_words(index.state, item),
        "offline": item.offline,
        "drained": item.drained,
        "certificate": (report.certificate if report else "") or item.certificate_serial,
        "certificate_expires": ((report.certificate_expires if report else 0.0) or item.certificate_expires) or None,
        "version": report.version if report else "",
        "accelerator": report.accelerator if report else "",
        "stalled_pools": {index.pool_name(p): stall_words(report, p) for p in report.stalled_pools} if report else {},
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


def stall_words(report: NodeReport, pool: str) -> str:
    """Why a pool does not answer on a node, and for how long it has not."""
    seconds = report.stalled_for.get(pool)
    return report.stalled_pools[pool] + (f", for {seconds:.0f} s" if seconds is not None else "")


def _local_to(pool: Pool, item: Node) -> bool:
    return item.group in pool.groups and registry.info(pool.driver).node_local


# --- pools and volumes ---


def pool(item: Pool, index: Index) -> Row:
    """A storage pool. ``promised`` is the sum of its volumes' sizes; space is None where it is not known."""
    volumes = index.pool_volumes.get(item.id, [])
    driver = registry.info(item.driver)
    spaces = {where: space for (pool_id, where), space in index.spaces.items() if pool_id == item.id}
    seen = index.state.pools_health.get(item.id) or (NOT_YET if driver.health else None)
    stalled = {}
    for node_id in index.nodes:
        report = index.state.health.report(node_id)
        if report and item.id in report.stalled_pools:
            stalled[str(index.node_name(node_id))] = stall_words(report, item.id)
    return {
        "name": item.name,
        "id": item.id,
        "driver": item.driver,
        "state": "observed" if item.observed else item.state,
        "state_reason": "only looked at: nothing is ever written there" if item.observed else item.state_reason,
        "groups": sorted(index.groups[g].name for g in item.groups if g in index.groups),
        "writers": item.writers.value,
        "volumes": len(volumes),
        "promised": sum(volume.size for volume in volumes),
        "total": sum(space.total for space in spaces.values()) if spaces else None,
        "free": sum(space.free for space in spaces.values()) if spaces else None,
        "space_on": {str(index.node_name(n)): {"total": s.total, "free": s.free} for n, s in spaces.items() if n},
        "options": dict(item.options),
        "capabilities": capabilities(driver),
        "stalled": stalled,
        "health": seen.row() if seen else None,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


def capabilities(driver: DriverInfo) -> Row:
    """What a driver can, without its options."""
    found = driver.model_dump(mode="json", exclude={"options", "name", "parameters", "data_roles", "quick"})
    found["access"] = sorted(found["access"])
    found["mirrored"], found["node_local"] = driver.mirrored, driver.node_local
    return found


def volume(item: Volume, index: Index) -> Row:
    """A volume with its attachments, as EBS shows them."""
    owner = index.instances.get(item.instance) if item.instance else None
    attachments = []
    if item.instance:
        disks = enumerate(owner.disks) if owner else ()
        place = next(((n, disk) for n, disk in disks if disk.volume == item.id), None)
        attachments.append(
            {
                "instance": owner.name if owner else item.instance,
                "instance_id": item.instance,
                "index": place[0] if place else None,
                "slot": place[1].slot if place else None,
                "mode": place[1].mode if place else None,
            }
        )
    state = item.state
    if state is VolumeState.AVAILABLE and attachments:
        state = VolumeState.IN_USE
    return {
        "name": item.name,
        "id": item.id,
        "state": state.value,
        "size": item.size,
        "pool": index.pool_name(item.pool),
        "driver": index.pools[item.pool].driver if item.pool in index.pools else None,
        "node": index.node_name(item.node),
        "secondary": index.node_name(item.secondary),
        "instance": owner.name if owner else item.instance,
        "attachments": attachments,
        "adopted": item.adopted,
        "snapshot": index.snapshot_name(item.snapshot),
        "generation": item.generation,
        "logical_id": item.logical_id,
        "created": item.created,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


def snapshot(item: Snapshot, index: Index) -> Row:
    """A snapshot. ``volume`` is its volume's present name, or what it was called when it is gone (``volume_deleted``)."""
    source = index.volumes.get(item.volume)
    return {
        "name": item.name,
        "id": item.id,
        "state": item.state.value,
        "size": item.size,
        "pool": index.pool_name(item.pool),
        "driver": index.pools[item.pool].driver if item.pool in index.pools else None,
        "volume": source.name if source else item.volume_name,
        "volume_id": item.volume,
        "volume_deleted": source is None,
        "logical_id": item.logical_id,
        "created": item.created,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


def storage(item: StorageCluster, index: Index) -> Row:
    """A storage cluster that Atoll has made. Its keys are not shown."""
    group = index.groups.get(item.group)
    nodes = [node for node in index.nodes.values() if node.group == item.group and node.storage]
    return {
        "name": item.name,
        "id": item.id,
        "type": item.type,
        "state": "made" if item.layout else "marked",
        "group": group.name if group else item.group,
        "nodes": {node.name: " ".join([node.storage, *node.storage_roles]) for node in sorted(nodes, key=lambda node: node.name)},
        "options": dict(item.options),
        "layout": dict(item.layout),
        "created": item.created,
        "tags": list(item.tags),
        "hold": index.hold(item.resource),
    }


# --- jobs ---


#: What a lock may be on that has a name.
_LOCKED: dict[str, type[Node | Group | Pool | Volume | Snapshot | Instance]] = {
    "node": Node,
    "group": Group,
    "pool": Pool,
    "volume": Volume,
    "snapshot": Snapshot,
    "instance": Instance,
}


def job(item: Job, index: Index, progress: Progress | None = None, steps: Iterable[Step] | None = None) -> Row:
    """A job. ``progress`` and ``steps`` only where one job is shown."""
    row: Row = {
        "id": item.number,
        "state": item.state.value,
        "summary": item.summary,
        "operation": item.operation,
        "who": item.who,
        "parent": item.parent,
        "created": item.created,
        "started": item.started,
        "ended": item.ended,
        "age": max(0.0, index.state.clock.now() - item.created),
        "committed": item.committed,
        "cancel_asked": item.cancel_asked,
        "deadline": item.deadline,
        "result": item.result,
        "error": item.error,
        "reason": item.reason,
        "commands": list(item.commands),
        "locks": {
            "shared": [_resource(resource, index) for resource in item.locks.shared],
            "exclusive": [_resource(resource, index) for resource in item.locks.exclusive],
        },
    }
    if progress is not None:
        row["progress"] = progress.model_dump(mode="json")
    if steps is not None:
        row["steps"] = [_step(step, index) for step in steps]
    return row


def _resource(resource: str, index: Index) -> str:
    """A lock with the object's name in place of its id, where it still exists. Only it is read: there may be many thousands of its kind."""
    noun, _, identity = resource.partition(":")
    found = index.state.store.get(_LOCKED[noun], identity) if noun in _LOCKED and identity else None
    return f"{noun}:{found.name}" if found else resource


def _step(step: Step, index: Index) -> Row:
    return {
        "key": step.key,
        "what": step.what,
        "node": index.node_name(step.node),
        "method": step.method,
        "state": step.state.value,
        "at": step.at,
    }


# --- by noun ---

KINDS: dict[str, tuple[type[Any], Callable[[Any, Index], Row]]] = {
    "node": (Node, node),
    "group": (Group, group),
    "pool": (Pool, pool),
    "volume": (Volume, volume),
    "snapshot": (Snapshot, snapshot),
    "instance": (Instance, instance),
    "storage": (StorageCluster, storage),
    "job": (Job, job),
}


def rows(
    state: State, noun: str, spaces: Spaces | None = None, *, after: str = "", limit: int | None = None
) -> tuple[list[Row], str | None]:
    """The rows of a kind, by name (jobs: newest first), and what to give as ``after`` for more (None: that was all)."""
    kind, view = KINDS[noun]
    index = Index(state, spaces)
    if noun == "job":
        # Most jobs are packed away: only those that are shown are made again.
        ids = state.store.ids(Job)[::-1]
        if after:
            ids = [ident for ident in ids if int(ident) < _number(after)]
        jobs = [state.store.require(Job, ident) for ident in ids[:limit]]
        return [view(job, index) for job in jobs], (str(jobs[-1].number) if jobs and len(jobs) < len(ids) else None)
    items = _by_name(state, kind)
    if after:
        items = [item for item in items if item.name > after]
    chosen = items if limit is None else items[:limit]
    found = [view(item, index) for item in chosen]
    return found, (str(chosen[-1].name) if chosen and len(chosen) < len(items) else None)


def _by_name(state: State, kind: type[Any]) -> list[Any]:
    return sorted(state.store.all(kind), key=lambda item: str(item.name))


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise NotFound(f"{text!r} is not a job's number", hint="atoll job list") from None


def find(state: State, noun: str, target: str) -> Any:
    """An object by name or id. Errors: NotFound."""
    kind, _ = KINDS[noun]
    if noun == "job":
        found = state.store.get(kind, f"{_number(target):010d}")
    else:
        found = state.store.by_name(kind, target) or state.store.get(kind, target)
    if found is None:
        raise NotFound(f"there is no {noun} {target!r}", hint=f"atoll {noun} list")
    return found
