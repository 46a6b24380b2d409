"""The options of a Ceph cluster, checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from atoll.deploy.ceph.info import INFO
from atoll.model.errors import InvalidInput

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
#: More copies than that help nobody.
MAX_SIZE = 10


@dataclass(frozen=True)
class Options:
    """``size`` and ``monitors`` 0: chosen by the number of nodes."""

    disks: tuple[str, ...]
    name: str
    pool: str
    size: int
    public_network: Network | None
    cluster_network: Network | None
    monitors: int
    profile: str


def parse(options: Mapping[str, str]) -> Options:
    """Errors: InvalidInput names the option and what it takes."""
    known = {option.name: option for option in INFO.options}
    for name in options:
        if name not in known:
            raise InvalidInput(f"a {INFO.name} cluster has no option {name!r}", hint=f"options: {', '.join(sorted(known))}")
    values = {name: options.get(name) or option.default for name, option in known.items()}
    for name, option in known.items():
        if option.choices and values[name] not in option.choices:
            raise InvalidInput(f"option {name} is one of {', '.join(option.choices)}, not {values[name]!r}")
    for name in ("name", "pool"):
        if not _WORD.match(values[name]):
            raise InvalidInput(f"option {name} is a word of letters, digits, '.', '-' and '_', not {values[name]!r}")
    monitors = _number("monitors", values["monitors"], 9)
    if monitors and monitors % 2 == 0:
        raise InvalidInput(
            f"{monitors} monitors survive no more than {monitors - 1} do: give an odd number", hint=f"monitors={monitors - 1}"
        )
    return Options(
        disks=_disks(values["disk"]),
        name=values["name"],
        pool=values["pool"],
        size=_number("size", values["size"], MAX_SIZE),
        public_network=_network("public_network", values["public_network"]),
        cluster_network=_network("cluster_network", values["cluster_network"]),
        monitors=monitors,
        profile=values["profile"],
    )


def _disks(text: str) -> tuple[str, ...]:
    disks = tuple(part for part in text.split(":") if part)
    for disk in disks:
        if not re.match(r"/dev/[A-Za-z0-9][A-Za-z0-9/._+-]*\Z", disk) or ".." in disk:
            raise InvalidInput(f"option disk: {disk!r} is not a device", hint="disk=/dev/sdb:/dev/sdc")
    if len(set(disks)) != len(disks):
        raise InvalidInput(f"option disk names a device twice: {text}")
    return disks


def _number(name: str, text: str, most: int) -> int:
    if not text:
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise InvalidInput(f"option {name} is a number from 1 to {most}, not {text!r}")
    return int(text)


def _network(name: str, text: str) -> Network | None:
    if not text:
        return None
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise InvalidInput(f"option {name} is a network, not {text!r}", hint=f"{name}=10.0.0.0/24") from None


def within(network: Network, address: str) -> bool:
    """Whether the address lies in the network."""
    try:
        return ipaddress.ip_address(address) in network
    except ValueError:
        return False
