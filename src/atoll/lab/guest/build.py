"""Build the guest's kernel and initramfs, from Debian packages only: the cloud kernel, busybox-static, and gcc for two small programs.

The kernel is taken out of its compressed image, so that an emulated processor need not unpack it: the guest is up in 2 to 4 seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atoll.lab.guest import cpio
from atoll.model.errors import DeadlineExceeded, HostError

#: In the order in which they are loaded: what a module needs comes before it.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("virtio_balloon", "virtio-rng", "failover", "net_failover", "virtio_net", "evdev", "button"),
)
_KERNEL = "linux-image-cloud-amd64"
_HINT = "apt-get update && apt-get install busybox-static gcc libc6-dev lz4 binutils"
_LZ4 = b"\x02\x21\x4c\x18"
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
        deb = _package(cache_dir / "debs", _KERNEL, follow=True)
        busybox = _busybox(cache_dir / "debs")
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
    (result / "vmlinux").write_bytes(_elf(found.pop("vmlinuz"), scratch))
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


def _package(debs: Path, name: str, *, follow: bool = False) -> Path:
    """The file of a package, downloaded unless some version is there. ``follow``: the package that ``name`` depends on."""
    debs.mkdir(exist_ok=True)
    pattern = "linux-image-*cloud*.deb" if follow else f"{name}_*.deb"
    for deb in sorted(debs.glob(pattern)):
        return deb
    if follow:
        wanted = [line.split()[1] for line in _run(["apt-cache", "depends", name]).splitlines() if line.strip().startswith("Depends:")]
        if not wanted:
            raise HostError(f"the package {name} is not known here", hint="apt-get update")
        name = wanted[0]
    with tempfile.TemporaryDirectory(prefix="download-", dir=debs) as place:
        _run(["apt-get", "download", "-q", name], cwd=place, deadline=300)
        for deb in Path(place).glob("*.deb"):
            return deb.rename(debs / deb.name)
    raise HostError(f"apt-get download {name} left no file", hint="apt-get update")


def _busybox(debs: Path) -> bytes:
    """Busybox without shared libraries: this machine's own, or the package's."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        with suppress(OSError):
            data = Path(path).read_bytes()
            if b"/ld-linux" not in data:  # a dynamic one names its loader
                return data
    with tarfile.open(fileobj=io.BytesIO(_files(_package(debs, "busybox-static")))) as tree:
        for member in tree:
            content = tree.extractfile(member) if member.name.endswith("bin/busybox") and member.isfile() else None
            if content:
                return content.read()
    raise HostError("the package busybox-static holds no busybox", hint=_HINT)


def _unpack(deb: Path, modules: set[str]) -> dict[str, bytes]:
    """``vmlinuz`` and the modules of a kernel package, by file name."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(_files(deb))) as tree:
        for member in tree:
            name = os.path.basename(member.name)
            kernel = name.startswith("vmlinuz-")
            content = tree.extractfile(member) if member.isfile() and (kernel or name in modules) else None
            if content:
                found["vmlinuz" if kernel else name] = content.read()
    if "vmlinuz" not in found:
        raise HostError(f"{deb.name} holds no kernel", hint=f"rm {deb}, then try again")
    return found


def _elf(vmlinuz: bytes, scratch: Path) -> bytes:
    """The kernel's ELF form out of its LZ4 bzImage; the bzImage itself where it is packed in another way (it boots too, slower)."""
    start = vmlinuz.find(_LZ4)
    if start < 0:
        return vmlinuz
    # What follows the payload in the file is no LZ4: the error about it is expected, so the result's head decides.
    done = subprocess.run([_program("lz4"), "-dc"], input=vmlinuz[start:], capture_output=True, timeout=60, check=False)
    if not done.stdout.startswith(b"\x7fELF"):
        return vmlinuz
    elf = scratch / "vmlinux"
    elf.write_bytes(done.stdout)
    _run(["strip", "--strip-debug", str(elf)])
    return elf.read_bytes()


def _compile(source: Path, program: Path) -> bytes:
    _run(["gcc", "-O2", "-static", "-s", "-o", str(program), str(source)])
    return program.read_bytes()


def _files(deb: Path) -> bytes:
    done = subprocess.run([_program("dpkg-deb"), "--fsys-tarfile", str(deb)], capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise HostError(f"{deb.name}: {done.stderr.decode(errors='replace').strip()}", hint=f"rm {deb}, then try again")
    return done.stdout


def _program(name: str) -> str:
    path = shutil.which(name)
    if not path:
        raise HostError(f"the program {name} is not installed", hint=_HINT)
    return path


def _run(argv: Sequence[str], *, cwd: str | None = None, deadline: float = 60) -> str:
    try:
        done = subprocess.run([_program(argv[0]), *argv[1:]], capture_output=True, text=True, cwd=cwd, timeout=deadline, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{' '.join(argv[:3])} took more than {deadline:.0f} s", hint="try again") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"{' '.join(argv[:3])}: {words[-1] if words else f'exit status {done.returncode}'}", hint=_HINT)
    return done.stdout
