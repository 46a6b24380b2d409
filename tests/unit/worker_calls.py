"""Functions for the workers of test_worker.py."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from atoll.model.errors import PoolFull
from atoll.runtime import percent


def echo(value: Any) -> Any:
    return {"value": value, "pid": os.getpid()}


def hang() -> None:
    time.sleep(600)


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def slow() -> str:
    for done in (10.0, 60.0):
        percent.tell(done)
        time.sleep(0.6)
    return "done"


def full() -> None:
    raise PoolFull("no room", hint="make room")


def bug() -> None:
    raise ZeroDivisionError("oops")


def die() -> None:
    os._exit(3)


def fork_and_hang(path: str) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        Path(path).write_text(str(process.pid))


FUNCTIONS = {f.__name__: f for f in (echo, hang, nap, slow, full, bug, die, fork_and_hang)}
