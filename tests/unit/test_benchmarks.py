"""The benchmarks' records: what counts as met, and that the docs show what was measured last."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import records  # noqa: E402


def test_a_target_is_a_most_and_for_rates_a_least() -> None:
    assert records.record("a", 0.1, "s", target=0.1).met is True
    assert records.record("a", 0.11, "s", target=0.1).met is False
    assert records.record("a", 299, "/s", target=300).met is False
    assert records.record("a", 300, "/s", target=300).met is True
    assert records.record("a", 1, "s").met is None


def test_a_target_may_be_a_multiple_of_the_peer() -> None:
    found = records.record("a", 29.0, "ms", peer="bare", peer_value=20.0, ratio_target=1.5)
    assert (found.ratio, found.target, found.met) == (1.45, 30.0, True)
    assert records.record("a", 31.0, "ms", peer="bare", peer_value=20.0, ratio_target=1.5).met is False


def test_a_partial_run_keeps_the_other_figures() -> None:
    old = [records.record("a", 1, "s"), records.record("b", 2, "s")]
    new = [records.record("b", 3, "s"), records.record("c", 4, "s")]
    assert [(r.name, r.value) for r in records.merged(old, new)] == [("a", 1), ("b", 3), ("c", 4)]


def test_the_docs_show_the_last_run() -> None:
    found = records.load()
    assert found
    text = records.PAGE.read_text()
    assert f"{records.BEGIN}\n{records.markdown(found)}\n{records.END}" in text, "make bench writes both; commit both"
