"""An exported instance as one file: a tar of what the instance is, its disks in compressed pieces, and the checksums of all that.

``atoll-export.json`` comes first: the instance, and its disks' sizes. ``disk0/00000000.zst`` is the first piece of disk 0, of ``piece``
bytes; a piece that is all zeros is left away. ``atoll-export.sums`` comes last: without it the file is not whole. Nothing is needed twice
on the disk for it, in either direction. Without Atoll: ``tar -x``, and ``zstd -d`` of each piece to its place.

As a program (``python -m atoll.storage.archive``) it does one order from stdin, with its progress on stdout: it can be killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import io
import json
import os
import signal
import stat as modes
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.model.errors import AlreadyExists, AtollError, HostError, InUse, InvalidInput, NotFound, PoolFull
from atoll.model.units import MAX_SIZE

MANIFEST, SUMS = "atoll-export.json", "atoll-export.sums"
VERSION = 1
PIECE = 16 << 20
#: Bytes of a manifest, and of the checksums, at most.
_LIMIT = 64 << 20
_PR_SET_PDEATHSIG = 1
Told = Callable[[float, str], None]


class ArchivedDisk(BaseModel):
    """A disk in an archive; ``size`` in bytes."""

    model_config = ConfigDict(frozen=True)
    name: str
    size: int = Field(gt=0, le=MAX_SIZE)
    mode: str = "rw"
    pool: str = ""


class Manifest(BaseModel):
    """What an archive says of itself. ``id`` tells one export from another; ``created`` in seconds since 1970."""

    model_config = ConfigDict(frozen=True)
    format: str = "atoll-export"
    version: int = VERSION
    id: str
    created: float = 0.0
    piece: int = Field(default=PIECE, ge=512, le=256 << 20)
    instance: dict[str, Any]
    disks: list[ArchivedDisk] = Field(max_length=64)


def partial_of(path: str, ident: str) -> str:
    """Where an archive is until it is whole."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/.{name[:150]}.{ident}.partial"


def check_target(path: str, *, overwrite: bool) -> None:
    """Refuse what cannot be written. Errors: NotFound (no such directory), AlreadyExists, InvalidInput."""
    directory = path.rpartition("/")[0] or "/"
    if not os.path.isdir(directory):
        raise NotFound(f"there is no directory {directory} on this node", hint=f"mkdir -p {directory}")
    if os.path.lexists(path):
        if not modes.S_ISREG(os.lstat(path).st_mode):
            raise InvalidInput(f"{path} is there, and is not a file", hint="choose another name")
        if not overwrite:
            raise AlreadyExists(f"{path} exists", hint="choose another name, or --overwrite")


# --- writing ---


