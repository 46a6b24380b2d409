"""A lab of real nodes on one machine. Needs root; nothing runs for it but the nodes themselves.

lab = Lab.create("demo", nodes=3)
lab.node("node1").exec(["hostname"]).stdout
lab.node("node2").kill()
lab.down()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from atoll.lab import layout, loops, network
from atoll.lab.base import BaseLab, LabRecord, Say, quiet
from atoll.lab.kernel import image
from atoll.lab.kernel.node import KernelNode
from atoll.lab.lock import lab_lock
from atoll.lab.nodes import Node
from atoll.lab.pid1.rootfs import SHARED
from atoll.lab.sweep import sweep, sweep_locked, traces
from atoll.model.errors import AlreadyExists, Forbidden, InvalidSize, NotFound

GiB = 1 << 30

#: mkfs.xfs refuses less.
SMALLEST_XFS = 300 << 20


class Lab(BaseLab[Node]):
    """Real nodes: namespaces, their own disks, a switch, and shared storage at /srv/shared."""

    @classmethod
    def create(
        cls,
        name: str,
        nodes: int = 3,
        *,
        disks: int = 0,
        disk_size: int = 8 * GiB,
        spare_size: int = 4 * GiB,
        shared_size: int = 8 * GiB,
        binds: Sequence[str] = (),
        kernel: Sequence[str] = (),
        say: Say = quiet,
    ) -> Self:
        """Make a lab and boot its nodes. Sizes in bytes, of sparse files: each node's own disk, each of its ``disks`` spare disks
        (/dev/disk1 ...), and the shared storage. ``binds``: directories of the machine that nodes must see although they are below /tmp.
        ``kernel``: the nodes that get a kernel of their own (see kernel/node.py).

        Raises Forbidden without root; AlreadyExists; InvalidInput; HostError. After an error nothing of it is left.
        """
        directory = layout.lab_dir(name)
        names = layout.node_names(nodes)
        require_root(f"atoll lab up --name {name}")
        if kernel:
            # Before anything is made: what it takes may be missing.
            image.build()
        for size in (disk_size, shared_size):
            if size < SMALLEST_XFS:
                raise InvalidSize(f"{size} bytes are too few for XFS, which asks for 300 MiB", hint="leave the size away: files are sparse")
        directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with lab_lock(directory) as lock:
            if traces(name, directory):
                raise AlreadyExists(f"there is a lab {name}, or what is left of one", hint=f"atoll lab down {name}")
            try:
                directory.mkdir(mode=0o755)
                record = LabRecord(
                    name, names, False, network.subnet(name, _taken_nets()), disks, list(binds), sorted(kernel, key=layout.node_number)
                )
                record.write(directory)
                network.make_switch(name, keep=[lock])
                loops.make_xfs(directory / "shared.img", shared_size, keep=[lock])
                loops.attach(directory / "shared.img", keep=[lock])

                def make(node: str) -> None:
                    place = directory / "nodes" / node
                    place.mkdir(mode=0o755, parents=True)
                    loops.make_xfs(place / "disk.img", disk_size, keep=[lock])
                    for number in range(1, disks + 1):
                        loops.make_image(place / f"spare{number}.img", spare_size)
                    kind = KernelNode if node in kernel else Node
                    kind(place, name).boot_locked(record, lock)
                    own = ", with a kernel of its own" if node in kernel else ""
                    say(f"{node} is up at {network.address(record.net, node)}{own}")

                with ThreadPoolExecutor(max_workers=4) as pool:
                    list(pool.map(make, names))
            except BaseException:
                sweep_locked(name, directory)
                raise
        return cls(directory)

    @classmethod
    def load(cls, name: str) -> Self:
        """A lab that exists. Raises NotFound."""
        lab = cls(layout.lab_dir(name))
        if lab.record.rootless:
            raise NotFound(f"the lab {name} is one of plain processes", hint="ProcessLab.load")
        return lab

    @property
    def shared(self) -> str:
        return f"/{SHARED}"

    def _node(self, name: str) -> Node:
        kind = KernelNode if name in (self.record.kernel or ()) else Node
        return kind(self.directory / "nodes" / name, self.name)

    def unmount_shared(self, node: str, *, lazy: bool = False) -> None:
        """See Node.unmount_shared."""
        self.node(node).unmount_shared(lazy=lazy)

    def mount_shared(self, node: str) -> None:
        """See Node.mount_shared."""
        self.node(node).mount_shared()

    def down(self) -> None:
        """No process, namespace, mount, loop device, bridge or file is left. Fine when it is gone already."""
        remove(self.name)


def remove(name: str) -> None:
    """Remove a lab of real nodes by its name, whatever is left of it."""
    require_root(f"atoll lab down {name}")
    sweep(name, layout.lab_dir(name))


def names() -> list[str]:
    """Every lab of real nodes, those included of which only traces are left. A node that runs has a loop device."""
    found = {name for name, _ in network.namespaces().values()}
    root = layout.root()
    if root.is_dir():
        found |= {entry.name for entry in root.iterdir() if entry.is_dir() and layout.is_name(entry.name)}
    backings = [backing.removeprefix(f"{root}/") for backing in loops.attached().values() if backing.startswith(f"{root}/")]
    found |= {word for backing in backings if layout.is_name(word := backing.split("/")[0])}
    return sorted(found)


def require_root(command: str) -> None:
    """Raises Forbidden, saying what root is needed for."""
    if os.geteuid() != 0:
        raise Forbidden(
            "real nodes are made of namespaces, mounts and loop devices, and these need root",
            hint=f"sudo {command}; or without root: atoll lab up --rootless",
        )


def _taken_nets() -> list[str]:
    found = []
    for entry in layout.root().glob("*/lab.json"):
        try:
            found.append(LabRecord.read(entry.parent).net)
        except NotFound:
            continue
    return found
