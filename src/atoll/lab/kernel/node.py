"""A kernel node: a real node whose programs run on a kernel of their own, Debian's, in an emulated machine.

For what needs the kernel's own clients: krbd, rbd-nbd, dm-crypt, NFS, iSCSI. Its root is this machine's as it was at the node's boot, with
a layer in memory over it; its own disk, its logs, the shared storage, cable and power are as those of other nodes. It is slow: about ten
times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.lab import loops, network, services
from atoll.lab.base import LabRecord, environment
from atoll.lab.kernel import channel, image
from atoll.lab.launch import launch
from atoll.lab.layout import netns_name
from atoll.lab.nodes import CONFIG, Node, binds, hosts
from atoll.lab.pid1.nodespec import KernelSpec, NodeSpec
from atoll.model.errors import HostError, NodeUnavailable, NotSupported, WrongState

#: MiB of memory; the machine that carries the lab gives what is used of it.
MEMORY = 1024
_CHANNEL = Path(__file__).with_name("channel.py")
_BOOT = 180.0


class KernelNode(Node):
    """One kernel node. ``pid`` is the process that carries its machine; processes inside have no number outside."""

    own_kernel = True
    #: Its programs take about so many times as long.
    slowness = 5

    @property
    def root(self) -> Path:
        """Not to be seen from outside. Raises NotSupported."""
        raise NotSupported(f"the files of {self.name}, a kernel node, are not seen from outside", hint=f"atoll lab exec {self.name} -- ...")

    def write_config(self, text: str) -> None:
        self.write_file(CONFIG, text)

    def write_file(self, path: str, text: str, mode: int = 0o640) -> None:
        """Write a file in the node."""
        script = 'umask 077; mkdir -p -m 755 "$(dirname "$1")" && cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'
        self.exec(["sh", "-c", script, "sh", path, f"{mode:o}"], input=text, check=True)

    def command(self, argv: Sequence[str], *, bound: bool = True) -> list[str]:
        # Asked for the error it raises: without power nothing can be run in it.
        _ = self.pid
        return [os.path.realpath(sys.executable), "-I", "-S", str(_CHANNEL), str(self.directory), "--", *argv]

    def exec(self, argv: Sequence[str], *, timeout: float | None = 300.0, **more: Any) -> Any:
        """See ``BaseNode.exec``; it has more time."""
        if "input" not in more and "stdin" not in more:
            more["stdin"] = subprocess.DEVNULL
        return super().exec(argv, timeout=timeout, **more)

    def host_pid(self, inside: int) -> int:
        raise NotSupported(f"processes of {self.name}, a kernel node, have no number outside", hint=f"atoll lab exec {self.name} -- ps ax")

    # --- services ---

    def order(self, request: Mapping[str, Any], deadline: float = 60.0) -> list[dict[str, Any]]:
        try:
            reply = json.loads(channel.order(str(self.directory), dict(request), deadline))
        except channel.Unreachable:
            raise NodeUnavailable(f"{self.name} has no power", hint=f"atoll lab boot {self.name}") from None
        except TimeoutError:
            raise NodeUnavailable(f"{self.name} did not answer within {deadline:.0f} s", hint="atoll lab status") from None
        return services.answered(self.name, request, reply)

    def services(self) -> list[services.ServiceStatus]:
        """See ``BaseNode.services``; the pids are those inside."""
        _ = self.pid
        return [services.ServiceStatus(**known) for known in self.order({"order": "status"})]

    def kill_service(self, name: str, number: int) -> int:
        pid = self.service_pid(name)
        if not pid or self.exec(["kill", f"-{number}", str(pid)]).returncode:
            raise WrongState(f"the service {name} of {self.name} does not run", hint=f"atoll lab status {self.lab}")
        return pid

    # --- power ---

    def _lose_unwritten(self, pid: int) -> None:
        """It is in the memory of the machine, and ends with it."""

    def boot_locked(self, record: LabRecord, lock: int) -> None:
        """``boot`` for those who hold the lab's lock."""
        self._ready_to_boot()
        lab = self.directory.parents[1]
        boots, python = image.build(), os.path.realpath(sys.executable)
        if " " in f"{boots.modules}{python}{_CHANNEL}":
            raise HostError("kernel nodes cannot be made of programs in a directory with a space in its name", hint="move the working copy")
        network.unplug(self.lab, self.name)
        network.plug_tap(self.lab, self.name, keep=[lock])
        disks = [str(self.directory / "disk.img"), *(str(self.directory / f"spare{number}.img") for number in range(1, record.disks + 1))]
        spec = NodeSpec(
            lab=self.lab,
            node=self.name,
            address=network.address(record.net, self.name),
            namespaces=True,
            netns=f"{network.NETNS_DIR}/{netns_name(self.lab, 'switch')}",
            disk="/dev/vda",
            shared=loops.attach(lab / "shared.img", keep=[lock]),
            spares=[f"/dev/vd{chr(ord('a') + number)}" for number in range(1, record.disks + 1)],
            hosts=hosts(record),
            machine_id=loops.machine_id(self.lab, self.name),
            binds=binds(record.binds or []),
            mask=str(lab),
            environment=environment(self.lab, self.name, CONFIG),
            kernel=KernelSpec(
                kernel=str(boots.kernel),
                initrd=str(boots.initrd),
                modules=str(boots.modules),
                python=python,
                virtiofsd=image.VIRTIOFSD,
                mac=network.mac(record.net, self.name),
                memory=MEMORY,
                disks=disks,
            ),
        )
        launch(self.directory, spec, lock, _BOOT)
