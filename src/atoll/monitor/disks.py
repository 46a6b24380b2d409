"""What lies on a machine's own disks: room, whether what is synced is durable, and who may read secrets."""

from __future__ import annotations

import os
import stat as modes
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atoll.monitor.checks import Check, error, ok, size, warning
from atoll.runtime.config import Config
from atoll.storage.files.mountinfo import unescape

#: Free space below which it is a warning, or an error: a share of the whole and bytes, whichever is met first says nothing yet.
LOW, VERY_LOW = (0.10, 1 << 30), (0.03, 256 << 20)
#: File systems that forget everything, those that are somebody else's, and those that do not keep what Unix promises.
FORGETFUL = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})
REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs", "gfs2", "ocfs2"})
FOREIGN = frozenset({"vfat", "exfat", "ntfs", "ntfs3", "msdos", "hfsplus"})
#: Mount options with which a sync does not reach the disk.
UNSAFE = frozenset({"nobarrier", "barrier=0", "fsync_mode=nobarrier"})
#: Seconds that a sync may take before jobs are slow.
SLOW = 0.1


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo, with all of its options."""

    point: str
    fstype: str
    source: str
    options: frozenset[str]


def mounts() -> list[Mount]:
    """All mounts, the newest last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split(" ")
        options = frozenset([*fields[5].split(","), *rest[2].split(",")])
        found.append(Mount(unescape(fields[4]), rest[0], unescape(rest[1]), options))
    return found


def mount_for(path: Path, known: list[Mount]) -> Mount | None:
    """The mount on which a path (which exists) lies."""
    real = os.path.realpath(path)
    fitting = [m for m in known if real == m.point or real.startswith(m.point.rstrip("/") + "/")]
    # Of mounts on the same point the last one is seen.
    return max(reversed(fitting), key=lambda m: len(m.point)) if fitting else None


def _nearest(path: Path) -> Path:
    """The path, or the nearest directory above that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


def directories(config: Config) -> list[Check]:
    """The daemons' directories: room and inodes; and whether the state outlives a power cut."""
    found: list[Check] = []
    known = mounts()
    for name, path in (("state", config.state_dir), ("configuration", config.etc_dir), ("logs", config.log_dir), ("run", config.run_dir)):
        found += _room(name, path)
    found += _durable(config.state_dir, mount_for(_nearest(config.state_dir), known))
    return found


def _room(name: str, path: Path) -> Iterator[Check]:
    about = f"{name} directory {path}"
    there = _nearest(path)
    try:
        status = os.statvfs(there)
    except OSError as failed:
        yield error(about, f"it cannot be looked at: {failed.strerror}", "the daemons cannot use it either", f"ls -ld {path}; mount | tail")
        return
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    what = f"{size(free)} of {size(total)} free"
    why = "when it is full, nothing can be begun or noted any more"
    if _scarce(free, total, VERY_LOW):
        yield error(about, what, why, f"df -h {there}; du -xh {there} | sort -h | tail")
    elif _scarce(free, total, LOW):
        yield warning(about, what, why, f"df -h {there}; du -xh {there} | sort -h | tail")
    elif status.f_flag & os.ST_RDONLY:
        yield error(about, "it is mounted read-only", "nothing can be noted", f"dmesg | tail; mount -o remount,rw {there}")
    else:
        yield ok(about, what)
    if status.f_files and status.f_favail < max(1000, status.f_files * LOW[0]):
        level = error if status.f_favail < max(100, status.f_files * VERY_LOW[0]) else warning
        yield level(about, f"{status.f_favail} of {status.f_files} inodes free", "without inodes no file can be made", f"df -i {there}")


def _scarce(free: int, total: int, limit: tuple[float, int]) -> bool:
    share, number = limit
    return free < total * share and free < number


