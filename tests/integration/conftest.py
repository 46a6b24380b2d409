"""Integration tests of a whole cluster share their helpers with the fault tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
