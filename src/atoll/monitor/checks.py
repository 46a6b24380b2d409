"""What a look at one machine finds. Data, so that it travels from workers and agents as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
#: The worst first.
LEVELS = {"error": 0, "warning": 1, "ok": 2}


@dataclass(frozen=True)
class Check:
    """One finding: what it is about, what was found, why that matters, and what to type next. ``ok`` needs neither why nor commands."""

    level: Level
    about: str
    what: str
    why: str = ""
    commands: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "commands": list(self.commands)}


def ok(about: str, what: str) -> Check:
    """Nothing to mend."""
    return Check("ok", about, what)


def warning(about: str, what: str, why: str, *commands: str) -> Check:
    """It works, but not as well or not as long as it should."""
    return Check("warning", about, what, why, commands)


def error(about: str, what: str, why: str, *commands: str) -> Check:
    """Something does not work, or data is in danger."""
    return Check("error", about, what, why, commands)


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
