"""For all tests: which of them take turns."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ceph_support import ceph  # noqa: F401 - a fixture for all

#: They start labs and guests and mostly wait for them: two at a time is what two processors bear.
HEAVY = ("tests/integration/", "tests/faults/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``pytest -n`` the heavy tests of a directory run one after the other in one worker; the rest goes to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class TakingTurns(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group in HEAVY if nodeid.startswith(group)), nodeid)

    return TakingTurns(config, log)


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, as large as the module's ``DISK`` says (mount's words, such as 2m)."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.module.DISK}", "tmpfs", str(path)], check=True)
    yield path
    # Lazily: after a failed test a file may still be open.
    subprocess.run(["umount", "--lazy", str(path)], check=True)
