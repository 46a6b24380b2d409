"""Ids and names. Ids are EBS-legal: a prefix and 17 hex digits."""

from __future__ import annotations

import random
import re

from atoll.model.errors import InvalidInput

_NAME = re.compile(r"^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$")
_ID = re.compile(r"^(vol|snap|i|pool|group|node|storage)-[0-9a-f]{17}$")


def new_id(prefix: str, rng: random.Random | random.SystemRandom) -> str:
    """A new id such as ``vol-0123456789abcdef0``."""
    return f"{prefix}-{rng.getrandbits(68):017x}"


def is_id(text: str) -> bool:
    """Whether the text is an id rather than a name."""
    return bool(_ID.fullmatch(text))


def check_name(name: str, what: str = "name") -> str:
    """The name itself, if it is legal: 1 to 63 letters, digits, dots, dashes and underscores; not an id."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is not a {what}: use 1 to 63 letters, digits, '.', '-' and '_', with a letter or digit at both ends")
    if is_id(name):
        raise InvalidInput(f"{name!r} looks like an id; choose another {what}")
    return name
