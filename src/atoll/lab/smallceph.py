"""A real Ceph cluster of one node, small and fast: for tests and for trying out the ``rbd`` driver.

One monitor, one OSD that keeps everything in memory, and on request a manager. The daemons are children of the caller (they stay in the
foreground), so that they end with it; nothing is left but the directory, which ``down`` removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atoll.model.errors import DeadlineExceeded, HostError

#: Programs that it needs; ``missing`` says which are not there.
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "ceph", "rbd")
_PR_SET_PDEATHSIG = 1
_CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:{address}:{v2},v1:{address}:{v1}]
mon_initial_members = a
public_network = {network}
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
ms_bind_ipv6 = false
ms_bind_port_min = {osd}
ms_bind_port_max = {last}
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_allow_pool_delete = true
mon_data_avail_warn = 3
mon_data_avail_crit = 1
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_pool_default_pg_num = 8
osd_objectstore = memstore
memstore_device_bytes = {bytes}
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
osd_max_markdown_count = 1000
osd_mon_report_interval = 1
ms_async_op_threads = 2
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_tick_interval = 1
mon_mgr_digest_period = 1
mgr_stats_period = 1
mgr_tick_period = 1
mgr_initial_modules =
mon_data = {place}/mon
mgr_data = {place}/mgr
osd_data = {place}/osd
run_dir = {place}
admin_socket = {place}/$type-$id.asok
log_file = {place}/$type-$id.log
log_to_stderr = false
mon_cluster_log_file = {place}/cluster.log
keyring = {place}/$name.keyring
[mon]
keyring = {place}/mon/keyring
[osd]
keyring = {place}/osd/keyring
[mgr]
keyring = {place}/mgr/keyring
"""


def missing() -> list[str]:
    """The programs that are not installed (Debian: ceph-mon ceph-osd ceph-common)."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _with_parent() -> None:
    """In the child: end when the parent does, whatever happens to it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _ports(address: str, count: int) -> list[int]:
    """Free ports, found together so that they differ."""
    probes = []
    for _ in range(count):
        probe = socket.socket()
        probe.bind((address, 0))
        probes.append(probe)
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return sorted(found)


