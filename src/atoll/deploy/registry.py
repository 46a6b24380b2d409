"""Which kinds of storage clusters there are. Their steps are imported on first use: a master never loads them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from atoll.deploy.ceph.info import INFO as _CEPH
from atoll.deploy.contract import KindInfo, Planner, Step
from atoll.model.errors import NotFound

_INFOS = {info.name: info for info in (_CEPH,)}


def kinds() -> list[KindInfo]:
    """All of them, by name."""
    return [_INFOS[name] for name in sorted(_INFOS)]


def info(kind: str) -> KindInfo:
    """One of them. Errors: NotFound."""
    try:
        return _INFOS[kind]
    except KeyError:
        raise NotFound(f"there is no kind of storage cluster {kind!r}", hint=f"kinds: {', '.join(sorted(_INFOS))}") from None


def planner(kind: str) -> Planner:
    """The master's half."""
    return cast(Planner, import_module(f"atoll.deploy.{info(kind).name}.plan").PLANNER)


def steps(kind: str, state_dir: Path, etc_dir: Path) -> dict[str, Step]:
    """The agent's half: step -> what carries it out on this node."""
    found = import_module(f"atoll.deploy.{info(kind).name}.steps").steps(state_dir, etc_dir)
    return cast(dict[str, Step], found)
