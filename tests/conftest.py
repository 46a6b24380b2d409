"""For all tests: which of them take turns."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: They start labs and guests, which want the machine for themselves: with ``pytest -n`` one worker has them all, the others the rest.
HEAVY = ("integration", "faults")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group for all of them. Their own groups go, because xdist would make one of each combination."""
    for item in items:
        if item.path.relative_to(HERE).parts[0] in HEAVY:
            for part in item.listchain():
                part.own_markers = [mark for mark in part.own_markers if mark.name != "xdist_group"]
            item.add_marker(pytest.mark.xdist_group("heavy"))
