"""Starts the first process of a node and waits until the node is made."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from atoll.lab.layout import marker
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.model.errors import DeadlineExceeded, HostError

_PROGRAM = Path(__file__).parent / "pid1/__main__.py"


def launch(directory: Path, spec: NodeSpec, lock: int, deadline: float = 30.0) -> None:
    """Returns when the node's root is in place and its services have been started (which is not: are ready).

    Raises HostError with what the first process said; DeadlineExceeded after ``deadline`` seconds.
    """
    spec.write(directory)
    reading, writing = os.pipe()
    try:
        known_as = marker(spec.lab, spec.node, rootless=not spec.namespaces)
        with (directory / "log/init.log").open("a") as log:
            starter = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), known_as, str(directory), str(writing), str(lock)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writing, lock),
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **({} if spec.namespaces else spec.environment)},
            )
        os.close(writing)
        writing = -1
        said = _read(reading, time.monotonic() + deadline)
        starter.wait(deadline)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{spec.node} did not start within {deadline:.0f} s", hint=f"see {directory}/log/init.log") from None
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    if said != "ready":
        raise HostError(f"{spec.node} did not start: {said or 'its first process ended'}", hint=f"see {directory}/log/init.log")


def _read(handle: int, end: float) -> str:
    """All until the other side closes, or ``ready``."""
    said = b""
    while said != b"ready":
        if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
            return "it did not say that it was ready in time"
        part = os.read(handle, 4096)
        if not part:
            break
        said += part
    return said.decode(errors="replace")