class SmallCeph:
    """The cluster. ``place``: its directory, whose path is short (Unix sockets lie in it). ``conf``: what clients need beside a keyring.
    ``netns``: the network namespace that has ``address``, such as the one of a lab's switch; empty = ours.

    Use it from the main thread: the daemons end with the thread that started them.
    """

    def __init__(self, place: Path, address: str = "127.0.0.1", network: str = "127.0.0.0/8", size: int = 1 << 30, netns: str = "") -> None:
        self._within = ["nsenter", f"--net={netns}", "--"] if netns else []
        self.place, self.address, self._network, self._size = place, address, network, size
        self.conf = place / "ceph.conf"
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def up(self, *, manager: bool = False, deadline: float = 60.0) -> None:
        """Make and start it; returns when its OSD is up. Errors: HostError, DeadlineExceeded."""
        if gone := missing():
            raise HostError(f"these programs are missing: {', '.join(gone)}", hint="apt-get install ceph-mon ceph-osd ceph-common")
        end = time.monotonic() + deadline
        for part in ("mon", "osd", "mgr"):
            (self.place / part).mkdir(parents=True, exist_ok=True)
        try:
            self._make_monitor()
            self._start("mon", ["ceph-mon", "-f", "-i", "a"])
            self._make_osd()
            self._start("osd", ["ceph-osd", "-f", "-i", "0"])
            self._wait(lambda: self.ask("osd", "stat")["num_up_osds"] == 1, end)
            if manager:
                self.start_manager(end - time.monotonic())
        except BaseException:
            self.down()
            raise

    def start_manager(self, deadline: float = 60.0) -> None:
        """Without one Ceph has no figures, and does all else."""
        self.user("mgr.a", "mgr/keyring", mon="allow profile mgr", osd="allow *", mds="allow *")
        self._start("mgr", ["ceph-mgr", "-f", "-i", "a"])
        self._wait(lambda: bool(self.ask("mgr", "stat")["available"]), time.monotonic() + deadline)

    def _wait(self, condition: Callable[[], bool], end: float) -> None:
        while not condition():
            self._check(end)
            time.sleep(0.05)

    def _make_monitor(self) -> None:
        v2, v1, osd = (3300, 6789, 6800) if self._within else _ports(self.address, 3)
        fsid = str(uuid.uuid4())
        values = {"place": self.place, "fsid": fsid, "address": self.address, "network": self._network, "v1": v1, "v2": v2, "osd": osd}
        # An OSD binds eight ports, from this one on those that it finds free.
        self.conf.write_text(_CONF.format(**values, last=min(osd + 400, 65535), bytes=self._size))
        keys, admin = self.place / "mon.keyring", self.place / "client.admin.keyring"
        self.run("ceph-authtool", "--create-keyring", str(keys), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        every = [word for part in ("mon", "osd", "mgr", "mds") for word in ("--cap", part, "allow *")]
        self.run("ceph-authtool", "--create-keyring", str(admin), "--gen-key", "-n", "client.admin", *every)
        self.run("ceph-authtool", str(keys), "--import-keyring", str(admin))
        where = f"[v2:{self.address}:{v2},v1:{self.address}:{v1}]"
        self.run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", where, str(self.place / "monmap"))
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self.place / "monmap"), "--keyring", str(keys))

    def _make_osd(self) -> None:
        self.ask("osd", "new", str(ident := uuid.uuid4()))
        self.user("osd.0", "osd/keyring", mon="allow profile osd", mgr="allow profile osd", osd="allow *")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", str(ident))

    # --- asking ---

    def run(self, *argv: str, deadline: float = 60.0, input: str | None = None) -> str:
        """Run a command of Ceph's for this cluster, as its administrator; what it printed. Errors: HostError with its words."""
        environment = {**os.environ, "CEPH_CONF": str(self.conf), "CEPH_ARGS": ""}
        try:
            done = subprocess.run([*self._within, *argv], capture_output=True, text=True, timeout=deadline, env=environment, input=input)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{' '.join(argv)} took longer than {deadline:g} s") from None
        if done.returncode:
            raise HostError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def ask(self, *words: str) -> Any:
        """A command of ``ceph``; its answer as data."""
        return json.loads(self.run("ceph", "--connect-timeout", "30", *words, "-f", "json") or "null")

    def user(self, name: str, keyring: str = "", **caps: str) -> Path:
        """Make a user, with its keyring (mode 0600) in this directory; the keyring's path."""
        path = self.place / (keyring or f"{name}.keyring")
        text = self.run("ceph", "auth", "get-or-create", name, *(word for part in caps.items() for word in part))
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    def pool(self, name: str) -> None:
        """Make a pool for RBD."""
        self.run("ceph", "osd", "pool", "create", name, "8", "8")
        self.run("ceph", "osd", "pool", "application", "enable", name, "rbd")
        self.run("rbd", "pool", "init", name)

    # --- faults and end ---

    def signal(self, daemon: str, number: int) -> None:
        """Send a signal to ``mon``, ``osd`` or ``mgr``."""
        self._running[daemon].send_signal(number)

    def end(self, daemon: str) -> None:
        """Kill ``mon``, ``osd`` or ``mgr``."""
        process = self._running.pop(daemon)
        process.kill()
        process.wait()

    def again(self, daemon: str) -> None:
        """Start ``mon`` again after ``end``, with what it had."""
        self._start(daemon, [f"ceph-{daemon}", "-f", "-i", "a"])

    def down(self) -> None:
        """End every daemon and remove the directory."""
        for process in reversed(self._running.values()):
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.place)

    def _start(self, name: str, argv: Sequence[str]) -> None:
        with (self.place / f"{name}.out").open("wb") as out:
            environment = {**os.environ, "CEPH_CONF": str(self.conf), "CEPH_ARGS": ""}
            self._running[name] = subprocess.Popen(
                [*self._within, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, preexec_fn=_with_parent
            )

    def _check(self, end: float) -> None:
        for name, process in self._running.items():
            if process.poll() is not None:
                words = (self.place / f"{name}.out").read_text(errors="replace").strip()[-500:]
                raise HostError(f"the {name} of the small Ceph ended: {words}")
        if time.monotonic() > end:
            raise DeadlineExceeded("the small Ceph is not up in time", hint=f"look at the logs in {self.place}")
