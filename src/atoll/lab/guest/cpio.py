"""Write a ``newc`` cpio archive, the form of an initramfs. Device nodes need no root then, and the result depends on its input alone."""

from __future__ import annotations

import stat
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive. ``mode`` carries the type too; ``device`` is (major, minor) of a device node."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Member:
    """A directory, 0755."""
    return Member(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, mode: int = 0o644) -> Member:
    """A regular file."""
    return Member(path, stat.S_IFREG | mode, data)


def character_device(path: str, major: int, minor: int) -> Member:
    """A character device, 0600."""
    return Member(path, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(members: list[Member]) -> bytes:
    """The archive; a directory must come before what is in it."""
    return b"".join(_entry(number, member) for number, member in enumerate([*members, Member("TRAILER!!!", 0)]))


def _entry(inode: int, member: Member) -> bytes:
    name = member.path.encode() + b"\0"
    fields = (inode, member.mode, 0, 0, 1, 0, len(member.data), 0, 0, *member.device, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _pad(head + name) + _pad(member.data)


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
