"""Do the fault tests find bugs? Plants them one at a time into a copy of the tree, and runs the part of ``make faults`` that must see it.

Each part must be green in the copy as it is, and red with the bug. ``scripts/planted_bugs.py`` runs all, with names only these. Needs root
for the lost syncs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import run_faults

TOP = Path(__file__).resolve().parent.parent
#: Seconds that the tests of one bug may take.
LIMIT = 900


@dataclass(frozen=True)
class Bug:
    """A line of the source that is replaced, and the tests (a group of ``make faults``, a file, a choice in it) that must turn red."""

    name: str
    text: str
    file: str
    old: str
    new: str
    group: str
    tests: str
    chosen: str

    def check(self, top: Path) -> str:
        """The file's text. Errors: SystemExit unless what is replaced is there exactly once, and the tests still exist."""
        source = (top / self.file).read_text()
        found = source.count(self.old)
        if found != 1:
            raise SystemExit(f"planted bug {self.name}: {found} places in {self.file} have {self.old!r}, not one: mend this script")
        if not (top / self.tests).exists():
            raise SystemExit(f"planted bug {self.name}: there is no {self.tests}: mend this script")
        return source

    def plant(self, top: Path) -> None:
        """Put it into a copy of the tree."""
        (top / self.file).write_text(self.check(top).replace(self.old, self.new))


BUGS = (
    Bug(
        "undo-of-create",
        "a new image is not removed when its job is undone",
        "src/atoll/operations/making.py",
        'undo=Undo("volume.uncreate", {"ref": ref, "volume": volume}, node=node, local=plan["node"] is not None),',
        "undo=None,",
        "simulation",
        "tests/simulation/test_failures.py",
        "test_every_failure and volume-create",
    ),
    Bug(
        "undo-of-start",
        "a guest is not stopped when its start is undone",
        "src/atoll/operations/running.py",
        'undo=Undo("guest.stop", {"instance": instance, "generation": generation, "grace": 0.0}, node=node, dies=True),',
        "undo=None,",
        "simulation",
        "tests/simulation/test_failures.py",
        "test_cancel_at_every_point and add-seed",
    ),
    Bug(
        "generation-check",
        "an agent starts what it has promised to refuse",
        "src/atoll/agent/guests.py",
        "if generation <= refused:",
        "if generation < 0:",
        "simulation",
        "tests/simulation/test_network.py",
        "test_start_that_arrives_after_the_claim_has_moved",
    ),
    Bug(
        "term-check",
        "an agent obeys a master that was replaced",
        "src/atoll/agent/memory.py",
        "if term < self._term:",
        "if term < 0:",
        "simulation",
        "tests/simulation/test_network.py",
        "test_replaced_master_has_no_effect and start",
    ),
    Bug(
        "late-copy-check",
        "an agent carries out an order again that was undone, when a late copy of it comes",
        "src/atoll/agent/service.py",
        'if known and known[0] in ("undoing", "undone"):',
        'if known and known[0] == "never":',
        "simulation",
        "tests/simulation/test_network.py",
        "test_an_order_that_was_undone_comes_again",
    ),
    Bug(
        "sync-of-store",
        "the store acknowledges before the disk has it",
        "src/atoll/store/sqlite_file.py",
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=OFF",
        "store",
        "tests/unit/test_power_cut.py",
        "store",
    ),
    Bug(
        "sync-of-agent",
        "an agent acknowledges promises before the disk has them",
        "src/atoll/agent/memory.py",
        '"PRAGMA synchronous=FULL"',
        '"PRAGMA synchronous=OFF"',
        "store",
        "tests/unit/test_power_cut.py",
        "agent",
    ),
)


def copy(to: Path) -> None:
    """The tree as it is, without what was built."""
    for name in ("src", "tests", "docs", "scripts"):
        shutil.copytree(TOP / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(TOP / name, to / name)


def run(top: Path, bug: Bug) -> tuple[int, str]:
    """pytest's exit status in the copy, and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", bug.tests, "-k", bug.chosen]
    environment = {**os.environ, "PYTHONPATH": str(top / "src"), "PYTHONDONTWRITEBYTECODE": "1", "ATOLL_FAULT_STEPS": run_faults.STEPS}
    try:
        done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"not done within {LIMIT} s"
    return done.returncode, done.stdout


def try_one(bug: Bug) -> str:
    """A word on what became of it; it begins with ``red`` if all is well."""
    with tempfile.TemporaryDirectory(prefix="atoll-planted-") as directory:
        top = Path(directory)
        copy(top)
        bug.check(top)
        status, said = run(top, bug)
        if status != 0 or " skipped" in said.splitlines()[-1]:
            return f"not tried: without the bug its tests are not green (status {status}): {said.strip().splitlines()[-1]}"
        bug.plant(top)
        status, said = run(top, bug)
        # 1 is pytest's word for failed tests; anything else says nothing of the bug.
        return "red" if status == 1 else f"NOT SEEN (status {status})"


def main() -> int:
    """Exit status 1 unless every planted bug was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(bug.name for bug in BUGS))
    given = parser.parse_args()
    unknown = set(given.names) - {bug.name for bug in BUGS}
    if unknown:
        parser.error(f"there is no bug {', '.join(sorted(unknown))}; there are {', '.join(bug.name for bug in BUGS)}")
    bad = False
    print(f"{'bug':<18} {'group':<12} {'time':>6}  result", flush=True)
    for bug in BUGS:
        if given.names and bug.name not in given.names:
            continue
        began = time.monotonic()
        result = try_one(bug)
        bad = bad or result != "red"
        print(f"{bug.name:<18} {bug.group:<12} {time.monotonic() - began:>4.0f} s  {result}: {bug.text}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
