"""Names and places of a lab. All that belongs to a lab can be told by its name alone, so that ``down`` works when every file is lost."""

from __future__ import annotations

import os
import re
from pathlib import Path

from atoll.model.errors import HostError, InvalidInput

#: Where labs of real nodes live, one directory each. Its path stays short: Unix sockets below it allow 107 bytes.
DEFAULT_ROOT = "/var/lib/atoll-lab"

_NAME = re.compile(r"[a-z][a-z0-9-]{0,23}\Z")
_NODE = re.compile(r"node[1-9][0-9]{0,2}\Z")
_NETNS = re.compile(r"atoll-(?P<lab>[a-z][a-z0-9-]{0,23})-(?P<part>switch|node[1-9][0-9]{0,2})\Z")
_MARKER = re.compile(r"(?P<kind>atoll-lab|atoll-rootless-lab):(?P<lab>[a-z][a-z0-9-]{0,23}):(?P<node>node[1-9][0-9]{0,2})\Z")

#: The environment variable that carries the marker to all that a node starts; how a node without namespaces is found again.
MARKER_VARIABLE = "ATOLL_LAB_MARKER"


def check_name(name: str) -> str:
    """The name, if a lab may be called so."""
    if not is_name(name):
        raise InvalidInput(
            f"{name!r} cannot be a lab's name: it takes 1 to 24 small letters, digits and hyphens, a letter first", hint="--name demo"
        )
    return name


def is_name(text: str) -> bool:
    """Whether a lab may be called so."""
    return bool(_NAME.match(text))


def root() -> Path:
    """The directory of the labs of real nodes; ``ATOLL_LAB_DIR`` names another."""
    return Path(os.environ.get("ATOLL_LAB_DIR") or DEFAULT_ROOT).absolute()


def rootless_root() -> Path:
    """The directory of this user's labs of plain processes. It must belong to the user: others may not lay files in it.

    Raises HostError when somebody else made it.
    """
    given = os.environ.get("ATOLL_LAB_DIR")
    path = Path(given).absolute() if given else Path(f"/tmp/atoll-lab-{os.getuid()}")
    if path.exists() and not given and path.lstat().st_uid != os.getuid():
        raise HostError(f"{path} belongs to another user", hint="ATOLL_LAB_DIR=DIR names another place for labs")
    return path


def lab_dir(name: str, *, rootless: bool = False) -> Path:
    """Where the files of a lab are, or would be."""
    return (rootless_root() if rootless else root()) / check_name(name)


def node_names(count: int) -> list[str]:
    """``node1`` to ``nodeN``."""
    if not 1 <= count <= 99:
        raise InvalidInput(f"a lab has 1 to 99 nodes, not {count}", hint="atoll lab up --nodes 3")
    return [f"node{number}" for number in range(1, count + 1)]


def kernel_nodes(which: str, names: list[str]) -> list[str]:
    """Which nodes ``--kernel`` means: ``all``, so many of the last ones, or names with commas between them. Raises InvalidInput."""
    if which in ("", "all"):
        return list(names) if which else []
    if which.isdigit():
        if int(which) > len(names):
            raise InvalidInput(f"{which} of {len(names)} nodes cannot be kernel nodes", hint=f"atoll lab up --nodes {which} --kernel")
        return names[len(names) - int(which) :]
    chosen = which.split(",")
    if strange := sorted(set(chosen) - set(names)):
        raise InvalidInput(f"--kernel {which}: the lab has no {', '.join(strange)}; it has {', '.join(names)}", hint="--kernel 1")
    return sorted(set(chosen), key=names.index)


def node_number(node: str) -> int:
    """The number in a node's name, from 1."""
    if not _NODE.match(node):
        raise InvalidInput(f"{node!r} is no node of a lab: they are called node1, node2, ...", hint="atoll lab status")
    return int(node.removeprefix("node"))


def marker(lab: str, node: str, *, rootless: bool = False) -> str:
    """The argument by which a node's first process is known to everybody who lists processes."""
    return f"{'atoll-rootless-lab' if rootless else 'atoll-lab'}:{lab}:{node}"


def parse_marker(text: str, *, rootless: bool = False) -> tuple[str, str] | None:
    """(lab, node) if this is the marker of a node of this kind."""
    found = _MARKER.match(text)
    if not found or (found["kind"] == "atoll-rootless-lab") != rootless:
        return None
    return found["lab"], found["node"]


def netns_name(lab: str, part: str) -> str:
    """The network namespace of a node, or of the lab's ``switch``."""
    return f"atoll-{lab}-{part}"


def parse_netns(name: str) -> tuple[str, str] | None:
    """(lab, node or ``switch``) if this network namespace is a lab's."""
    found = _NETNS.match(name)
    return (found["lab"], found["part"]) if found else None
