"""The benchmarks' records: what counts as met, and that the docs show what was measured last."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import records  # noqa: E402
from benchmarks.__main__ import PIECES  # noqa: E402


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


def measured(piece: str, **figures: float) -> list[records.Record]:
    return [replace(records.record(name, value, "s"), piece=piece) for name, value in figures.items()]


def test_a_partial_run_keeps_the_other_figures() -> None:
    old, new = measured("one", a=1) + measured("two", b=2), measured("two", b=3, c=4)
    assert [(r.name, r.value) for r in records.merged(old, new, ["one", "two"])] == [("a", 1), ("b", 3), ("c", 4)]


def test_what_nobody_measures_any_more_goes() -> None:
    old = measured("one", a=1, renamed=1) + measured("two", b=2) + measured("removed", d=5) + measured("", e=6)
    found = records.merged(old, measured("one", a=3), ["one", "two"])
    assert [(r.name, r.value) for r in found] == [("a", 3), ("b", 2)]


def test_a_piece_that_measured_nothing_keeps_what_it_had() -> None:
    """One is left out where QEMU is not installed."""
    assert records.merged(measured("one", a=1), [], ["one"]) == measured("one", a=1)


def test_every_figure_shown_belongs_to_a_piece() -> None:
    assert {item.piece for item in records.load()} <= set(PIECES)


def test_the_docs_show_the_last_run() -> None:
    found = records.load()
    assert found
    text = records.PAGE.read_text()
    assert f"{records.BEGIN}\n{records.markdown(found)}\n{records.END}" in text, "make bench writes both; commit both"
