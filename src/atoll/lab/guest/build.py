"""Build the guest's kernel and initramfs, from Debian packages only: the cloud kernel, busybox-static, and gcc for two small programs.

The kernel is taken out of its compressed image, so that an emulated processor need not unpack it: the guest is up in 2 to 4 seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from atoll.lab.guest import cpio, debs
from atoll.model.errors import HostError

#: In the order in which they are loaded: what a module needs comes before it.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("virtio_balloon", "virtio-rng", "failover", "net_failover", "virtio_net", "evdev", "button"),
)
_HERE = Path(__file__).parent
#: Grows with each change of this recipe that its inputs do not show.
_RECIPE = 1


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What a guest boots from, readable by everybody."""

    kernel: Path
    initrd: Path


def append(*, ctr: str = "", ctrdelay: int | None = None, more: str = "") -> str:
    """The guest's kernel command line. ``ctr``: the disk for the writer (``vda``); ``ctrdelay``: its pause, in microseconds."""
    words = ["console=ttyS0", "quiet", "panic=1", "reboot=t", "nokaslr", "mitigations=off"]
    if ctr:
        words.append(f"ctr={ctr}")
    if ctrdelay is not None:
        words.append(f"ctrdelay={ctrdelay}")
    return " ".join([*words, more]).strip()


def build(cache_dir: Path) -> GuestImage:
    """The guest's image, built at most once: packages are downloaded to ``cache_dir/debs`` (once), results are kept by content.

    Takes about five seconds the first time, plus the download of 27 MB. Safe to call from several processes at once.
    Errors: HostError (a program or package is missing, with the command that installs it), DeadlineExceeded.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deb = debs.package(cache_dir / "debs", debs.KERNEL, follow=True)
        busybox = debs.busybox(cache_dir / "debs")
        image_dir = cache_dir / _key(deb, busybox)
        image = GuestImage(image_dir / "vmlinux", image_dir / "initramfs.cpio")
        if not image_dir.exists():
            # Built aside and renamed: a directory with that name is always complete.
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache_dir) as scratch:
                _build(Path(scratch), deb, busybox)
                result = Path(scratch) / "result"
                result.chmod(0o755)
                os.rename(result, image_dir)
        return image


def _key(deb: Path, busybox: bytes) -> str:
    digest = hashlib.sha256(f"{_RECIPE} {deb.name} {MODULES}".encode())
    for part in (busybox, *((_HERE / name).read_bytes() for name in ("init", "writer.c", "watch.c"))):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _build(scratch: Path, deb: Path, busybox: bytes) -> None:
    result = scratch / "result"
    result.mkdir()
    found = _unpack(deb, {f"{module}.ko" for module in MODULES})
    (result / "vmlinux").write_bytes(debs.elf_kernel(found.pop("vmlinuz"), scratch))
    members = [cpio.directory(name) for name in ("bin", "dev", "proc", "sys", "tmp", "modules")]
    # The first process gets its stdin, stdout and stderr from this node; the rest of /dev is made by the kernel.
    members.append(cpio.character_device("dev/console", 5, 1))
    members.append(cpio.file("init", (_HERE / "init").read_bytes(), 0o755))
    members.append(cpio.file("bin/busybox", busybox, 0o755))
    for source, program in (("writer.c", "writer"), ("watch.c", "watch-guest")):
        members.append(cpio.file(f"bin/{program}", _compile(_HERE / source, scratch / program), 0o755))
    present = [f"{module}.ko" for module in MODULES if f"{module}.ko" in found]
    members += [cpio.file(f"modules/{name}", found[name]) for name in present]
    members.append(cpio.file("modules/order", "".join(f"{name}\n" for name in present).encode()))
    (result / "initramfs.cpio").write_bytes(cpio.archive(members))
    for file in result.iterdir():
        file.chmod(0o644)


def _unpack(deb: Path, modules: set[str]) -> dict[str, bytes]:
    """``vmlinuz`` and the modules of a kernel package, by file name."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(debs.files(deb))) as tree:
        for member in tree:
            name = os.path.basename(member.name)
            kernel = name.startswith("vmlinuz-")
            content = tree.extractfile(member) if member.isfile() and (kernel or name in modules) else None
            if content:
                found["vmlinuz" if kernel else name] = content.read()
    if "vmlinuz" not in found:
        raise HostError(f"{deb.name} holds no kernel", hint=f"rm {deb}, then try again")
    return found


def _compile(source: Path, program: Path) -> bytes:
    debs.run(["gcc", "-O2", "-static", "-s", "-o", str(program), str(source)])
    return program.read_bytes()
