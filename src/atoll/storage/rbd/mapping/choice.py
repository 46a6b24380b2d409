"""Which way an image is mapped: the first that this node can and the image allows."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from atoll.model.errors import HostError, NotSupported
from atoll.storage.rbd.mapping.way import Way

#: In the order of preference. Each is the class ``Way`` of the module of that name.
ORDER = ("krbd", "nbd", "fuse")


def ways() -> list[Way]:
    """All ways, the best first."""
    return [cast(Way, import_module(f"atoll.storage.rbd.mapping.{name}").Way()) for name in ORDER]


def named(name: str) -> Way:
    """The way of a record. Errors: NotSupported (this version knows none of that name)."""
    for way in ways():
        if way.name == name:
            return way
    raise NotSupported(f"this version of Atoll has no way to map images that is called {name}")


def usable() -> list[Way]:
    """The ways that this node can, the best first. Errors: HostError says of each why it cannot."""
    refused, found = [], []
    for way in ways():
        if why := way.available():
            refused.append(f"{way.name}: {why}")
        else:
            found.append(way)
    if not found:
        raise HostError(
            f"this node can make no image in Ceph a block device ({'; '.join(refused)})",
            hint="modprobe rbd; or apt-get install qemu-utils qemu-system-common qemu-block-extra, and modprobe fuse loop",
        )
    return found
