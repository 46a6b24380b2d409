"""Which drivers there are. Their halves are imported on first use, so that a master never loads them."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from atoll.model.errors import NotFound
from atoll.model.messages import PoolRef
from atoll.storage.contract import Connector, DriverInfo, PoolDriver
from atoll.storage.fakemirror.info import INFO as _FAKEMIRROR
from atoll.storage.file.info import INFO as _FILE
from atoll.storage.rbd.info import INFO as _RBD
from atoll.storage.sharedfile.info import INFO as _SHAREDFILE

_INFOS = {info.name: info for info in (_FILE, _SHAREDFILE, _RBD, _FAKEMIRROR)}


def drivers() -> list[DriverInfo]:
    """All drivers, by name."""
    return [_INFOS[name] for name in sorted(_INFOS)]


def info(driver: str) -> DriverInfo:
    """A driver's capabilities and options."""
    try:
        return _INFOS[driver]
    except KeyError:
        raise NotFound(f"there is no storage driver {driver!r}", hint=f"drivers: {', '.join(sorted(_INFOS))}") from None


def pool(ref: PoolRef) -> PoolDriver:
    """The pool half of a pool. Its module has a class ``Pool``."""
    return cast(PoolDriver, import_module(f"atoll.storage.{info(ref.driver).name}.pool").Pool(ref))


def connector(driver: str) -> Connector:
    """The node half of a driver. Its module has a class ``Connector``."""
    return cast(Connector, import_module(f"atoll.storage.{info(driver).name}.connector").Connector())
