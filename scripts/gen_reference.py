#!/usr/bin/env python3
"""Writes the pages of docs/reference that come from the code: ``.venv/bin/python scripts/gen_reference.py``.

docs/reference/errors.md has a generator of its own, atoll.cli.reference. A test compares every page with what is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refpages import commands, states, tables

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands.commands,
    "configuration.md": tables.configuration,
    "drivers.md": tables.drivers,
    "ganeti.md": commands.ganeti,
    "operations.md": tables.operations,
    "states.md": states.states,
    "storage-clusters.md": tables.storage_clusters,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DIRECTORY / name).write_text(make())
