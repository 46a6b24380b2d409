"""Options of storage clusters: the cluster's, overridden by a group's, overridden by a node's."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.deploy import registry
from atoll.deploy.contract import Member
from atoll.model.errors import NotFound, WrongState
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations.state import State

Options = dict[str, dict[str, str]]


def merged(before: Mapping[str, Mapping[str, str]], change: Mapping[str, Mapping[str, str]]) -> Options:
    """The options with a change; an empty value removes one."""
    found = {kind: dict(options) for kind, options in before.items()}
    for kind, options in change.items():
        found[kind] = {name: value for name, value in {**found.get(kind, {}), **options}.items() if value}
    return {kind: options for kind, options in found.items() if options}


def check(change: Options) -> None:
    """Errors: NotFound (no such kind), InvalidInput (no such option, or not what it takes)."""
    for kind, options in change.items():
        registry.planner(kind).check_options({name: value for name, value in options.items() if value})


def check_cluster(state: State, change: Options) -> None:
    """The cluster's own change only while there is no storage cluster of the kind. Errors: WrongState too."""
    check(change)
    for kind in change:
        made = next((item for item in state.store.all(StorageCluster) if item.type == kind), None)
        if made is not None:
            raise WrongState(
                f"the storage cluster {made.name} ({kind}) is initialised: its options can no longer change", hint="atoll storage list"
            )


def check_group(state: State, group: Group, change: Options) -> None:
    """A group's change only before its storage cluster is initialised. Errors: WrongState too."""
    check(change)
    made = state.store.get(StorageCluster, group.storage) if group.storage else None
    if made is not None and made.type in change:
        raise WrongState(
            f"group {group.name} has the storage cluster {made.name}: its options can no longer change", hint="atoll storage list"
        )


def check_node(node: Node, change: Options) -> None:
    """A node's change only while it has no part in a storage cluster. Errors: WrongState too."""
    check(change)
    if change and node.storage in ("joined", "stopped"):
        raise WrongState(
            f"node {node.name} has a part in a storage cluster ({', '.join(node.storage_roles)}): its options can no longer change",
            hint="atoll storage list",
        )


def effective(state: State, kind: str, group: Group, node: Node | None = None) -> dict[str, str]:
    """What holds for a node of the group, or for the group."""
    layers = [state.cluster.storage_options, group.storage_options, *([node.storage_options] if node else [])]
    return {name: value for layer in layers for name, value in layer.get(kind, {}).items()}


def member(state: State, kind: str, group: Group, node: Node) -> Member:
    """A node as planners see it."""
    return Member(
        id=node.id,
        name=node.name,
        address=node.address,
        controller="storage-controller" in node.roles,
        inside=node.group == group.id,
        options=effective(state, kind, group, node) if node.group == group.id else {},
    )


def storage_of(state: State, target: str) -> StorageCluster:
    """A storage cluster by name, id, or the name of its group. Errors: NotFound."""
    found = state.store.by_name(StorageCluster, target) or state.store.get(StorageCluster, target)
    group = state.store.by_name(Group, target)
    if found is None and group is not None and group.storage:
        found = state.store.get(StorageCluster, group.storage)
    if found is None:
        raise NotFound(f"there is no storage cluster {target!r}", hint="atoll storage list")
    return found
