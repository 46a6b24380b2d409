"""The records that a run gives: what was measured, against whom, and whether the target is met."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

LATEST = Path(__file__).parent / "results" / "latest.json"
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "benchmarks.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
GANETI = "Ganeti 3.0.2"


@dataclass(frozen=True)
class Record:
    """One figure. ``ratio`` is value : peer's value. A target is a most, but a least for rates (``.../s``). ``met`` None: no target.

    ``piece``: which one measured it.
    """

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    target: float | None = None
    met: bool | None = None
    piece: str = ""


def record(name: str, value: float, unit: str, *, peer: str | None = None, peer_value: float | None = None, target: float | None = None,
           ratio_target: float | None = None) -> Record:  # fmt: skip
    """Make one. ``ratio_target``: the target is this multiple of the peer's value."""
    if ratio_target is not None and peer_value:
        target = ratio_target * peer_value
    met = None
    if target is not None:
        met = value >= target if unit.endswith("/s") else value <= target
    ratio = value / peer_value if peer_value else None
    return Record(name, _short(value), unit, peer, _maybe(peer_value), _maybe(ratio), _maybe(target), met)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _maybe(value: float | None) -> float | None:
    return None if value is None else _short(value)


def load(path: Path = LATEST) -> list[Record]:
    """The last run's records; none if there was none."""
    return [Record(**item) for item in json.loads(path.read_text())] if path.exists() else []


def merged(old: Iterable[Record], new: Iterable[Record], pieces: Collection[str]) -> list[Record]:
    """The old records with the new ones in their places; records with new names come last.

    Old ones go that nobody measures any more: their piece is none of ``pieces``, or it has measured now and did not give that name.
    """
    fresh = {item.name: item for item in new}
    measured = {item.piece for item in fresh.values()}
    found = {item.name: item for item in old if item.name in fresh or (item.piece in pieces and item.piece not in measured)}
    return list({**found, **fresh}.values())


def save(records: Iterable[Record], path: Path = LATEST) -> None:
    """One record a line, so that differences can be read."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(item)) for item in records) + "\n]\n")


def _cells(item: Record) -> list[str]:
    peer = f"{item.peer_value:g} ({item.peer})" if item.peer_value is not None else "-"
    ratio = f"{item.ratio:.2g}" if item.ratio is not None else "-"
    bound = "-" if item.target is None else f"{'≥' if item.unit.endswith('/s') else '≤'} {item.target:g}"
    met = {True: "yes", False: "NO", None: "-"}[item.met]
    return [item.name, f"{item.value:g} {item.unit}".strip(), peer, ratio, bound, met]


TITLES = ["What", "Measured", "Peer", "Ratio", "Target", "Met"]


def table(records: Iterable[Record]) -> str:
    """For the terminal."""
    lines = [TITLES, *(_cells(item) for item in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(records: Iterable[Record]) -> str:
    """For the docs."""
    rows = [TITLES, ["---"] * len(TITLES), *(_cells(item) for item in records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_page(records: Iterable[Record], page: Path = PAGE) -> None:
    """Put the table between its marks in the docs page."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{markdown(records)}\n{END}{after}")
