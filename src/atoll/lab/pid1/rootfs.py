"""A root of its own for a node: the machine's programs, and private state, devices and settings.

/usr /bin /opt /home ...   the machine's, whatever top-level directories it has
/etc /var                  the machine's with a private layer over them, empty again after each boot
/etc/atoll /var/lib/atoll  on the node's own disk: what survives a power cut; /etc/ceph and /var/lib/ceph too
/var/log/atoll             kept outside, so that a dead node's logs can be read
/run /tmp /dev /proc /sys  private
/srv/shared                the lab's shared storage
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from atoll.lab.pid1.nodespec import NodeSpec
from atoll.lab.pid1.syscalls import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_SLAVE,
    mount,
    mount_disk,
    pivot_root,
    umount,
)

#: Top-level directories that a node does not share with the machine.
PRIVATE = frozenset({"proc", "sys", "dev", "run", "tmp", "etc", "var", "srv", "lost+found"})

#: Directory on the node's disk -> where the node sees it.
PERSISTENT = {"state": "var/lib/atoll", "etc": "etc/atoll", "ceph": "var/lib/ceph", "etc-ceph": "etc/ceph"}

SHARED = "srv/shared"
#: Where a kernel node finds the lab's files: ``node`` (its directory) and ``shared``.
LAB = "/.lab"

#: Devices that a node gets if the machine has them. Not kvm: a node must find out by itself that it has none.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun", "loop-control", "hwrng")
_LOOPS = 64

#: What ``guest_user`` in atoll.toml is by default. The machine that carries the lab need not have this user.
GUEST_USER, GUEST_ID = "atoll-guest", 64070


def build(spec: NodeSpec, directory: Path) -> None:
    """Make the root below ``directory``/root and move into it. The caller has fresh mount, uts, ipc and pid namespaces to itself."""
    socket.sethostname(spec.node)
    mount("none", "/", flags=MS_REC | MS_SLAVE)
    root = directory / "root"
    mount("atoll-node", str(root), "tmpfs", MS_NOSUID, "mode=755,size=64m")
    os.chdir(root)
    _system_directories()
    _layers()
    _settings(spec)
    _disk(spec)
    _private(spec, directory)
    _devices(spec)
    for path in spec.binds:
        _bind(path, path.lstrip("/"), MS_REC)
    if spec.mask and os.path.isdir(spec.mask.lstrip("/")):
        mount("none", spec.mask.lstrip("/"), "tmpfs", MS_RDONLY, "mode=700,size=4k")
    mount_shared(spec, SHARED)
    pivot_root(".", ".")
    umount(".", MNT_DETACH)
    os.chdir("/")


def build_inside(spec: NodeSpec) -> None:
    """The same for a kernel node, of whose root everything is a layer over the machine's, and whose kernel has devices of its own."""
    socket.sethostname(spec.node)
    os.chdir("/")
    # Opened before their places are covered.
    binds = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in spec.binds}
    if os.path.isdir(spec.mask):
        mount("none", spec.mask, "tmpfs", MS_RDONLY, "mode=700,size=4k")
    _settings(spec)
    _disk(spec)
    _memory()
    os.mkdir("run/atoll")
    _bind(f"{LAB}/node/log", "var/log/atoll")
    for name in ("net", "pts", "shm"):
        os.makedirs(f"dev/{name}", exist_ok=True)
    # The kernel loads their drivers when they are opened, but does not make them.
    for name, minor in (("net/tun", 200), ("loop-control", 237)):
        if not os.path.exists(f"dev/{name}"):
            _node(f"dev/{name}", stat.S_IFCHR | 0o666 if name == "net/tun" else stat.S_IFCHR | 0o660, os.makedev(10, minor))
    for number, device in enumerate(spec.spares, 1):
        _node(f"dev/disk{number}", stat.S_IFBLK | 0o660, os.stat(device).st_rdev)
    _dev_mounts()
    for path, handle in binds.items():
        _bind(f"/proc/self/fd/{handle}", path.lstrip("/"), MS_REC)
        os.close(handle)
    mount_shared(spec)


def mount_shared(spec: NodeSpec, target: str = f"/{SHARED}") -> None:
    """Mount the shared storage. Every node mounts the same device: the kernel gives all of them the same file system."""
    if not spec.shared:
        return
    os.makedirs(target, exist_ok=True)
    if spec.kernel:
        mount(f"{LAB}/shared", target, flags=MS_BIND)
    else:
        mount_disk(spec.shared, target, "xfs")


