"""What the first process of a node is told: ``node.json`` in the node's directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class KernelSpec:
    """What the emulated machine of a kernel node is made of; paths are the carrying machine's."""

    kernel: str
    initrd: str
    modules: str
    python: str
    virtiofsd: str
    mac: str
    #: Its memory in MiB.
    memory: int
    #: Files of its disks: the node's own, then the spares.
    disks: list[str]


@dataclass(frozen=True)
class NodeSpec:
    """One node. Devices are paths on the machine that carries the lab; all other strings are as the node sees them."""

    lab: str
    node: str
    address: str
    #: The node is a set of namespaces with a root of its own; else plain processes.
    namespaces: bool
    netns: str = ""
    #: The node's own disk, XFS: what survives a power cut.
    disk: str = ""
    #: The file system that all nodes see at /srv/shared, XFS.
    shared: str = ""
    #: Spare disks, /dev/disk1 and so on in the node.
    spares: list[str] = field(default_factory=list)
    #: The contents of /etc/hosts.
    hosts: str = ""
    machine_id: str = ""
    #: Directories of the machine that the node must see although their parents are private: an interpreter in /tmp, say.
    binds: list[str] = field(default_factory=list)
    #: A directory that the node must not see: the lab's files.
    mask: str = ""
    #: Added to the environment of every service.
    environment: dict[str, str] = field(default_factory=dict)
    agent_port: int = 7771
    master_port: int = 7770
    #: The node is an emulated machine with a kernel of its own. ``netns`` is the switch's then, and ``disk`` and ``spares`` are
    #: as the node sees them.
    kernel: KernelSpec | None = None

    def write(self, directory: Path) -> None:
        """Into ``node.json`` of the node's directory, whole or not at all."""
        partial = directory / "node.json.new"
        partial.write_text(json.dumps(asdict(self), indent=1))
        os.replace(partial, directory / "node.json")

    @classmethod
    def read(cls, directory: Path) -> NodeSpec:
        """From ``node.json``; FileNotFoundError when the node has none."""
        known = json.loads((directory / "node.json").read_text())
        kernel = known.pop("kernel", None)
        return cls(**known, kernel=KernelSpec(**kernel) if kernel else None)
