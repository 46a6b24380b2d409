"""Keyrings of Ceph users, and the files by which QEMU gets a key: never on a command line, never in a message."""

from __future__ import annotations

import configparser
import contextlib
import os
import pwd
from pathlib import Path

from atoll.model.errors import PoolUnavailable
from atoll.runtime.files import write_durably


def key_of(path: str, user: str) -> str:
    """The key of ``client.USER`` in a keyring. Errors: PoolUnavailable."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise PoolUnavailable(
            f"the keyring of client.{user}, {path}, cannot be read: {error.strerror}", hint=f"bring it to this node: {path}"
        ) from None
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    try:
        # Ceph indents the lines of a section.
        parser.read_string("\n".join(line.strip() for line in text.splitlines()))
        return parser[f"client.{user}"]["key"]
    except (configparser.Error, KeyError):
        raise PoolUnavailable(f"there is no key of client.{user} in {path}", hint=f"ceph auth get client.{user} -o {path}") from None


def _directory() -> Path:
    return Path(os.environ.get("ATOLL_RUN_DIR") or "/run/atoll") / "keys"


def place(volume: str) -> Path:
    """Where the key for a volume lies while it is attached; a directory in memory."""
    return _directory() / f"{volume}.key"


def lay_out(volume: str, key: str) -> Path:
    """Give the key to QEMU, and to nobody else: the file is the guests' user's."""
    above = _directory()
    above.mkdir(parents=True, exist_ok=True)
    above.chmod(0o711)  # the guests' user may pass, not look
    path = place(volume)
    write_durably(path, key, 0o400)
    owner = os.environ.get("ATOLL_GUEST_USER", "")
    with contextlib.suppress(KeyError):
        if owner and os.geteuid() == 0:
            account = pwd.getpwnam(owner)
            os.chown(path, account.pw_uid, account.pw_gid)
    return path


def take_away(volume: str) -> None:
    """No longer attached; not there is success."""
    place(volume).unlink(missing_ok=True)


def laid_out() -> list[str]:
    """The volumes whose keys lie here."""
    return sorted(path.stem for path in _directory().glob("vol-*.key"))
