"""Loop devices: the disks of lab nodes. They are found again by the file behind them, never by a remembered number."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from atoll.lab.host import run, wait_until
from atoll.model.errors import HostError
from atoll.storage.files import loops as mappings

_LOOP_CLR_FD = 0x4C01


def attached() -> dict[str, str]:
    """device -> backing file, of every loop device in use. A removed file keeps its old path."""
    found = {}
    for entry in Path("/sys/block").glob("loop*"):
        try:
            backing = (entry / "loop/backing_file").read_text().rstrip("\n")
        except OSError:
            continue
        found[f"/dev/{entry.name}"] = backing.removesuffix(" (deleted)")
    return found


def below(directory: Path) -> list[str]:
    """The devices whose file is, or was, below the directory."""
    prefix = f"{directory}/"
    return sorted(device for device, backing in attached().items() if backing.startswith(prefix))


def make_image(path: Path, size: int) -> None:
    """A sparse file of ``size`` bytes; an existing one is left as it is."""
    if not path.exists():
        with path.open("xb") as file:
            file.truncate(size)


def make_xfs(path: Path, size: int, keep: Sequence[int] = ()) -> None:
    """A sparse image of ``size`` bytes with an empty XFS on it. XFS asks for 300 MiB at least."""
    make_image(path, size)
    run(["mkfs.xfs", "-q", "-f", "-K", str(path)], keep=keep)


def attach(path: Path, keep: Sequence[int] = ()) -> str:
    """The loop device of a file; the one it has already, if it has one. Callers hold the lab's lock: two devices on one file corrupt it."""
    for device, backing in attached().items():
        if backing == str(path):
            return device
    return run(["losetup", "--find", "--show", str(path)], keep=keep).strip()


def machine_id(lab: str, node: str) -> str:
    """The machine id of a node of a lab."""
    return hashlib.sha256(f"{lab}/{node}".encode()).hexdigest()[:32]


def unmap(lab: str, directory: Path, *nodes: str) -> None:
    """End what agents of these nodes (which have no power) had mapped: a machine of its own would have lost it with its kernel.
    ``directory``: of the node, or of the lab."""
    for pattern in ("run/*/*.loop", "nodes/*/run/*/*.loop"):
        for path in directory.glob(pattern):
            mappings.drop(path)
    machines = {machine_id(lab, node) for node in nodes}
    for machine, volume in mappings.everybodys():
        if machine in machines:
            # What was not written out yet is lost, as with a kernel; and whoever took the writes may be dead.
            mappings.detach(volume, machine=machine, flush=False)


def idle(device: str) -> bool:
    """Whether nothing has it mounted or open exclusively."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return True
        raise HostError(f"{device}: {error.strerror}") from None
    return True


def detach(path: Path, deadline: float = 20.0) -> None:
    """Take the loop device off a file, or off every file below a directory; waits until it is free. Fine when there is none.

    Raises DeadlineExceeded when something still has it mounted.
    """
    for device, backing in attached().items():
        if backing != str(path) and not backing.startswith(f"{path}/"):
            continue
        # Unmounting goes on for a moment after the last process of a mount namespace has ended; until then detaching only marks the device.
        wait_until(partial(idle, device), deadline, f"{device} ({backing}) is unmounted")
        _clear(device)
        wait_until(partial(_detached, device, backing), deadline, f"{device} is free")


def _detached(device: str, backing: str) -> bool:
    return attached().get(device) != backing


def _clear(device: str) -> None:
    try:
        handle = os.open(device, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.ioctl(handle, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise HostError(f"{device} cannot be detached: {error.strerror}") from None
    finally:
        os.close(handle)