def _data(fd: int, size: int, piece: int) -> Iterator[int]:
    """The pieces of an image that may have anything in them, by number: holes are passed over."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        if at >= size:
            return
        yield at // piece
        at = (at // piece + 1) * piece


def write(partial: str, manifest: Manifest, images: list[str], told: Told) -> dict[str, Any]:
    """Make the archive under a temporary name, durably. ``images``: the disks' raw images, which nobody writes. Its size and figures.

    Errors: InUse (somebody writes the archive), PoolFull, HostError.
    """
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "r+b") as file:
        _own(fd, partial)
        os.ftruncate(fd, 0)
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            head = manifest.model_dump_json(indent=1).encode()
            _add(tar, MANIFEST, head, manifest.created)
            sums = {MANIFEST: hashlib.sha256(head).hexdigest()}
            total, done = sum(disk.size for disk in manifest.disks) or 1, 0
            for index, (disk, path) in enumerate(zip(manifest.disks, images, strict=True)):
                for at in _write_disk(tar, manifest, index, path, sums):
                    told(100 * (done + at) / total, f"disk {index}")
                done += disk.size
            _add(tar, SUMS, json.dumps(sums).encode(), manifest.created)
        file.flush()
        os.fsync(fd)
        return {"size": os.fstat(fd).st_size, "data": total if manifest.disks else 0}


def _own(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(f"another export writes {path}", hint="wait for it: atoll job list") from None


def _write_disk(tar: tarfile.TarFile, manifest: Manifest, index: int, path: str, sums: dict[str, str]) -> Iterator[int]:
    """Add one disk; gives how far it is, in bytes, after each piece."""
    from zstandard import ZstdCompressor

    size, piece = manifest.disks[index].size, manifest.piece
    image = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (there := os.lseek(image, 0, os.SEEK_END)) < size:
            raise HostError(f"{path} has {there} bytes, and not the {size} of the disk", hint="atoll cluster verify")
        for number in _data(image, size, piece):
            raw = _read(image, number * piece, min(piece, size - number * piece))
            if raw.strip(b"\0"):
                packed = ZstdCompressor(level=1, write_content_size=True).compress(raw)
                name = f"disk{index}/{number:08d}.zst"
                _add(tar, name, packed, manifest.created)
                sums[name] = hashlib.sha256(packed).hexdigest()
            # What was read goes out of memory: the guests of this node need it more.
            os.posix_fadvise(image, number * piece, piece, os.POSIX_FADV_DONTNEED)
            yield min(size, (number + 1) * piece)
    finally:
        os.close(image)


def _read(fd: int, at: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, at)
        if not part:
            raise HostError("a disk became shorter while it was read")
        parts.append(part)
        at, length = at + len(part), length - len(part)
    return b"".join(parts)


def _add(tar: tarfile.TarFile, name: str, data: bytes, at: float) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(at)
    tar.addfile(entry, io.BytesIO(data))


def place(path: str, ident: str, *, overwrite: bool) -> None:
    """Give a finished archive its name, durably; done already is success. Errors: AlreadyExists, NotFound (it is not there)."""
    partial = partial_of(path, ident)
    directory = path.rpartition("/")[0] or "/"
    if os.path.lexists(partial):
        if overwrite:
            check_target(path, overwrite=True)
            os.rename(partial, path)
        else:
            # A link never replaces what somebody has put there meanwhile.
            try:
                os.link(partial, path, follow_symlinks=False)
            except FileExistsError:
                if not os.path.samefile(partial, path):
                    raise AlreadyExists(f"{path} exists", hint="choose another name, or --overwrite") from None
            os.unlink(partial)
    elif not os.path.lexists(path) or look(path).id != ident:
        raise NotFound(f"the finished export {partial} is not there any more", hint="export again")
    _sync_directory(directory)


def discard(path: str, ident: str) -> None:
    """Remove an archive that is not to be finished; missing is success."""
    partial = partial_of(path, ident)
    try:
        fd = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _own(fd, partial)
        os.unlink(partial)
        _sync_directory(partial.rpartition("/")[0] or "/")
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- reading ---


def _opened(path: str) -> io.BufferedReader:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path} on this node", hint=f"say which node has it: NODE:{path}") from None
    except OSError as error:
        raise HostError(f"the export {path} cannot be opened: {error.strerror}") from None
    if not modes.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput(f"{path} is not a regular file")
    return open(fd, "rb")


def _bad(path: str, why: str) -> InvalidInput:
    return InvalidInput(f"{path} is not a whole export: {why}", hint="take another copy of it; nothing of it was kept")


def _member(tar: tarfile.TarFile, entry: tarfile.TarInfo | None, path: str, limit: int = _LIMIT) -> bytes:
    if entry is None or not entry.isreg() or entry.size > limit:
        raise _bad(path, "something else is where a part of it should be")
    data = tar.extractfile(entry)
    found = data.read() if data else b""
    if len(found) != entry.size:
        raise _bad(path, "it ends too early")
    return found


def _manifest(tar: tarfile.TarFile, path: str) -> tuple[Manifest, bytes]:
    entry = tar.next()
    if entry is None or entry.name != MANIFEST:
        raise _bad(path, f"it does not begin with {MANIFEST}")
    head = _member(tar, entry, path)
    try:
        found = Manifest.model_validate_json(head)
    except ValidationError as error:
        raise _bad(path, f"its {MANIFEST} says nonsense ({error.errors()[0]['msg']})") from None
    if found.format != "atoll-export" or found.version > VERSION:
        raise InvalidInput(f"{path} is of version {found.version}, and this agent knows up to {VERSION}", hint="upgrade the agent")
    return found, head


def look(path: str) -> Manifest:
    """What an archive says of itself; its pieces are not read. Errors: NotFound, InvalidInput."""
    try:
        with _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return _manifest(tar, path)[0]
    except tarfile.TarError as error:
        raise _bad(path, str(error)) from None


def read(path: str, ident: str, index: int, target: str, told: Told) -> dict[str, Any]:
    """Write disk ``index`` of the archive into a new, empty raw image, durably, with every checksum compared before its piece is written.

    Errors: InvalidInput (it is damaged, or another one than ``ident`` by now), PoolFull, HostError.
    """
    from zstandard import ZstdDecompressor, ZstdError

    try:
        with _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            manifest, head = _manifest(tar, path)
            if manifest.id != ident:
                raise _bad(path, "it was replaced by another one meanwhile")
            members = tar.getmembers()
            last = members[-1]
            if last.name != SUMS:
                raise _bad(path, "its end is missing")
            sums = json.loads(_member(tar, last, path))
            names = [entry.name for entry in members[:-1]]
            if sorted(sums) != sorted(names) or sums[MANIFEST] != hashlib.sha256(head).hexdigest():
                raise _bad(path, "its parts are not those of its list of checksums")
            disk, piece = manifest.disks[index], manifest.piece
            image = os.open(target, os.O_RDWR | os.O_CLOEXEC)
            try:
                unpack = ZstdDecompressor()
                for entry in members[1:-1]:
                    if not entry.name.startswith(f"disk{index}/"):
                        continue
                    number = int(entry.name.removeprefix(f"disk{index}/").removesuffix(".zst"))
                    packed = _member(tar, entry, path, piece + (1 << 20))
                    if hashlib.sha256(packed).hexdigest() != sums[entry.name]:
                        raise _bad(path, f"the checksum of {entry.name} is not right")
                    at = number * piece
                    raw = unpack.decompress(packed, max_output_size=piece)
                    if len(raw) != min(piece, disk.size - at):
                        raise _bad(path, f"{entry.name} has {len(raw)} bytes")
                    _fill(image, at, raw)
                    told(100 * (at + len(raw)) / disk.size, f"disk {index}")
                os.fsync(image)
            finally:
                os.close(image)
    except (tarfile.TarError, ZstdError, ValueError, KeyError, TypeError) as error:
        raise _bad(path, str(error)) from None
    return {"size": disk.size}


def _fill(fd: int, at: int, raw: bytes) -> None:
    """Write what is not zero, in steps of 64 KiB: the image stays as sparse as it was."""
    step = 64 << 10
    for start in range(0, len(raw), step):
        part = raw[start : start + step]
        if part.strip(b"\0"):
            done = 0
            while done < len(part):
                done += os.pwrite(fd, part[done:], at + start + done)


# --- as a program ---


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def _carry_out(order: dict[str, Any], told: Told) -> Any:
    what = order.pop("what")
    if what == "write":
        return write(order["partial"], Manifest(**order["manifest"]), order["images"], told)
    if what == "read":
        return read(order["path"], order["id"], order["index"], order["target"], told)
    if what == "look":
        return look(order["path"]).model_dump(mode="json")
    plain: dict[str, Callable[..., None]] = {"check": check_target, "place": place, "discard": discard}
    return plain[what](**order)


def main() -> None:
    """One order; the last line is its result or its error."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(0)
    try:
        _say(result=_carry_out(json.load(sys.stdin), lambda percent, text: _say(percent=percent, text=text)))
    except AtollError as error:
        _say(error=error.to_wire())
    except OSError as error:
        full = error.errno in (28, 122)
        text = f"{error.filename or 'the export'}: {error.strerror}"
        _say(error=(PoolFull(text) if full else HostError(text)).to_wire())


if __name__ == "__main__":
    main()
