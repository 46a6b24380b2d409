"""Directories of nodes that mean something to the whole cluster."""

from __future__ import annotations

import posixpath

#: Below it everybody who may make instances may name files; elsewhere only admins may, for a file's bytes end up on a disk that they read.
OPEN_DIRECTORY = "/var/lib/atoll/images"


def lies_in(path: str, directory: str) -> bool:
    """Whether the path is the directory, or below it. Both are absolute; links are not followed."""
    # POSIX lets two slashes at the beginning mean something of its own; Linux does not.
    plain = "/" + posixpath.normpath(path).lstrip("/")
    return plain == directory or plain.startswith(directory.rstrip("/") + "/")
