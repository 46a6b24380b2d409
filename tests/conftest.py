"""For all tests: which of them take turns."""

from __future__ import annotations

from typing import Any

import pytest

#: They start labs and guests, which want the machine for themselves.
HEAVY = ("tests/integration/", "tests/faults/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``pytest -n`` one worker has all the heavy tests, one after the other; the rest goes to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class TakingTurns(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "heavy" if nodeid.startswith(HEAVY) else nodeid

    return TakingTurns(config, log)
