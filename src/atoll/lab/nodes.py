"""A real node: a set of namespaces with a root, a disk and a network cable of its own."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from atoll.lab import loops, network
from atoll.lab.base import SOURCE, BaseNode, LabRecord, environment
from atoll.lab.host import kill_and_wait, namespace, status_field
from atoll.lab.launch import launch
from atoll.lab.layout import netns_name
from atoll.lab.lock import lab_lock
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.model.errors import HostError, WrongState

CONFIG = "/etc/atoll/atoll.toml"

#: XFS_IOC_GOINGDOWN and XFS_FSOP_GOING_FLAGS_NOLOGFLUSH: what ``xfs_io -x -c shutdown`` does.
_XFS_GOING_DOWN, _WITHOUT_FLUSH = 0x8004587D, 2

#: Places that every node has to itself; what of the machine lies below them must be bound in by name to be seen.
_PRIVATE = ("/tmp", "/run", "/srv", "/dev", "/var/tmp")


class Node(BaseNode):
    """One real node. Its own disk (/etc/atoll, /var/lib/atoll) outlives ``kill``; /run, /tmp and the rest are new at each boot."""

    @property
    def root(self) -> Path:
        """The node's root directory as the machine sees it. Absolute links in it lead outside."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def config_path(self) -> str:
        return CONFIG

    def write_config(self, text: str) -> None:
        path = self.root / CONFIG.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def connected(self) -> bool:
        """Whether its network cable is in; False without power."""
        return network.links(self.lab).get(self.name, False)

    def _is_first(self, pid: int) -> bool:
        return status_field(pid, "NSpid")[-1:] == ["1"] and namespace(pid, "pid") != namespace("self", "pid")

    def command(self, argv: Sequence[str], *, bound: bool = True) -> list[str]:
        # nsenter waits for its child but does not take it along when it is killed; setpriv makes the kernel do that.
        leash = ["setpriv", "--pdeathsig", "KILL", "--"] if bound else []
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "--", *leash, *argv]

    # --- power ---

    def kill(self) -> None:
        """A power cut: nothing leaves by the network any more, what was not fsynced is gone, every process ends at once.

        Other nodes notice by silence only. Shared storage is not touched: it is a server elsewhere. Spare disks lose nothing that
        reached them, which is everything for those who write with O_DIRECT. Raises NodeUnavailable when it has no power already.
        """
        with lab_lock(self.directory.parents[1]):
            pid = self.pid
            network.set_link(self.lab, self.name, up=False)
            self._lose_unwritten(pid)
            kill_and_wait(pid)
            network.unplug(self.lab, self.name)
            loops.unmap(self.lab, self.directory, self.name)
            loops.detach(self.directory)

    def _lose_unwritten(self, pid: int) -> None:
        """What was not fsynced."""
        _shut_down_xfs(Path(f"/proc/{pid}/root/var/lib/atoll"))

    def boot(self) -> None:
        """Power on: the same disk, a fresh everything else, the cable plugged in, services started. Raises WrongState when it has power."""
        lab = self.directory.parents[1]
        with lab_lock(lab) as lock:
            self.boot_locked(LabRecord.read(lab), lock)

    def boot_locked(self, record: LabRecord, lock: int) -> None:
        """``boot`` for those who hold the lab's lock."""
        self._ready_to_boot()
        lab = self.directory.parents[1]
        network.unplug(self.lab, self.name)
        network.plug(self.lab, self.name, record.net, keep=[lock])
        spec = NodeSpec(
            lab=self.lab,
            node=self.name,
            address=network.address(record.net, self.name),
            namespaces=True,
            netns=f"{network.NETNS_DIR}/{netns_name(self.lab, self.name)}",
            disk=loops.attach(self.directory / "disk.img", keep=[lock]),
            shared=loops.attach(lab / "shared.img", keep=[lock]),
            spares=[loops.attach(self.directory / f"spare{number}.img", keep=[lock]) for number in range(1, record.disks + 1)],
            hosts=hosts(record),
            machine_id=loops.machine_id(self.lab, self.name),
            binds=binds(record.binds or []),
            mask=str(lab),
            environment=environment(self.lab, self.name, CONFIG),
        )
        launch(self.directory, spec, lock)

    def _ready_to_boot(self) -> None:
        if self.running:
            raise WrongState(f"{self.name} of the lab {self.lab} has power", hint=f"atoll lab kill {self.name}")
        for part in ("run", "log", "root"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        self.clear_run_dir()

    # --- network ---

    def cut(self) -> None:
        """Raises NodeUnavailable without power."""
        self._link(up=False)

    def heal(self) -> None:
        """Raises NodeUnavailable without power."""
        self._link(up=True)

    def _link(self, up: bool) -> None:
        # Asked for the error it raises: without power there is no cable.
        _ = self.pid
        network.set_link(self.lab, self.name, up)

    # --- shared storage ---

    def unmount_shared(self, *, lazy: bool = False) -> None:
        """Unmount /srv/shared in this node. Raises HostError when it is busy, unless ``lazy``: then it goes out of sight at once."""
        self.order({"order": "unmount-shared", "lazy": lazy})

    def mount_shared(self) -> None:
        """Mount it again; a boot does too."""
        self.order({"order": "mount-shared"})


def hosts(record: LabRecord) -> str:
    """What /etc/hosts of every node says."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    return "\n".join(lines + [f"{network.address(record.net, name)} {name}" for name in record.nodes]) + "\n"


def binds(extra: Sequence[str]) -> list[str]:
    """The interpreter and the code, where they lie in a place that nodes have to themselves; a test run from /tmp, say."""
    wanted = {sys.prefix, sys.base_prefix, str(SOURCE), os.path.dirname(os.path.realpath(sys.executable)), *extra}
    hidden = sorted(path for path in wanted if path.startswith(tuple(f"{place}/" for place in _PRIVATE)))
    return [path for path in hidden if not any(path.startswith(f"{other}/") for other in hidden)]


def _shut_down_xfs(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(handle, _XFS_GOING_DOWN, struct.pack("I", _WITHOUT_FLUSH))
        finally:
            os.close(handle)
    except OSError as error:
        raise HostError(f"cannot shut down the file system of {path}: {error.strerror}", hint="is the node's disk still mounted?") from None
