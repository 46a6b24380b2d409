"""``cli``: how long a command takes to start, against an interpreter that does nothing."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import atoll
from benchmarks.cluster import CLI
from benchmarks.records import GANETI, Record, record

ROUNDS = 25


def run() -> Iterator[Record]:
    """The least of many: what else the machine does only adds. With bytecode, as pip and packages install it."""
    compileall.compile_dir(str(Path(atoll.__file__).parent), quiet=2)
    commands = {"bare": [sys.executable, "-c", "pass"], "version": [*CLI, "--version"], "help": [*CLI, "instance", "add", "--help"]}
    least = dict.fromkeys(commands, 1e9)
    for _ in range(ROUNDS):
        for name, argv in commands.items():
            began = time.perf_counter()
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
            least[name] = min(least[name], time.perf_counter() - began)
    bare = least["bare"]
    yield record("command line start", least["help"], "s", peer=GANETI, peer_value=0.12, target=0.2)
    for name, command in (("command line start, --version", "version"), ("instance add --help", "help")):
        yield record(name, least[command], "s", peer="bare interpreter, same run", peer_value=bare, ratio_target=4)
    yield record("bare interpreter", bare, "s")
