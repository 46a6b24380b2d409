"""An image mapped by the kernel's own client.

Its client is not shared with other images: who shuts one out must not shut out the rest. The key goes by a file to ``rbd`` and by the
kernel's keyring to the kernel. A write that Ceph does not answer waits as long as it takes, one that it refuses is an error of the device.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from atoll.model.errors import HostError, NotFound, NotSupported, PoolUnavailable
from atoll.storage.rbd.mapping import devices, tool
from atoll.storage.rbd.mapping.way import Image

_BUS = Path("/sys/bus/rbd")
#: ``noudev``: the kernel itself tells of the device, whether a udev runs here or not. The kernel gives up before we do.
_OPTIONS = "noudev,noshare,mount_timeout=12"
_MAP, _UNMAP = 20.0, 10.0
_FSID = re.compile(r"^\s*fsid\s*=\s*([0-9a-fA-F-]{36})\s*$", re.MULTILINE)
#: How ``rbd`` ends: the number of the kernel's error.
_PERMISSION, _NO_ENTRY, _NO_DEVICE, _BUSY = 1, 2, 6, 16
#: Numbers of errors that mean that Ceph was not reached: ETIMEDOUT, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, EIO.
_SILENT = frozenset({110, 111, 113, 101, 5})


class Way:
    """See ``way.Way``."""

    name = "krbd"

    def available(self) -> str:
        """See ``way.Way``."""
        if shutil.which("rbd") is None:
            return "no program rbd (apt-get install ceph-common)"
        if not _BUS.is_dir() and (why := devices.load("rbd")):
            return f"no kernel module rbd ({why})"
        if not os.access(_BUS / "add_single_major", os.W_OK):
            return "the kernel's rbd is not this node's to use (/sys cannot be written)"
        return ""

    def map(self, image: Image) -> str:
        """See ``way.Way``."""
        if device := self.device(image):
            return devices.as_wanted(image, device)
        argv = [*_rbd(image), "map", image.spec, "-o", _OPTIONS, *(["--read-only"] if image.read_only else [])]
        try:
            tool.run(argv, _MAP)
        except HostError as error:
            raise _refusal(image, error) from None
        if not (device := self.device(image)):
            raise HostError(f"rbd says that it has mapped {image.spec}, but the kernel does not", hint="dmesg | tail")
        return devices.appeared(device)

    def unmap(self, image: Image) -> str:
        """See ``way.Way``."""
        if not (device := self.device(image)):
            return ""
        devices.refuse_users(image, device)
        look = _BUS / "devices" / device.removeprefix("/dev/rbd") / "refresh"
        lost = devices.written_out(image, device, ["sh", "-c", 'echo 1 >"$1"', "sh", str(look)])
        try:
            # Its user's key may be gone, and Ceph's configuration: the kernel needs neither.
            tool.run(["rbd", "--conf", "/dev/null", "--no-mon-config", "unmap", device, "-o", "noudev"], _UNMAP)
        except HostError as error:
            if error.details.get("exit_status") == _BUSY:
                raise devices.in_use(image, device) from None
            if self.device(image):
                raise
        return lost

    def device(self, image: Image) -> str:
        """See ``way.Way``."""
        wanted = {"pool": image.pool, "pool_ns": image.namespace, "name": image.name}
        fsid = _fsid(image)
        for entry in (_BUS / "devices").glob("[0-9]*"):
            known = _fsid_of(entry)
            if all(_read(entry / name) == value for name, value in wanted.items()) and (not fsid or not known or fsid == known):
                return f"/dev/rbd{entry.name}"
        return ""

    def resize(self, image: Image, size: int) -> int:
        """See ``way.Way``. The kernel hears of it by its watch; asked, it looks at once."""
        device = self.device(image)
        if device and devices.size(device) < size:
            try:
                (_BUS / "devices" / device.removeprefix("/dev/rbd") / "refresh").write_text("1")
            except OSError as error:
                raise HostError(f"{image.spec} is mapped, but does not grow: {error.strerror}", hint="ceph -s; dmesg | tail") from None
        return devices.grown(image, device, size)


def _rbd(image: Image) -> list[str]:
    return ["rbd", "--conf", image.conf, "--id", image.user, "--keyfile", image.key_file]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _fsid(image: Image) -> str:
    found = _FSID.search(_read(Path(image.conf)))
    return found[1].lower() if found else ""


def _fsid_of(entry: Path) -> str:
    return _read(entry / "cluster_fsid").lower()


def _refusal(image: Image, error: HostError) -> Exception:
    status, words = error.details.get("exit_status"), str(error.details.get("words", error.message))
    if status is None:
        return error
    if status == _NO_DEVICE or "feature" in words:
        return NotSupported(f"the kernel cannot map {image.spec}: {words}")
    if status == _NO_ENTRY:
        return NotFound(f"there is no image {image.spec}: {words}", hint="atoll cluster verify")
    if status == _PERMISSION or status in _SILENT or "couldn't connect" in words:
        return PoolUnavailable(f"Ceph does not let {image.spec} be mapped: {words}", hint="ceph -s; ceph auth ls")
    return HostError(f"{image.spec} cannot be mapped: {words}", hint="ceph -s; dmesg | tail")
