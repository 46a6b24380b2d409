"""Files that survive a power cut, and locks."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any

from atoll.model.errors import HostError, InUse


def write_durably(path: str | os.PathLike[str], data: bytes | str, mode: int = 0o600) -> None:
    """Replace the file: after a crash or power cut it has the old content or the new, whole; when this returns, the new.

    Text is written as UTF-8. Errors: HostError; the old file is then still there.
    """
    target = Path(path)
    # In the same directory: a rename is atomic only within a file system. A fresh name: two writers must not share one.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}") from None
    fsync_dir(target.parent)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make creations, renames and removals in the directory durable. Errors: HostError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise HostError(f"cannot make changes in {os.fspath(path)} durable: {error.strerror}") from None


def read_json(path: str | os.PathLike[str], default: Any = None) -> Any:
    """The file's content; ``default`` when there is no such file. Errors: HostError when it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return default
    except OSError as error:
        raise HostError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
    except ValueError as error:
        raise HostError(f"{os.fspath(path)} is damaged: {error}", hint=f"look at {os.fspath(path)}; restore it from a backup") from None


def lock_exclusively(path: str | os.PathLike[str], mode: int = 0o600) -> int:
    """Lock the file (made if needed) for this process without waiting; the lock lasts until the returned descriptor is closed.

    The holder's pid is written into the file. Errors: InUse, naming that pid; HostError.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    except OSError as error:
        raise HostError(f"cannot open {os.fspath(path)}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise InUse(f"process {holder} has {os.fspath(path)} locked", hint=f"ps {holder}", pid=holder) from None
    except OSError as error:
        os.close(handle)
        raise HostError(f"cannot lock {os.fspath(path)}: {error.strerror}") from None
    return handle


def lock_holder(path: str | os.PathLike[str]) -> int | None:
    """The process that has the file locked by ``lock_exclusively`` now; None: nobody, or no such file. 0: somebody who does not say.

    Errors: HostError.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot open {os.fspath(path)}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        said = os.pread(handle, 20, 0).decode(errors="replace").strip()
        return int(said) if said.isdigit() else 0
    finally:
        os.close(handle)
