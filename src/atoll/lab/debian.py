"""A disk with Debian on it that boots by itself: an MBR, a partition, ext4, SYSLINUX' extlinux, and packages of the release.

Two kinds. The small one has an init of its own that says on the serial console what it finds, a seed for cloud-init among it, and then
gives a shell: it is up in seconds even on an emulated processor. The other one is a Debian as people run it, with systemd, cloud-init and
an SSH server; it takes a minute of processor time to boot where there is no KVM.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from atoll.model.errors import DeadlineExceeded, HostError

#: Where finished disks are kept.
CACHE = Path("/var/cache/atoll")
RELEASE = "bookworm"
_SMALL = ("linux-image-cloud-amd64", "initramfs-tools", "kmod", "e2fsprogs")
_CLOUD = (*_SMALL, "systemd-sysv", "udev", "dbus", "cloud-init", "cloud-guest-utils", "openssh-server", "ifupdown", "isc-dhcp-client")
#: Grows with each change of this recipe.
_RECIPE = 1
_MIB = 1 << 20
_SMALL_SIZE, _CLOUD_SIZE = 768 * _MIB, 2048 * _MIB
_HINT = "apt-get install mmdebstrap extlinux e2fsprogs"
_MBR = Path("/usr/lib/EXTLINUX/mbr.bin")
#: Left out of the disk: nobody reads it there, and every byte is copied at each import.
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")
_INITRAMFS = {"conf.d/atoll": "MODULES=list\nCOMPRESS=lz4\n", "modules": "virtio_pci\nvirtio_blk\next4\n"}
_BOOT = """SERIAL 0 115200
DEFAULT linux
PROMPT 0
TIMEOUT 1
LABEL linux
  KERNEL /boot/{kernel}
  INITRD /boot/{initrd}
  APPEND root=/dev/vda1 rw console=ttyS0 quiet nokaslr mitigations=off panic=1 {more}
"""
#: The init of the small kind. It obeys the seed as little as possible: it shows it.
_INIT = r"""#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/ttyS0 >/dev/ttyS0 2>&1
. /etc/os-release
echo "DISK-BOOT $ID $VERSION_ID, kernel $(uname -r), root $(findmnt -no SOURCE,FSTYPE / | tr -s ' ')"
seed=$(blkid -L cidata)
if [ -n "$seed" ]; then
    modprobe isofs
    mount -o ro "$seed" /mnt && for file in meta-data user-data network-config; do
        [ -f "/mnt/$file" ] && sed "s/^/SEED $file: /" "/mnt/$file"
    done
    name=$(sed -n 's/^local-hostname: *//p' /mnt/meta-data | tr -d '"')
    [ -n "$name" ] && echo "$name" >/proc/sys/kernel/hostname
    umount /mnt
fi
echo "DISK-READY $(hostname)"
while :; do setsid -c sh -i; done
"""


def build(*, cloud_init: bool = False, cache: Path = CACHE) -> Path:
    """The disk as a raw, sparse file in the cache; made once. It belongs to the cache: copy it, never write it.

    Needs root, and Debian's archive. Errors: HostError (a program is missing, or failed), DeadlineExceeded.
    """
    if os.geteuid() != 0:
        raise HostError("a disk with Debian is made by root: it needs chroot and a loop device", hint="repeat it with sudo")
    packages = _CLOUD if cloud_init else _SMALL
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{_RECIPE} {RELEASE} {packages} {_INIT} {_BOOT} {_INITRAMFS}".encode()).hexdigest()[:16]
    disk = cache / f"debian-{'cloud' if cloud_init else 'small'}-{key}.raw"
    with open(cache / ".debian-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not disk.exists():
            with tempfile.TemporaryDirectory(prefix="debian-", dir=cache) as scratch:
                made = _build(Path(scratch), packages, cloud_init)
                made.rename(disk)
    return disk


def _build(scratch: Path, packages: Sequence[str], cloud_init: bool) -> Path:
    root, disk = scratch / "root", scratch / "disk"
    quick = ["--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Retries 3"]
    _run(["mmdebstrap", "--quiet", "--variant=minbase", *quick, f"--include={','.join(packages)}", RELEASE, str(root)], deadline=900)
    for name, text in _INITRAMFS.items():
        (root / "etc/initramfs-tools" / name).write_text(text)
    with _mounted(["-t", "proc", "proc"], root / "proc"):
        _run(["chroot", str(root), "update-initramfs", "-u"], deadline=300)
    (root / "etc/fstab").write_text("/dev/vda1 / ext4 defaults 0 1\n")
    (root / "etc/hostname").write_text("debian\n")
    if cloud_init:
        (root / "etc/cloud/cloud.cfg.d/90_seed.cfg").write_text("datasource_list: [ NoCloud, None ]\n")
        # Each instance gets keys and an id of its own.
        (root / "etc/machine-id").write_text("")
        for host_key in (root / "etc/ssh").glob("ssh_host_*"):
            host_key.unlink()
    else:
        init = root / "sbin/atoll-init"
        init.write_text(_INIT)
        init.chmod(0o755)
    boot = root / "boot/extlinux"
    boot.mkdir()
    kernel = next((root / "boot").glob("vmlinuz-*")).name
    more = "" if cloud_init else "init=/sbin/atoll-init"
    (boot / "extlinux.conf").write_text(_BOOT.format(kernel=kernel, initrd=kernel.replace("vmlinuz", "initrd.img"), more=more))
    for left_out in _LEFT_OUT:
        shutil.rmtree(root / left_out, ignore_errors=True)
    _lay_out(disk, root, _CLOUD_SIZE if cloud_init else _SMALL_SIZE)
    with _mounted(["-o", f"loop,offset={_MIB}", str(disk)], scratch / "mnt"):
        _run(["extlinux", "--install", str(scratch / "mnt/boot/extlinux")])
    return disk


def _lay_out(disk: Path, root: Path, size: int) -> None:
    """One partition from 1 MiB to the end, with the tree on it, and the code that finds the active partition."""
    with disk.open("wb") as file:
        file.truncate(size)
    # extlinux knows neither of the two features.
    argv = ["mkfs.ext4", "-q", "-L", "root", "-O", "^64bit,^metadata_csum", "-E", f"offset={_MIB}", "-d", str(root)]
    _run([*argv, str(disk), f"{size // 1024 - 1024}k"], deadline=300)
    try:
        code = _MBR.read_bytes()[:440]
    except OSError:
        raise HostError(f"there is no {_MBR}", hint=_HINT) from None
    entry = struct.pack("<BBBBBBBBII", 0x80, 0, 0, 0, 0x83, 0, 0, 0, _MIB // 512, (size - _MIB) // 512)
    with disk.open("r+b") as file:
        file.write(code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa")


@contextlib.contextmanager
def _mounted(what: Sequence[str], where: Path) -> Iterator[None]:
    where.mkdir(exist_ok=True)
    _run(["mount", *what, str(where)])
    try:
        yield
    finally:
        _run(["umount", str(where)])


def _run(argv: Sequence[str], *, deadline: float = 120) -> None:
    program = shutil.which(argv[0])
    if not program:
        raise HostError(f"the program {argv[0]} is not installed", hint=_HINT)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, timeout=deadline, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{argv[0]} took more than {deadline:.0f} s", hint="try again") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"{argv[0]}: {' / '.join(words[-3:]) or f'exit status {done.returncode}'}", hint=_HINT)
