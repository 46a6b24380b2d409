"""The model of claims and migrations: a small configuration holds, and a planted bug is found (``make model`` searches all)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None or shutil.which("gcc") is None, reason="spin and gcc are not installed"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_model", ROOT / "scripts" / "run_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["1-job", "bug-turn"])
def test_the_model_is_as_it_must_be(runner: ModuleType, name: str, tmp_path: Path) -> None:
    configuration = next(c for c in runner.CONFIGURATIONS if c.name == name)
    outcome = runner.search(configuration, tmp_path)
    assert runner.as_expected(configuration, outcome), outcome
    if configuration.holds:
        assert outcome.complete
        assert outcome.states > 10_000
    else:
        assert any("guest[" in line for line in runner.trace(configuration, tmp_path))


def test_a_search_that_is_not_complete_is_not_taken_for_one(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "DEPTH", 50)
    configuration = next(c for c in runner.CONFIGURATIONS if c.name == "1-job")
    outcome = runner.search(configuration, tmp_path)
    assert not runner.as_expected(configuration, outcome)


def test_every_planted_bug_of_the_model_is_searched_for(runner: ModuleType) -> None:
    named = {c.defines["BUG"] for c in runner.CONFIGURATIONS if "BUG" in c.defines}
    text = runner.MODEL.read_text()
    assert named == {word for word in ("UNDO", "GENERATION", "FSYNC", "GRACE", "TURN", "OWNER", "LOCK") if f"BUG == {word}" in text}
    assert len(named) == 7
