"""Taking what a guest or a kernel node boots from out of Debian's packages."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from atoll.model.errors import DeadlineExceeded, HostError

KERNEL = "linux-image-cloud-amd64"
HINT = "apt-get update && apt-get install busybox-static gcc libc6-dev lz4 binutils"
_LZ4 = b"\x02\x21\x4c\x18"


def package(debs: Path, name: str, *, follow: bool = False) -> Path:
    """The file of a package, downloaded unless some version is there. ``follow``: the package that ``name`` depends on."""
    debs.mkdir(exist_ok=True)
    pattern = "linux-image-*cloud*.deb" if follow else f"{name}_*.deb"
    for deb in sorted(debs.glob(pattern)):
        return deb
    if follow:
        wanted = [line.split()[1] for line in run(["apt-cache", "depends", name]).splitlines() if line.strip().startswith("Depends:")]
        if not wanted:
            raise HostError(f"the package {name} is not known here", hint="apt-get update")
        name = wanted[0]
    with tempfile.TemporaryDirectory(prefix="download-", dir=debs) as place:
        run(["apt-get", "download", "-q", name], cwd=place, deadline=300)
        for deb in Path(place).glob("*.deb"):
            return deb.rename(debs / deb.name)
    raise HostError(f"apt-get download {name} left no file", hint="apt-get update")


def busybox(debs: Path) -> bytes:
    """Busybox without shared libraries: this machine's own, or the package's."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        with suppress(OSError):
            data = Path(path).read_bytes()
            if b"/ld-linux" not in data:  # a dynamic one names its loader
                return data
    with tarfile.open(fileobj=io.BytesIO(files(package(debs, "busybox-static")))) as tree:
        for member in tree:
            content = tree.extractfile(member) if member.name.endswith("bin/busybox") and member.isfile() else None
            if content:
                return content.read()
    raise HostError("the package busybox-static holds no busybox", hint=HINT)


def elf_kernel(vmlinuz: bytes, scratch: Path) -> bytes:
    """The kernel's ELF form out of its LZ4 bzImage; the bzImage itself where it is packed in another way (it boots too, slower)."""
    start = vmlinuz.find(_LZ4)
    if start < 0:
        return vmlinuz
    # What follows the payload in the file is no LZ4: the error about it is expected, so the result's head decides.
    done = subprocess.run([program("lz4"), "-dc"], input=vmlinuz[start:], capture_output=True, timeout=60, check=False)
    if not done.stdout.startswith(b"\x7fELF"):
        return vmlinuz
    elf = scratch / "vmlinux"
    elf.write_bytes(done.stdout)
    run(["strip", "--strip-debug", str(elf)])
    return elf.read_bytes()


def files(deb: Path) -> bytes:
    done = subprocess.run([program("dpkg-deb"), "--fsys-tarfile", str(deb)], capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise HostError(f"{deb.name}: {done.stderr.decode(errors='replace').strip()}", hint=f"rm {deb}, then try again")
    return done.stdout


def program(name: str) -> str:
    path = shutil.which(name)
    if not path:
        raise HostError(f"the program {name} is not installed", hint=HINT)
    return path


def run(argv: Sequence[str], *, cwd: str | None = None, deadline: float = 60) -> str:
    try:
        done = subprocess.run([program(argv[0]), *argv[1:]], capture_output=True, text=True, cwd=cwd, timeout=deadline, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{' '.join(argv[:3])} took more than {deadline:.0f} s", hint="try again") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"{' '.join(argv[:3])}: {words[-1] if words else f'exit status {done.returncode}'}", hint=HINT)
    return done.stdout
