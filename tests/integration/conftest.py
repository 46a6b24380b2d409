"""Integration tests of a whole cluster share their helpers with the fault tests."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))


@pytest.fixture
def healing() -> Iterator[ExitStack]:
    """Mends what a test has broken, also when it fails."""
    with ExitStack() as stack:
        yield stack
