"""Sizes: bytes inside, units at the edges."""

from __future__ import annotations

import re

from atoll.model.errors import InvalidSize

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
#: The largest size of a volume: 2**60 bytes (1 EiB); more is a mistyped unit.
MAX_SIZE = 1 << 60
_UNITS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": 1024**5}
_SIZE = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*([kmgtpb]?)(?:i?b)?\s*$", re.IGNORECASE)


def parse_size(text: str | int, *, default_unit: str = "") -> int:
    """Bytes of a size such as ``10G``, ``512MiB`` or ``1.5T``. Units are powers of 1024.

    ``default_unit`` is used where the text has none (Ganeti's interfaces count in MiB). Zero and negative sizes are refused.
    """
    match = _SIZE.match(str(text))
    if not match:
        raise InvalidSize(f"{text!r} is not a size")
    number, unit = float(match[1]), (match[2] or default_unit).lower()
    size = int(match[1]) * _UNITS[unit] if "." not in match[1] else int(number * _UNITS[unit])
    return check_size(size, text)


def check_size(size: int, shown: str | int | None = None) -> int:
    """The size itself, if a volume can have it."""
    what = size if shown is None else shown
    if size <= 0:
        raise InvalidSize(f"the size {what} is not positive")
    if size > MAX_SIZE:
        raise InvalidSize(f"the size {what} is larger than 1 EiB")
    return size


def format_size(size: int | None) -> str:
    """A size for people: ``10G``, ``1.5T``, ``512M``; ``?`` where it is not known."""
    if size is None:
        return "?"
    for unit, letter in ((1024**5, "P"), (TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")):
        if abs(size) >= unit:
            value = size / unit
            return f"{value:.0f}{letter}" if value == int(value) else f"{value:.1f}{letter}"
    return f"{size}B"
