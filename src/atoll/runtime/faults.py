"""Fault points: places where tests let a process die. They cost nothing unless a test has armed them.

Real processes: ``ATOLL_FAULT_FILE`` names a file that holds a point's name; the process that reaches the point removes the file and
kills itself with SIGKILL. Simulations set ``handler``, which may raise or wait.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

handler: Callable[[str], Awaitable[None]] | None = None
_file = os.environ.get("ATOLL_FAULT_FILE")


async def point(name: str) -> None:
    """A place where a fault may strike, such as ``master:instance.add:03:after-intent``."""
    if handler is not None:
        await handler(name)
    if _file is not None:
        _strike(_file, name)


def _strike(path: str, name: str) -> None:
    try:
        with open(path) as file:
            wanted = file.read().strip()
    except FileNotFoundError:
        return
    if wanted == name:
        os.unlink(path)
        os.kill(os.getpid(), signal.SIGKILL)
