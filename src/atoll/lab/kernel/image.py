"""What a kernel node boots: Debian's stock kernel, all its modules, and an initramfs that mounts this machine's root.

No disk image: programs come from the machine that carries the lab. Only packages are used, and the kernel is not installed, so that a
machine's own boot loader never hears of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from atoll.lab.guest import cpio, debs
from atoll.model.errors import HostError

#: Where images are kept, as those of the demo's guest.
CACHE = Path("/var/cache/atoll")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
UDEVD = "/lib/systemd/systemd-udevd"
#: What it takes to reach the root; every other module is loaded from there when it is wanted.
_EARLY = ("virtio_pci", "virtio_console", "virtio_net", "virtio_blk", "virtiofs", "overlay")
#: Program -> the package of Debian's that brings it.
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    VIRTIOFSD: "qemu-system-common",
    "modprobe": "kmod",
    "depmod": "kmod",
    UDEVD: "udev",
    "lz4": "lz4",
    "strip": "binutils",
}
_HERE = Path(__file__).parent
#: Grows with each change of this recipe that its inputs do not show.
_RECIPE = 1


@dataclass(frozen=True, slots=True)
class KernelImage:
    """Files and a directory (``lib/modules`` of the package) on this machine."""

    kernel: Path
    initrd: Path
    modules: Path


def require() -> None:
    """Raises HostError with the packages that are missing for kernel nodes."""
    gone = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    if gone:
        raise HostError(f"kernel nodes need packages that are not installed: {', '.join(gone)}", hint=f"apt-get install {' '.join(gone)}")


def build(cache_dir: Path = CACHE) -> KernelImage:
    """The image, made at most once: takes some seconds the first time, and the download of 27 MB. Errors: HostError, DeadlineExceeded."""
    require()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deb = debs.package(cache_dir / "debs", debs.KERNEL, follow=True)
        busybox = debs.busybox(cache_dir / "debs")
        init = (_HERE / "init").read_bytes()
        key = hashlib.sha256(b"%d %s %s" % (_RECIPE, deb.name.encode(), str(_EARLY).encode()) + busybox + init).hexdigest()[:16]
        place = cache_dir / f"kernel-{key}"
        if not place.exists():
            # Made aside and renamed: a directory with that name is always complete.
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache_dir) as scratch:
                result = Path(scratch) / "result"
                _build(Path(scratch), result, deb, busybox, init)
                result.chmod(0o755)
                os.rename(result, place)
        return KernelImage(place / "vmlinux", place / "initramfs.cpio", place / "lib/modules")


def _build(scratch: Path, result: Path, deb: Path, busybox: bytes, init: bytes) -> None:
    result.mkdir()
    debs.run(["dpkg", "-x", str(deb), str(scratch / "deb")])
    os.rename(scratch / "deb/lib", result / "lib")
    versions = os.listdir(result / "lib/modules")
    kernels = list((scratch / "deb/boot").glob("vmlinuz-*"))
    if len(versions) != 1 or len(kernels) != 1:
        raise HostError(f"{deb.name} does not hold one kernel and its modules", hint=f"rm {deb}, then try again")
    (result / "vmlinux").write_bytes(debs.elf_kernel(kernels[0].read_bytes(), scratch))
    debs.run(["depmod", "-b", str(result), versions[0]])
    modules: dict[str, bytes] = {}
    for wanted in _EARLY:
        shown = debs.run(["modprobe", "-d", str(result), "-S", versions[0], "--show-depends", wanted])
        for path in (Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod ")):
            modules.setdefault(path.name, path.read_bytes())
    members = [cpio.directory(name) for name in ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "new")]
    members.append(cpio.character_device("dev/console", 5, 1))
    members.append(cpio.file("init", init, 0o755))
    members.append(cpio.file("bin/busybox", busybox, 0o755))
    members += [cpio.file(f"modules/{name}", data) for name, data in modules.items()]
    members.append(cpio.file("modules/order", "".join(f"{name}\n" for name in modules).encode()))
    (result / "initramfs.cpio").write_bytes(cpio.archive(members))
    for file in (result / "vmlinux", result / "initramfs.cpio"):
        file.chmod(0o644)
