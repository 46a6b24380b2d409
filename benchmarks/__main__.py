"""``python -m benchmarks [PIECE ...]``: measure, print the table, write results/latest.json and the docs page's table."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import replace

from benchmarks import records

PIECES = ("cli", "instances", "jobs", "volumes", "idle", "scale", "migration", "ceph")


def main() -> int:
    """Run the named pieces, or all. What other pieces measured before stays in the results."""
    wanted = [name for word in sys.argv[1:] for name in word.replace(",", " ").split()] or list(PIECES)
    unknown = [name for name in wanted if name not in PIECES]
    if unknown:
        print(f"Error: there is no piece {', '.join(unknown)}\nNext: one or several of {', '.join(PIECES)}", file=sys.stderr)
        return 2
    found: list[records.Record] = []
    try:
        for name in wanted:
            began = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)
            for item in importlib.import_module(f"benchmarks.{name}").run():
                found.append(replace(item, piece=name))
                print("  " + records.table([item]).splitlines()[1], file=sys.stderr, flush=True)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        print(records.table(found))
    everything = records.merged(records.load(), found, PIECES) if len(wanted) < len(PIECES) else found
    records.save(everything)
    records.write_page(everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