def _system_directories() -> None:
    for entry in os.scandir("/"):
        if entry.name in PRIVATE:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), entry.name)
        elif entry.is_dir():
            _bind(entry.path, entry.name, MS_REC)


def _bind(source: str, target: str, flags: int = 0) -> None:
    os.makedirs(target, exist_ok=True)
    mount(source, target, flags=MS_BIND | flags)


def _layers() -> None:
    os.mkdir(".layers")
    mount("atoll-layers", ".layers", "tmpfs", MS_NOSUID, "mode=755,size=512m")
    for name in ("etc", "var"):
        os.mkdir(name)
        for part in ("upper", "work"):
            os.makedirs(f".layers/{name}/{part}")
        # The paths are relative: an absolute one with a comma or a colon in it could not be told in mount options.
        mount("atoll-layer", name, "overlay", 0, f"lowerdir=/{name},upperdir=.layers/{name}/upper,workdir=.layers/{name}/work")
    umount(".layers", MNT_DETACH)
    os.rmdir(".layers")


def _settings(spec: NodeSpec) -> None:
    for name, text in (("hostname", spec.node + "\n"), ("hosts", spec.hosts), ("machine-id", spec.machine_id + "\n")):
        path = Path("etc", name)
        # Removed first: the machine's may be a link to a place that the node does not have.
        path.unlink(missing_ok=True)
        path.write_text(text)
    # The user that guests run as; a number of its own, the same on all nodes, because they share files.
    for name, line in (
        ("passwd", f"{GUEST_USER}:x:{GUEST_ID}:{GUEST_ID}::/nonexistent:/usr/sbin/nologin"),
        ("group", f"{GUEST_USER}:x:{GUEST_ID}:"),
    ):
        path = Path("etc", name)
        known = path.read_text()
        if f"\n{GUEST_USER}:" not in known:
            path.write_text(f"{known.rstrip()}\n{line}\n")


def _disk(spec: NodeSpec) -> None:
    os.mkdir(".disk")
    mount_disk(spec.disk, ".disk", "xfs")
    for name, target in PERSISTENT.items():
        os.makedirs(f".disk/{name}", exist_ok=True)
        _bind(f".disk/{name}", target)
    os.makedirs(".disk/state/disks", exist_ok=True)
    umount(".disk", MNT_DETACH)
    os.rmdir(".disk")


def _private(spec: NodeSpec, directory: Path) -> None:
    _memory()
    _bind(str(directory / "run"), "run/atoll")
    _bind(str(directory / "log"), "var/log/atoll")
    for name in ("proc", "sys"):
        os.mkdir(name)
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)


def _memory() -> None:
    for name, options in (("run", "mode=755,size=64m"), ("tmp", "mode=1777"), ("var/tmp", "mode=1777"), ("srv", "mode=755,size=1m")):
        os.makedirs(name, exist_ok=True)
        mount("atoll-" + name.rpartition("/")[2], name, "tmpfs", MS_NOSUID, options)
    os.mkdir("run/lock")
    os.chmod("run/lock", 0o1777)


def _devices(spec: NodeSpec) -> None:
    os.mkdir("dev")
    mount("atoll-dev", "dev", "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for name in ("net", "pts", "shm"):
        os.mkdir(f"dev/{name}")
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            known = os.stat(f"/dev/{name}")
            _node(f"dev/{name}", known.st_mode, known.st_rdev)
    for number in range(_LOOPS):
        _node(f"dev/loop{number}", stat.S_IFBLK | 0o660, os.makedev(7, number))
    for device in filter(None, (spec.disk, spec.shared)):
        if not os.path.exists(device.lstrip("/")):
            _node(device.lstrip("/"), stat.S_IFBLK | 0o660, os.stat(device).st_rdev)
    for number, device in enumerate(spec.spares, 1):
        _node(f"dev/disk{number}", stat.S_IFBLK | 0o660, os.stat(device).st_rdev)
    _dev_mounts()


def _dev_mounts() -> None:
    mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("atoll-shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for name, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        if not os.path.lexists(f"dev/{name}"):
            os.symlink(target, f"dev/{name}")


def _node(path: str, mode: int, device: int) -> None:
    os.mknod(path, mode, device)
    os.chmod(path, stat.S_IMODE(mode))
