"""For all tests: which of them take turns."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: They start labs and guests, which want the machine for themselves: with ``pytest -n`` one worker has them all, the others the rest.
HEAVY = ("integration", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The group of an item is nearer than its module's, so it prevails."""
    for item in items:
        if item.path.relative_to(HERE).parts[0] in HEAVY:
            item.add_marker(pytest.mark.xdist_group("heavy"))
