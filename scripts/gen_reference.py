"""Writes docs/reference pages that come from the code: configuration, drivers, operations, states. ``--check`` only compares."""

from __future__ import annotations

import inspect
import re
import sys
from enum import StrEnum
from pathlib import Path

from atoll.hypervisor.contract import Hypervisor
from atoll.model import messages, objects
from atoll.operations.all import OPERATIONS
from atoll.runtime.config import Config
from atoll.storage import registry

ROOT = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by scripts/gen_reference.py from the code; do not edit. -->\n\n"


def comments(cls: type) -> dict[str, str]:
    """The ``#:`` comments above the fields of a class."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("#:"):
            waiting.append(text[2:].strip())
        elif match := re.match(r"(\w+):", text):
            found[match[1]] = " ".join(waiting)
            waiting = []
        else:
            waiting = []
    return found


def cell(text: object) -> str:
    """Text for a table's cell."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def configuration() -> str:
    """docs/reference/configuration.md"""
    said = comments(Config)
    rows = [
        f"| `{name}` | {cell(field.default) or '(empty)'} | {cell(said.get(name, ''))} |" for name, field in Config.model_fields.items()
    ]
    return (
        "# Configuration\n\n" + NOTE + "Each node has one file, `/etc/atoll/atoll.toml` (`ATOLL_CONFIG` names another). `cluster init` "
        "and `node join` write it. What the cluster decides is in the master's store, not here.\n\n"
        "| Setting | Default | What it is |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def drivers() -> str:
    """docs/reference/drivers.md"""
    parts = ["# Storage drivers\n\n" + NOTE + "A driver is known by what it can. `atoll pool info POOL` shows it for a pool.\n"]
    for info in registry.drivers():
        can = [name for name in ("create", "grow", "snapshots", "clones", "exclusive_lock", "fencing") if getattr(info, name)]
        parts.append(
            f"\n## {info.name}\n\n{info.description[0].upper()}{info.description[1:]}.\n\n"
            f"- mirroring: {info.mirroring}\n- access: {', '.join(sorted(info.access))}\n- space: {info.space}\n"
            f"- adoption: {info.adoption}\n- rename: {info.rename}\n- can: {', '.join(can)}\n\n"
            "| Option | Default | Choices | What it is |\n| --- | --- | --- | --- |\n"
        )
        for option in info.options:
            default = "(required)" if option.required else option.default
            parts.append(f"| `{option.name}` | {default} | {', '.join(option.choices)} | {cell(option.description)} |\n")
    return "".join(parts)


def operations() -> str:
    """docs/reference/operations.md"""
    parts = [
        "# Operations\n\n" + NOTE + "What can be asked for over REST. Objects are named by name or id; sizes are bytes. "
        "The full schema is at `/v1/openapi.json`.\n"
    ]
    for name in sorted(OPERATIONS):
        found = OPERATIONS[name]
        if not found.public:
            continue
        what = (found.request.__doc__ or "").strip().replace("\n    ", " ").replace("\n", " ")
        parts.append(f"\n## {name}\n\n{what} Role: {found.role}.\n")
        fields = found.request.model_fields
        if fields:
            parts.append("\n| Field | Default |\n| --- | --- |\n")
            for field, info in fields.items():
                default = "(required)" if info.is_required() else info.get_default(call_default_factory=True)
                parts.append(f"| `{field}` | {cell(default)} |\n")
    return "".join(parts)


def states() -> str:
    """docs/reference/states.md"""
    parts = ["# States\n\n" + NOTE]
    for cls in (objects.JobState, objects.StepState, objects.VolumeState, objects.Writers):
        assert issubclass(cls, StrEnum)
        doc = (cls.__doc__ or "").strip().replace("\n    ", " ")
        parts.append(f"## {cls.__name__}\n\n{doc}\n\n" + "".join(f"- `{member}`\n" for member in cls) + "\n")
    doc = inspect.cleandoc(messages.GuestStatus.__doc__ or "")
    parts.append(f"## Guests, as an agent sees them\n\n{doc}\n")
    assert Hypervisor
    return "".join(parts)


PAGES = {"configuration.md": configuration, "drivers.md": drivers, "operations.md": operations, "states.md": states}


def main() -> None:
    """Write the pages, or with ``--check`` fail if one differs."""
    wrong = []
    for name, make in PAGES.items():
        path = ROOT / name
        text = make()
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                wrong.append(name)
        else:
            path.write_text(text)
    if wrong:
        sys.exit(f"differs from the code: {', '.join(wrong)}; run scripts/gen_reference.py")


if __name__ == "__main__":
    main()