def _durable(path: Path, mount: Mount | None) -> Iterator[Check]:
    about = f"durability of {path}"
    danger = "what was answered with success may be gone after a power cut"
    there = _nearest(path)
    if mount is None:
        yield warning(about, "its mount cannot be found", danger, f"findmnt -T {there}")
        return
    kind = f"{mount.fstype} on {mount.point}"
    unsafe = sorted(UNSAFE & mount.options)
    if mount.fstype in FORGETFUL:
        yield error(about, f"{kind} is in memory", "everything that this node knows is gone after a reboot", f"mount a disk on {path}")
    elif mount.fstype in REMOTE or mount.fstype.startswith("fuse"):
        why = "the store needs a local file system: locks and syncs over a network keep less than they promise"
        yield error(about, f"{kind} is no local disk", why, f"mount a local disk on {path}")
    elif mount.fstype in FOREIGN:
        yield error(about, f"{kind} knows no permissions", "keys and the store would be open to everybody", f"mount ext4 or xfs on {path}")
    elif unsafe:
        yield error(about, f"{kind} is mounted with {', '.join(unsafe)}", danger, f"mount -o remount,barrier {mount.point}; vi /etc/fstab")
    elif mount.fstype == "overlay":
        yield warning(about, f"{kind}: the disk of a container?", "it may go with the container", f"mount a volume on {path}")
    elif "eatmydata" in os.environ.get("LD_PRELOAD", "") + _read("/etc/ld.so.preload"):
        yield error(about, "libeatmydata is loaded: no sync does anything", danger, "unset LD_PRELOAD; cat /etc/ld.so.preload")
    else:
        yield from _sync(about, kind, there)


def _sync(about: str, kind: str, path: Path) -> Iterator[Check]:
    """Measured: a sync that takes no time, on a disk, is none; one that takes long makes all jobs slow."""
    if not os.access(path, os.W_OK):
        yield ok(about, f"{kind} (not measured)")
        return
    name = path / f".atoll-doctor-{os.getpid()}"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.unlink(name)
        took = []
        for _ in range(5):
            os.pwrite(fd, b"x" * 4096, 0)
            begun = time.perf_counter()
            os.fsync(fd)
            took.append(time.perf_counter() - begun)
    finally:
        os.close(fd)
    median = statistics.median(took)
    words = f"{kind}; a sync takes {median * 1000:.2g} ms"
    if median > SLOW:
        yield warning(about, words, "each job waits for several of them", "iostat -x 1; use a faster disk for it")
    else:
        yield ok(about, words)


def secrets(config: Config) -> list[Check]:
    """Who may read and change what nobody else may."""
    seen, bad = 0, []
    for path in _secret(config):
        try:
            status = path.stat()
        except OSError:
            continue
        seen += 1
        mode = modes.S_IMODE(status.st_mode)
        if mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            bad.append((path, mode, status.st_uid))
    why = "whoever can read it can become this node, or open what is sealed"
    found = []
    for path, mode, uid in bad:
        found.append(error(f"secret {path}", f"mode {mode:04o}, owner uid {uid}", why, f"chown root: {path}; chmod 600 {path}"))
    if not bad and seen:
        found.append(ok("secrets", f"{seen} files, readable by root alone"))
    for path in (config.etc_dir, config.state_dir):
        if path.is_dir() and modes.S_IMODE(path.stat().st_mode) & 0o022:
            danger = "they could replace keys and configuration"
            found.append(error(f"directory {path}", "others may write into it", danger, f"chmod go-w {path}"))
    return found


def _secret(config: Config) -> Iterator[Path]:
    """Files that hold a key, or a copy of the store."""
    for place in (config.tls_dir, config.master_tls_dir, config.candidate_dir):
        if place.is_dir():
            yield from (p for p in place.rglob("*") if p.is_file() and ("key" in p.name or place == config.candidate_dir))
    yield config.etc_dir / "master.key"
    for place in (config.store_dir, config.replica_dir):
        if place.is_dir():
            yield from (p for p in place.iterdir() if p.is_file())
    if config.log_dir.is_dir():
        yield from config.log_dir.glob("audit.jsonl*")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
