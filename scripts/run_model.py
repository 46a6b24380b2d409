#!/usr/bin/env python3
"""Searches the model of claims and migrations completely: ``.venv/bin/python scripts/run_model.py [NAME...]``, or ``make model``.

Needs spin and gcc. Each configuration of docs/explanation/model/claims.pml must hold in every state that it can reach, and each planted bug
must be found. Prints a table; fails if a configuration does not hold, a bug is not found, or a search was not complete. ``--trace NAME``
prints the shortest way to the bug that it knows, as the variables that change.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "model" / "claims.pml"
#: Megabytes that one search may take, its longest path, and seconds after which it is given up.
MEMORY, DEPTH, LIMIT = 7000, 10_000, 1800
SMALL = 20


@dataclass(frozen=True)
class Configuration:
    """One search. ``slots``: 2 to the power of this is the size of the hash table."""

    name: str
    what: str
    defines: dict[str, int | str] = field(default_factory=dict)
    holds: bool = True
    slots: int = SMALL


def _bug(name: str, what: str, masters: int = 1) -> Configuration:
    return Configuration(f"bug-{name.lower()}", what, {"JOBS": 2, "MASTERS": masters, "BUG": name}, holds=False)


CONFIGURATIONS = (
    Configuration("1-job", "one master, one job", {"JOBS": 1}),
    Configuration("2-masters", "two masters, one job", {"JOBS": 1, "MASTERS": 2}),
    Configuration("2-jobs", "one master, two jobs", {"JOBS": 2}, slots=22),
    Configuration("both", "two masters, two jobs", {"JOBS": 2, "MASTERS": 2}, slots=25),
    _bug("UNDO", "an undo removed: a start is undone without the agent's word"),
    _bug("GENERATION", "a check removed: the agent starts refused generations"),
    _bug("FSYNC", "an fsync removed: a power cut takes the agent's memory"),
    _bug("GRACE", "a new master takes a person's word at once", masters=2),
    _bug("TURN", "orders of earlier jobs are obeyed"),
    _bug("OWNER", "another node's memory is taken for one's own"),
    _bug("LOCK", "a node is readmitted in the middle of a start"),
)


@dataclass(frozen=True)
class Outcome:
    """What a search has found."""

    states: int
    depth: int
    seconds: float
    megabytes: float
    errors: int
    #: What did not hold; or why the search was not complete.
    broken: str = ""
    complete: bool = True


class SearchFailed(Exception):
    """spin or gcc refuse the model."""


def _run(command: list[str], directory: Path, limit: float = LIMIT) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode and not done.stdout.count("State-vector"):
        raise SearchFailed(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def _defines(configuration: Configuration) -> list[str]:
    return [f"-D{name}={value}" for name, value in configuration.defines.items()]


def search(configuration: Configuration, directory: Path, model: Path = MODEL) -> Outcome:
    """Look at every state. Errors: SearchFailed, subprocess.TimeoutExpired."""
    (directory / "claims.pml").write_text(model.read_text())
    _run(["spin", *_defines(configuration), "-a", "claims.pml"], directory)
    # A complete search: no bit states, no hash compaction. The model is one process, so there is no order to reduce. To optimise the
    # program takes longer than a small search.
    effort = "-O2" if configuration.slots > SMALL else "-O0"
    _run(["gcc", effort, "-w", "-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEMORY}", "-o", "pan", "pan.c"], directory)
    began = time.monotonic()
    told = _run(["./pan", f"-m{DEPTH}", f"-w{configuration.slots}", "-n"], directory)
    seconds = time.monotonic() - began
    broken = re.search(r"pan:\d+: (.*) \(at depth", told)
    short = next((words for words in ("max search depth too small", "reached -DMEMLIM", "out of memory") if words in told), "")
    return Outcome(
        states=int(float(_number(r"([\d.e+]+) states, stored", told))),
        depth=int(_number(r"depth reached (\d+)", told)),
        seconds=seconds,
        megabytes=float(_number(r"([\d.]+)\s+total actual memory usage", told)),
        errors=int(_number(r"errors: (\d+)", told)),
        broken=broken[1] if broken else short,
        complete=not short and "Search not completed" not in told,
    )


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise SearchFailed(f"what pan said is not understood:\n{text[-2000:]}")
    return found[1]


def as_expected(configuration: Configuration, outcome: Outcome) -> bool:
    """Whether it holds everywhere, or the planted bug was found."""
    return (outcome.complete and not outcome.errors) if configuration.holds else outcome.errors > 0


def trace(configuration: Configuration, directory: Path) -> list[str]:
    """The way to the error of the last search in the directory: what changes, one line for each step."""
    _run(["./pan", f"-m{DEPTH}", "-n", "-i"], directory)
    told = _run(["spin", *_defines(configuration), "-t", "-p", "-g", "claims.pml"], directory)
    values: dict[str, str] = {}
    lines: list[str] = []
    for line in told.splitlines():
        if line.startswith("#processes"):
            break
        if step := re.match(r"\s*(\d+):\s+proc", line):
            lines.append(f"{step[1]:>4}")
        elif (change := re.match(r"\s+(\w+(?:\[\d\])?) = (-?\d+)", line)) and values.get(change[1], "0") != change[2]:
            values[change[1]] = change[2]
            lines[-1] += f"  {change[1]}={change[2]}"
    return [line for line in lines if "=" in line]


def main() -> int:
    """Search all, or those that are named; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description="Search the model of claims and migrations completely.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(c.name for c in CONFIGURATIONS))
    parser.add_argument("--trace", action="store_true", help="print how an error comes about")
    options = parser.parse_args()
    unknown = set(options.names) - {c.name for c in CONFIGURATIONS}
    if unknown:
        parser.error(f"there is no configuration {', '.join(sorted(unknown))}")
    bad = 0
    print(f"{'configuration':16} {'states':>12} {'depth':>6} {'seconds':>8} {'MB':>6}  outcome", flush=True)
    for configuration in CONFIGURATIONS:
        if options.names and configuration.name not in options.names:
            continue
        with tempfile.TemporaryDirectory(prefix="atoll-model-") as name:
            try:
                outcome = search(configuration, Path(name))
            except (SearchFailed, subprocess.TimeoutExpired, OSError) as error:
                print(f"{configuration.name:16} cannot be searched: {error}", flush=True)
                bad += 1
                continue
            fine = as_expected(configuration, outcome)
            bad += not fine
            verdict = "counter-example" if outcome.errors else ("holds" if outcome.complete else f"not complete: {outcome.broken}")
            figures = f"{outcome.states:>12,} {outcome.depth:>6} {outcome.seconds:>8.1f} {outcome.megabytes:>6.0f}"
            print(f"{configuration.name:16} {figures}  {verdict}{'' if fine else '  <- WRONG'}  ({configuration.what})", flush=True)
            if outcome.errors and (options.trace or configuration.holds):
                print(f"    {outcome.broken}", *trace(configuration, Path(name)), sep="\n    ", flush=True)
    print("Everything is as it must be." if not bad else f"{bad} are not as they must be.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
