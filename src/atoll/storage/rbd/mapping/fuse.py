"""An image mapped without the kernel's knowing Ceph: QEMU's storage daemon shows it as a file (FUSE), and a loop device is put on that.

It works wherever there are FUSE and loop devices, at about half the speed of librbd for small writes. The daemon outlives the agent, like a
guest; it is known by the pid file in its own command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import stat as modes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.model.errors import Conflict, DeadlineExceeded, HostError, NotFound
from atoll.storage.files import loops
from atoll.storage.rbd.mapping import records, tool
from atoll.storage.rbd.mapping.way import Image

_DAEMON = "qemu-storage-daemon"
#: Seconds for it to open the image; to write out what is buffered; and to end, when it is asked to and when it is killed.
_START, _FLUSH, _END, _KILL = 20.0, 15.0, 10.0, 5.0
_DETACH = 2  # MNT_DETACH of umount2(2)


class Way:
    """See ``way.Way``."""

    name = "fuse+loop"

    def available(self) -> str:
        """See ``way.Way``."""
        if shutil.which(_DAEMON) is None:
            return f"no program {_DAEMON} (apt-get install qemu-system-common)"
        for path, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
            if not os.path.exists(path):
                return f"no {path} (modprobe {module})"
        return ""

    def map(self, image: Image) -> str:
        """See ``way.Way``."""
        file = _file(image)
        if not (_running(image) and _shown(file)):
            self.unmap(image)
            _start(image)
        flags = (os.O_RDONLY if image.read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC
        try:
            fd = os.open(file, flags)
        except OSError as error:
            raise HostError(f"{file}, which should show {image.spec}, cannot be opened: {error.strerror}") from None
        try:
            # Past the page cache: another node must see what a guest has written when it takes over.
            device = loops.attach(fd, image.volume, read_only=image.read_only, direct=True)
            # Once the daemon has died, the kernel does not tell the device's name any more.
            loops.note(device, _place(image, "loop"))
            return device
        except Conflict:
            raise Conflict(f"volume {image.volume} is mapped here otherwise", hint="losetup --list") from None
        finally:
            os.close(fd)

    def unmap(self, image: Image) -> str:
        """See ``way.Way``."""
        lost = ""
        if device := self.device(image):
            try:
                tool.run(["sync", device], _FLUSH)
            except DeadlineExceeded:
                raise DeadlineExceeded(
                    f"what was written to {device} does not get into Ceph: {image.spec} stays mapped", hint="ceph -s; then try again"
                ) from None
            except HostError as error:
                lost = f"writing out {device}: {error.details.get('words', error.message)}"
            loops.detach(image.volume, flush=False)
            loops.drop(_place(image, "loop"))
        _clear_away(image)
        return lost

    def device(self, image: Image) -> str:
        """See ``way.Way``."""
        number = loops.mapped().get(image.volume)
        if number is None:
            number = loops.noted(_place(image, "loop"))
        return "" if number is None else f"/dev/loop{number}"

    def resize(self, image: Image, size: int) -> int:
        """See ``way.Way``. The daemon does not look by itself; told a size, it sets the image's to that, which is so already."""
        try:
            if os.stat(_file(image)).st_size < size:
                os.truncate(_file(image), size)
        except OSError as error:
            raise HostError(f"{image.spec} is mapped, but does not grow: {error.strerror}") from None
        return loops.resize(image.volume)


def _place(image: Image, what: str) -> Path:
    return records.directory() / f"{image.volume}.{what}"


def _file(image: Image) -> Path:
    """Where the image is shown as a file."""
    return _place(image, "image")


def _node(image: Image) -> dict[str, Any]:
    node: dict[str, Any] = {"driver": "rbd", "node-name": "disk", "pool": image.pool, "image": image.name, "conf": image.conf}
    node |= {"user": image.user, "key-secret": "key", "discard": "unmap", "cache": {"direct": True, "no-flush": False}}
    return node | ({"namespace": image.namespace} if image.namespace else {}) | {"read-only": image.read_only}


def _start(image: Image) -> None:
    """Let the daemon show the image; it answers when this returns. Errors: NotFound, HostError, DeadlineExceeded."""
    file = _file(image)
    os.close(os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    export = {"type": "fuse", "id": "export", "node-name": "disk", "mountpoint": str(file), "writable": not image.read_only}
    argv = [_DAEMON, "--object", f"secret,id=key,format=base64,file={image.key_file.replace(',', ',,')}"]
    argv += ["--blockdev", json.dumps(_node(image)), "--export", json.dumps({**export, "growable": False, "allow-other": "off"})]
    argv += ["--pidfile", str(_place(image, "pid")), "--daemonize"]
    try:
        tool.run(argv, _START, lends_locks=False)
    except HostError as error:
        words = str(error.details.get("words", error.message))
        _clear_away(image)
        if "No such file or directory" in words:
            raise NotFound(f"there is no image {image.spec}: {words}", hint="atoll cluster verify") from None
        raise HostError(f"{image.spec} cannot be shown as a file: {words}", hint="ceph -s") from None
    except DeadlineExceeded:
        _clear_away(image)
        raise


def _processes(image: Image) -> list[int]:
    """The daemons of this image on this node; one, as a rule, or one and the parent that waits until it answers."""
    wanted, own, found = str(_place(image, "pid")).encode(), os.stat("/proc/self/ns/pid").st_ino, []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            # Nodes of a lab are seen from outside, and have theirs under the same paths.
            if os.path.basename(argv[0]) == _DAEMON.encode() and wanted in argv and os.stat(f"/proc/{entry}/ns/pid").st_ino == own:
                found.append(int(entry))
        except OSError:
            continue
    return found


def _running(image: Image) -> bool:
    return bool(_processes(image))


def _shown(file: Path) -> bool:
    """Whether the file is the daemon's: it answers, and lies on another file system than its directory."""
    try:
        return modes.S_ISREG((found := os.stat(file)).st_mode) and found.st_dev != os.stat(file.parent).st_dev
    except OSError:
        return False


def _clear_away(image: Image) -> None:
    """End the daemon, and remove all that is of it; none is success. Errors: HostError (it does not end)."""
    for number, seconds in ((signal.SIGTERM, _END), (signal.SIGKILL, _KILL)):
        for pid in _processes(image):
            with _handle(pid) as handle:
                if handle is not None and pid in _processes(image):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, number)
                    select.select([handle], [], [], seconds)
    if left := _processes(image):
        raise HostError(f"{_DAEMON} (pid {left[0]}), which shows {image.spec}, does not end", hint=f"cat /proc/{left[0]}/stack; ceph -s")
    file = _file(image)
    # One that was killed leaves its mount.
    libc = ctypes.CDLL(None, use_errno=True)
    while _mounted(file):
        if libc.umount2(str(file).encode(), _DETACH):
            raise HostError(f"{file} cannot be unmounted: {os.strerror(ctypes.get_errno())}", hint=f"umount -l {file}")
    for path in (file, _place(image, "pid"), _place(image, "loop")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int | None]:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _mounted(file: Path) -> bool:
    """Asked of the kernel's table: a file whose daemon has died cannot be looked at."""
    wanted = str(file).encode()
    return any(line.split(b" ")[1] == wanted for line in Path("/proc/self/mounts").read_bytes().splitlines())
