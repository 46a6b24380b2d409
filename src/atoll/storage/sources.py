"""Files that disks are made from: opened once, looked at through that descriptor, and given to QEMU's tools by it.

A header chooses a format, and a format's header can name other files of the host: a backing file, or an external data file. Those are
refused, and no tool of QEMU's is ever left to guess.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat as modes
import struct
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from atoll.model.errors import HostError, InvalidInput, NotFound
from atoll.model.units import MAX_SIZE, check_size

Format = Literal["raw", "qcow2"]
FORMATS: tuple[Format, ...] = ("raw", "qcow2")
_SECTOR = 512
#: The first bytes of formats that we do not read, and which nobody wants byte by byte on a disk.
_OTHERS = {b"KDMV": "VMDK", b"# Disk DescriptorFile": "VMDK", b"vhdxfile": "VHDX", b"conectix": "VPC", b"QED\0": "QED"}
_VDI = b"<<< "
_QCOW2 = b"QFI\xfb"
#: Incompatible features of qcow2 (docs/interop/qcow2.txt): what we know and can read, and what is said of the others.
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16


class Source(BaseModel):
    """An image to import: its format, and the size of the disk in it, in bytes (a multiple of 512)."""

    model_config = ConfigDict(frozen=True)
    format: Format
    size: int


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A regular file or block device, open for reading. Errors: NotFound, HostError, InvalidInput (neither of them)."""
    try:
        # Not blocking: somebody may have put a pipe there.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise NotFound(f"there is no image {path} on this node", hint=f"--image NODE:{path}, if it is on another node") from None
    except OSError as error:
        raise HostError(f"the image {path} cannot be opened: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not modes.S_ISREG(mode) and not modes.S_ISBLK(mode):
            raise InvalidInput(f"{path} is neither a regular file nor a block device")
        yield fd
    finally:
        os.close(fd)


def look(fd: int, name: str, chosen: str | None) -> Source:
    """What an open image is. ``chosen``: the format that the person named; else the header tells, of a short list of formats.

    Errors: InvalidInput (another format, or one that refers to other files), InvalidSize.
    """
    try:
        length = os.lseek(fd, 0, os.SEEK_END)
        head = os.pread(fd, _SECTOR, 0)
    except OSError as error:
        raise HostError(f"the image {name} cannot be read: {error.strerror}") from None
    kind = chosen or _detected(head, name)
    size = _qcow2_size(head, name) if kind == "qcow2" else -(-length // _SECTOR) * _SECTOR
    if size == 0:
        raise InvalidInput(f"the image {name} is empty")
    check_size(size)
    return Source(format="qcow2" if kind == "qcow2" else "raw", size=size)


def _detected(head: bytes, name: str) -> str:
    if head.startswith(_QCOW2):
        return "qcow2"
    known = next((kind for magic, kind in _OTHERS.items() if head.startswith(magic)), "VDI" if head.startswith(_VDI) else "")
    if known:
        raise InvalidInput(
            f"{name} looks like a {known} image; raw and qcow2 images can be imported",
            hint=f"qemu-img convert -O qcow2 {name} NEW; or --image-format raw, if these bytes really are the disk",
        )
    return "raw"


def _qcow2_size(head: bytes, name: str) -> int:
    """The virtual size, after looking for everything that would make QEMU open another file."""
    if not head.startswith(_QCOW2) or len(head) < 72:
        raise InvalidInput(f"{name} is not a qcow2 image", hint="--image-format raw, or leave it away")
    version, backing_offset, _, _, size, crypt = struct.unpack(">IQIIQI", head[4:36])
    if version not in (2, 3):
        raise InvalidInput(f"{name} is a qcow2 image of version {version}; 2 and 3 are known")
    features: int = struct.unpack(">Q", head[72:80])[0] if version == 3 and len(head) >= 80 else 0
    if backing_offset:
        raise _refers(name, "has a backing file")
    if features & _DATA_FILE:
        raise _refers(name, "keeps its data in another file")
    if crypt:
        raise InvalidInput(f"{name} is encrypted; its key would have to be given", hint="convert it to an image that is not encrypted")
    if features & _CORRUPT:
        raise InvalidInput(f"{name} is marked as corrupt", hint=f"qemu-img check {name}")
    if unknown := features & ~(_DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2):
        raise InvalidInput(f"{name} has features that this version does not know ({unknown:#x})", hint="qemu-img convert -O qcow2")
    if size > MAX_SIZE:
        raise InvalidInput(f"{name} says that its disk has {size} bytes")
    return int(-(-size // _SECTOR) * _SECTOR)


def _refers(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"{name} {what}: an image that names other files of the host is not imported",
        hint=f"where you trust it: qemu-img convert -O qcow2 {name} NEW, then import NEW",
    )


def as_qemu(fd: int, image_format: str) -> str:
    """The open image as a file name of QEMU's tools, which must inherit the descriptor: what was looked at is what they read."""
    file = {"driver": "host_device" if modes.S_ISBLK(os.fstat(fd).st_mode) else "file", "filename": f"/proc/self/fd/{fd}"}
    node = {"driver": image_format, "file": file}
    if image_format == "qcow2":
        # Whatever the header says by the time that QEMU reads it.
        node["backing"] = None  # type: ignore[assignment]
    return "json:" + json.dumps(node)
