"""Disk parameters (``-D DRIVER:KEY=VALUE``): how disks are attached. The cluster's, overridden by a group's.

They are read when disks are connected for a start or a migration, or when one is plugged: what is attached stays as it is.
"""

from __future__ import annotations

from typing import Any

from atoll.model.errors import InvalidInput, NotFound
from atoll.model.objects import Group, Instance, Node, Pool
from atoll.operations.state import State
from atoll.storage import registry
from atoll.storage.contract import DriverInfo

Values = dict[str, dict[str, str]]
ACCESS = "access"


def split(change: Values, *, pools: bool) -> tuple[Values, Values]:
    """Defaults of new pools and disk parameters apart, checked. ``pools``: whether defaults of new pools can be set here.

    Errors: NotFound (no such driver or key), InvalidInput (not what it takes).
    """
    defaults: Values = {}
    parameters: Values = {}
    for driver, values in change.items():
        info = registry.info(driver)
        options = {option.name: option for option in info.options} if pools else {}
        known = options | {option.name: option for option in info.parameters}
        for name, value in values.items():
            if name not in known:
                words = f"it takes: {', '.join(sorted(known))}" if known else "it takes none here"
                raise NotFound(f"driver {driver} has no {'option' if pools else 'disk parameter'} {name!r}", hint=words)
            choices = known[name].choices
            if value and choices and value not in choices:
                raise InvalidInput(
                    f"-D {driver}:{name} is one of {', '.join(choices)}, not {value!r}", hint=f"-D {driver}:{name}={choices[0]}"
                )
            (defaults if name in options else parameters).setdefault(driver, {})[name] = value
    return defaults, parameters


def effective(state: State, driver: DriverInfo, group: str) -> dict[str, str]:
    """What holds for disks of a driver that are attached on nodes of the group next."""
    found = {option.name: option.default for option in driver.parameters if option.default}
    layers = [state.cluster.disk_parameters]
    if (owner := state.store.get(Group, group)) is not None:
        layers.append(owner.disk_parameters)
    return found | {name: value for layer in layers for name, value in layer.get(driver.name, {}).items()}


def access_of(state: State, pool: Pool, node: str) -> str:
    """How guests on the node with this id will reach volumes of the pool."""
    found = state.store.get(Node, node)
    return access_in(state, state.driver(pool), found.group if found else "")


def access_in(state: State, driver: DriverInfo, group: str) -> str:
    """How guests in the group will reach volumes of the driver. What this version's driver cannot (any more) counts for nothing."""
    wanted = effective(state, driver, group).get(ACCESS, "")
    return wanted if wanted in driver.access else driver.plain_access


def as_before(state: State) -> list[str]:
    """The instances that run with disks attached in another way than they would be by now, and that way."""
    found = []
    for instance in state.store.all(Instance):
        holder = state.claim(instance.id).holder
        report = state.health.report(holder) if holder else None
        guest = next((g for g in report.guests if g.instance == instance.id), None) if report else None
        if holder is None or guest is None:
            continue
        differing = set()
        for _, volume in state.volumes_of(instance):
            now = guest.access.get(volume.id)
            if now and now != access_of(state, state.store.require(Pool, volume.pool), holder):
                differing.add(now)
        if differing:
            found.append(f"{instance.name} ({', '.join(sorted(differing))})")
    return sorted(found)


def hazards(state: State, driver: str) -> list[str]:
    """The nodes on which guests are to have block devices of a driver's data that the node may keep itself."""
    info = registry.info(driver)
    found = []
    for node in state.store.all(Node):
        if info.data_roles & set(node.storage_roles) and access_in(state, info, node.group) == "kernelspace":
            found.append(node.name)
    return sorted(found)


def answer(state: State, change: Values) -> dict[str, Any]:
    """What is told of a change of parameters: when it takes effect, and what to mind. Empty: none was changed."""
    if not change:
        return {}
    told: dict[str, Any] = {"takes_effect": "for each instance at its next start or migration"}
    if before := as_before(state):
        told["until_then_as_before"] = before
    if risky := sorted({node for driver in change for node in hazards(state, driver)}):
        told["warning"] = (
            f"these nodes keep data of such storage themselves: {', '.join(risky)}. A node that writes to its own storage by a block "
            "device can stop for good when memory is short: use userspace there, or give guests and storage nodes of their own"
        )
    return told
