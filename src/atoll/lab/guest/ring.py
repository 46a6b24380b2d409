"""The check behind "nothing was lost": what the guest's writer acknowledged must be in the ring on its disk."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass

SLOTS = 2048
RECORD = 512
_MAGIC = b"CTRREC01"
_HEAD = struct.Struct("<8sQQ")
_ALL_ONES = 0xFFFFFFFFFFFFFFFF
#: A line is complete only with its end: a console that was cut in the middle of a number must not give a smaller one.
_ACK = re.compile(r"ACK (\d+)\r?\n")


@dataclass(frozen=True, slots=True)
class RingReport:
    """What is on the disk: the highest record, the numbers that should be there but are not, and whether all is well."""

    top: int
    missing: tuple[int, ...]
    ok: bool


def check_ring(path: str | os.PathLike[str], last_ack: int) -> RingReport:
    """Read the ring at the start of an image or block device.

    ``ok``: every one of the last 2048 records is there, and the highest is at least ``last_ack``. Raises OSError.
    """
    with open(path, "rb") as image:
        return check_bytes(image.read(SLOTS * RECORD), last_ack)


def check_bytes(ring: bytes, last_ack: int) -> RingReport:
    """The same, for the first MiB of a disk."""
    found: dict[int, int] = {}
    for slot in range(len(ring) // RECORD):
        magic, number, inverse = _HEAD.unpack_from(ring, slot * RECORD)
        # A record in another's slot counts as missing: it would hide a write that went astray.
        if magic == _MAGIC and inverse == number ^ _ALL_ONES and number % SLOTS == slot:
            found[slot] = number
    top = max(found.values(), default=0)
    missing = tuple(number for number in range(max(1, top - SLOTS + 1), top + 1) if found.get(number % SLOTS) != number)
    return RingReport(top=top, missing=missing, ok=not missing and top >= last_ack)


def acks(console_text: str) -> list[int]:
    """The numbers of all records that the writer acknowledged on the console, in their order."""
    return [int(number) for number in _ACK.findall(console_text)]
