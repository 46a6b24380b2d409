"""A cluster of real nodes whose guests have their disks in a real Ceph."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from support import Cluster

from atoll.lab import network
from atoll.lab.layout import netns_name
from ceph_support import Ceph


class RbdCluster(Cluster):
    """A cluster whose nodes reach a small Ceph at their switch."""

    def __init__(self, name: str, nodes: int) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="atoll-c-", dir="/tmp"))
        self.place.chmod(0o755)
        super().__init__(name, nodes, all_vm=True, binds=[str(self.place)])
        try:
            net, switch = self.lab.record.net, netns_name(name, "switch")
            subprocess.run(["ip", "-n", switch, "addr", "add", f"{net}.2/24", "dev", network.BRIDGE], check=True)
            self.ceph = Ceph(self.place / "c", f"{net}.2", f"{net}.0/24", netns=f"{network.NETNS_DIR}/{switch}")
            self.ceph.up()
            # It has no manager, on purpose. Two minutes after its beginning Ceph would begin to complain of that.
            self.ceph.run("ceph", "config", "set", "mon", "mon_mgr_mkfs_grace", "100000")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if hasattr(self, "ceph"):
            self.ceph.down()
        super().close()
        shutil.rmtree(self.place, ignore_errors=True)

    def add_pool(self, name: str, **options: str) -> None:
        """Only node1, which has the role of a storage controller, has the keyring of the user that manages the pool."""
        made = self.ceph.pool_ref(name, **options)
        there = self.node("node1").root / "etc" / "atoll" / "manager.keyring"
        shutil.move(made.options["keyring"], there)
        made.options["keyring"] = "/etc/atoll/manager.keyring"
        self.do("POST", "/v1/pools", name=name, driver="rbd", options=made.options)

    def rbd(self, *words: str) -> str:
        return self.ceph.run("rbd", *words)

    def image_spec(self, instance: str, index: int = 0) -> str:
        disk = self.row("instances", instance)["disks"][index]
        volume = self.row("volumes", disk["volume"])
        return f"{self.row('pools', disk['pool'])['options']['pool']}/{volume['logical_id']}"

    def image_of(self, instance: str, index: int = 0) -> Path:
        """A copy of what is on the disk now."""
        path = self.place / f"{instance}-{index}.raw"
        path.unlink(missing_ok=True)
        self.rbd("export", "--no-progress", self.image_spec(instance, index), str(path))
        return path

    def argv(self, node: str) -> str:
        """Every command line of a node."""
        found = ""
        within = os.readlink(f"/proc/{self.node(node).pid}/ns/pid")
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") == within:
                    found += Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace") + "\n"
            except OSError:
                continue
        return found


def keys(cluster: RbdCluster) -> list[str]:
    """Every key that Ceph knows."""
    return [row["key"] for row in cluster.ceph.ask("auth", "ls")["auth_dump"]]


def runstate(cluster: RbdCluster, node: str, instance: str) -> str:
    """What the guest's QEMU says, by the socket that is for watchdogs."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(30)
        monitor.connect(str(cluster.node(node).run_dir / "guests" / instance / "watchdog"))
        stream = monitor.makefile("rw")
        stream.readline()
        for command in ("qmp_capabilities", "query-status"):
            stream.write(json.dumps({"execute": command}) + "\n")
            stream.flush()
            answer: dict[str, Any] = {}
            while "return" not in answer:
                answer = json.loads(stream.readline())
        return str(answer["return"]["status"])
