"""An image mapped by rbd-nbd, a process that uses librbd, and the kernel's nbd. It knows features of images that the kernel does not.

The process keeps nothing back (no cache of librbd's): another node may have written since. A write that Ceph does not answer waits.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from atoll.model.errors import HostError, NotFound, PoolUnavailable
from atoll.storage.rbd.mapping import devices, tool
from atoll.storage.rbd.mapping.way import Image

_PROGRAM = "rbd-nbd"
_MAP, _UNMAP, _END, _KILL, _ASK = 20.0, 10.0, 8.0, 5.0, 15.0

_NOT_LET_IN = ("not permitted", "ermission denied", "couldn't connect", "failed to fetch mon config", "timed out")


class Way:
    """See ``way.Way``."""

    name = "rbd-nbd"

    def available(self) -> str:
        """See ``way.Way``."""
        if shutil.which(_PROGRAM) is None:
            return f"no program {_PROGRAM} (apt-get install rbd-nbd)"
        if not os.path.exists("/sys/block/nbd0") and (why := devices.load("nbd")):
            return f"no kernel module nbd ({why})"
        if not os.path.exists("/dev/nbd0"):
            return "the kernel's nbd is not this node's to use (no /dev/nbd0)"
        return ""

    def map(self, image: Image) -> str:
        """See ``way.Way``."""
        if device := self.device(image):
            return devices.as_wanted(image, device)
        _end(image)
        argv = [_PROGRAM, "--conf", image.conf, "--id", image.user, "--keyfile", image.key_file, "--rbd_cache=false"]
        try:
            # It leaves a daemon, which is not to keep the locks.
            told = tool.run([*argv, *(["--read-only"] if image.read_only else []), "map", image.spec], _MAP, lends_locks=False)
        except HostError as error:
            _end(image)
            raise _refusal(image, _in_words(image, error)) from None
        except BaseException:
            _end(image)
            raise
        device = told.strip().splitlines()[-1] if told.strip() else ""
        devices.until(lambda: self.device(image), _END, f"the kernel shows {device or 'the device'} of {image.spec}")
        return self.device(image)

    def unmap(self, image: Image) -> str:
        """See ``way.Way``. The kernel would end it while it is in use, so we look."""
        lost = ""
        if device := self.device(image):
            devices.refuse_users(image, device, but=_server(device))
            lost = devices.written_out(image, device, [*_rbd(image), "info", image.spec])
            with suppress(HostError):
                tool.run([_PROGRAM, "--conf", "/dev/null", "--no-mon-config", "unmap", device], _UNMAP)
        # When the kernel is done with it, it ends by itself.
        _end(image, _END)
        if self.device(image):
            raise HostError(f"{device}, which is {image.spec}, stays mapped", hint="dmesg | tail")
        return lost

    def device(self, image: Image) -> str:
        """See ``way.Way``."""
        served = set(_processes(image))
        for entry in Path("/sys/block").glob("nbd*"):
            if served and _server(f"/dev/{entry.name}") in served:
                return f"/dev/{entry.name}"
        return ""

    def resize(self, image: Image, size: int) -> int:
        """See ``way.Way``. The process hears of it by its watch, and tells the kernel."""
        return devices.grown(image, self.device(image), size)


def _server(device: str) -> int:
    """The process that serves it; 0 = none."""
    return int(devices.attribute(device, "pid") or 0)


def _processes(image: Image) -> list[int]:
    """Those that serve this image, or are about to."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if os.path.basename(argv[0]) == _PROGRAM and "map" in argv and {image.spec, image.conf} <= set(argv):
                found.append(int(entry))
    return found


def _end(image: Image, patience: float = 0.0) -> None:
    """No process of this image is left: it ends by itself within ``patience`` seconds, or is ended. Errors: HostError."""
    for number, seconds in ((0, patience), (signal.SIGTERM, _END), (signal.SIGKILL, _KILL)):
        for pid in _processes(image):
            with suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if pid in _processes(image):
                        signal.pidfd_send_signal(handle, number)
                        select.select([handle], [], [], seconds)
                finally:
                    os.close(handle)
    if left := _processes(image):
        raise HostError(f"{_PROGRAM} (pid {left[0]}), which serves {image.spec}, does not end", hint=f"cat /proc/{left[0]}/stack; ceph -s")


def _in_words(image: Image, error: HostError) -> HostError:
    """What went wrong, which rbd-nbd itself does not say once it is a daemon: ``rbd`` is asked about the same image."""
    if error.details.get("words", "-"):
        return error
    try:
        tool.run([*_rbd(image), "info", image.spec], _ASK)
    except HostError as reason:
        return reason
    return error


def _rbd(image: Image) -> list[str]:
    return ["rbd", "--conf", image.conf, "--id", image.user, "--keyfile", image.key_file]


def _refusal(image: Image, error: HostError) -> Exception:
    if "exit_status" not in error.details:
        return error
    words = str(error.details.get("words") or error.message)
    if "No such file or directory" in words:
        return NotFound(f"there is no image {image.spec}: {words}", hint="atoll cluster verify")
    if any(known in words for known in _NOT_LET_IN):
        return PoolUnavailable(f"Ceph does not let {image.spec} be mapped: {words}", hint="ceph -s; ceph auth ls")
    return HostError(f"{image.spec} cannot be mapped: {words}", hint="ceph -s; dmesg | tail")
