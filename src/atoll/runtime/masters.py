"""Which masters a node follows: what the newest master has told it. Until one has, its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atoll.runtime.files import fsync_dir, read_json, write_durably


def masters_file(state_dir: Path) -> Path:
    """Where it is remembered."""
    return state_dir / "masters.json"


def read_masters(state_dir: Path) -> tuple[str, ...]:
    """The base URLs of the masters; empty when none has told. Errors: HostError."""
    found: dict[str, Any] = read_json(masters_file(state_dir), {})
    return tuple(str(url) for url in found.get("masters", ()))


def write_masters(state_dir: Path, masters: tuple[str, ...], term: int) -> None:
    """Remember them, durably. Errors: HostError."""
    write_durably(masters_file(state_dir), json.dumps({"masters": list(masters), "term": term}), 0o644)


def forget_masters(state_dir: Path) -> None:
    """Before the node joins another cluster."""
    if masters_file(state_dir).exists():
        masters_file(state_dir).unlink()
        fsync_dir(state_dir)
