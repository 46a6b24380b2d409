"""Fault points: places where tests let a process die or wait. They cost nothing unless a test has armed them.

Real processes: ``ATOLL_FAULT_FILE`` names a file that holds a point's name, or several in lines; the process that reaches one takes it
out (the file goes with the last) and kills itself with SIGKILL. After ``hold `` and a name it renames the file to ``FILE.held`` instead,
and waits at the point until that is removed. ``trace`` kills nobody: the points that are reached are appended to ``FILE.trace``, with the
time.

Simulations set ``handler``, which may raise or wait.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable

handler: Callable[[str], Awaitable[None]] | None = None
_file = os.environ.get("ATOLL_FAULT_FILE")
#: Seconds between looks at a file that holds a process, and how often it looks: it waits five minutes at most.
_LOOK, _LOOKS = 0.02, 15_000


async def point(name: str) -> None:
    """A place where a fault may strike, such as ``master:instance.add:03:after-intent``."""
    if handler is not None:
        await handler(name)
    if _file is not None:
        await _strike(_file, name)


async def _strike(path: str, name: str) -> None:
    try:
        with open(path) as file:
            wanted = file.read().strip()
    except FileNotFoundError:
        return
    if name in (points := wanted.splitlines()):
        points.remove(name)
        if points:
            with open(f"{path}.left", "w") as file:
                file.write("\n".join(points))
            os.rename(f"{path}.left", path)
        else:
            os.unlink(path)
        os.kill(os.getpid(), signal.SIGKILL)
    elif wanted == "trace":
        with open(f"{path}.trace", "a") as trace:
            trace.write(f"{time.time()} {name}\n")
    elif wanted == f"hold {name}":
        held = f"{path}.held"
        os.rename(path, held)
        for _ in range(_LOOKS):
            if not os.path.exists(held):
                return
            await asyncio.sleep(_LOOK)
