"""What the commands print: tables, JSON, YAML; sizes, ages and times for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import click

from atoll.model.errors import InvalidInput
from atoll.model.units import GIB, MIB, TIB, format_size

Row = dict[str, Any]
#: Rich tables take half a second for a thousand rows.
RICH_ROWS = 100
_STYLES = {
    "ok": "green",
    "running": "green",
    "done": "green",
    "ready": "green",
    "available": "green",
    "in-use": "green",
    "error": "bold red",
    "hung": "bold red",
    "unreachable": "bold red",
    "dead-proved": "bold red",
    "needs-attention": "bold red",
    "warning": "yellow",
    "paused": "yellow",
    "undone": "yellow",
    "offline": "yellow",
    "drained": "yellow",
    "migrating": "cyan",
    "starting": "cyan",
    "queued": "cyan",
}


class Column(NamedTuple):
    """A column of a table. ``kind`` says how a value is written: text, size, number, age, time, percent,
    or prose (long text, cut in the default table)."""

    title: str
    get: Callable[[Row], Any]
    kind: str = "text"
    #: Shown by default only if some row has a value.
    if_any: bool = False


class Table(NamedTuple):
    """The columns of a noun, and those shown by default. Fields of the API that have no column are columns too."""

    columns: dict[str, Column]
    default: tuple[str, ...]

    def column(self, name: str, sample: Row | None) -> Column:
        """A column by name. Errors: InvalidInput, with the names there are."""
        if name in self.columns:
            return self.columns[name]
        if sample is not None and name in sample:
            return Column(heading(name), lambda row: row.get(name), kind_of(name))
        known = sorted({*self.columns, *(sample or {})})
        raise InvalidInput(f"there is no field {name!r}", hint=f"fields: {', '.join(known)}")

    def choose(self, wanted: str | None, rows: Sequence[Row]) -> list[tuple[str, Column]]:
        """The columns for ``-o``: ``a,b`` or ``+c`` (the default ones and c)."""
        names, asked = list(self.default), set()
        if wanted:
            more = [name.strip() for name in wanted.lstrip("+").split(",") if name.strip()]
            names, asked = ([*(n for n in names if n not in more), *more] if wanted.startswith("+") else more), set(more)
        sample = rows[0] if rows else None
        if wanted and not rows:
            sample = dict.fromkeys(names)
        chosen = [(name, self.column(name, sample)) for name in names]
        return [(n, c) for n, c in chosen if n in asked or not c.if_any or any(c.get(row) not in (None, "", [], {}) for row in rows)]


_SIZES = {"size", "memory", "promised", "total", "free", "disk_size", "memory_total", "memory_free", "disk_total", "disk_free", "allocated"}
_TIMES = {"created", "started", "ended", "at", "certificate_expires", "ca_expires", "master_certificate_expires"}
_AGES = {"age", "last_seen", "deadline"}


def kind_of(field: str) -> str:
    """How values of an API field are written."""
    if field in _SIZES:
        return "size"
    if field in _TIMES:
        return "time"
    return "age" if field in _AGES else "text"


class Style(NamedTuple):
    """How to print: what the output options said."""

    format: str = "table"
    headers: bool = True
    separator: str | None = None
    fields: str | None = None
    units: str = ""


_ACRONYMS = {"ca": "CA", "cpu": "CPU", "cpus": "CPUs", "vcpus": "VCPUs", "os": "OS", "nics": "Network cards"}


def heading(field: str) -> str:
    """An API field's name for people: ``memory_total`` is ``Memory total``."""
    words = [_ACRONYMS.get(word, word) for word in field.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def size_text(value: Any, units: str) -> str:
    """A size: with a unit (``h``), or a bare number of MiB, GiB or TiB (``m``, ``g``, ``t``), as Ganeti's ``--units``."""
    if value is None:
        return "?"
    if units in ("", "h"):
        return format_size(int(value))
    divisor = {"m": MIB, "g": GIB, "t": TIB}[units]
    number = value / divisor
    return str(round(number)) if units == "m" else f"{number:.1f}"


def duration(seconds: float | None) -> str:
    """A length of time: ``4.2s``, ``12m``, ``3h``, ``5d``."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m"
    return f"{seconds // 3600:.0f}h" if seconds < 172800 else f"{seconds // 86400:.0f}d"


def text(value: Any, kind: str = "text", units: str = "") -> str:
    """A value as text for a table."""
    if kind == "size":
        # A few columns hold several sizes, such as those of an instance's disks.
        return ",".join(size_text(v, units) for v in value) if isinstance(value, list) else size_text(value, units)
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    if kind == "age":
        return duration(float(value))
    if kind == "time":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(value))) if value else "-"
    if kind == "day":
        return time.strftime("%Y-%m-%d", time.localtime(float(value)))
    if kind == "percent":
        return f"{float(value):.0f}%"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        words = {k: text(_kept(v), kind_of(k)) for k, v in _kept(value).items()}
        return ", ".join(f"{k}=({word})" if isinstance(value[k], dict) else f"{k}={word}" for k, word in words.items())
    if isinstance(value, list):
        return ",".join(text(v) for v in value)
    return str(value)


def print_rows(rows: Sequence[Row], table: Table, style: Style) -> None:
    """Print a list."""
    if style.format in ("json", "yaml"):
        print_data(_selected(rows, table, style), style.format)
        return
    chosen = table.choose(style.fields, rows)
    units = style.units or ("m" if style.separator is not None else "h")
    cells = [[text(column.get(row), column.kind, units) for _, column in chosen] for row in rows]
    if style.separator is None and not style.fields:
        long = {number for number, (_, column) in enumerate(chosen) if column.kind == "prose"}
        cells = [[shortened(cell) if number in long else cell for number, cell in enumerate(line)] for line in cells]
    titles = [column.title for _, column in chosen]
    if style.separator is not None:
        for line in ([titles] if style.headers else []) + cells:
            click.echo(style.separator.join(line))
    elif sys.stdout.isatty() and len(rows) <= RICH_ROWS:
        _rich(titles if style.headers else None, cells, [column.kind for _, column in chosen])
    else:
        print_plain(titles if style.headers else None, cells, [column.kind for _, column in chosen])


def _selected(rows: Sequence[Row], table: Table, style: Style) -> list[Row]:
    if not style.fields:
        return list(rows)
    if style.fields.startswith("+"):
        return list(rows)
    chosen = table.choose(style.fields, rows)
    return [{name: (row[name] if name in row else column.get(row)) for name, column in chosen} for row in rows]


def shortened(text: str, width: int = 60) -> str:
    """The beginning of a long text; ``info`` has all of it."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def print_plain(titles: list[str] | None, cells: list[list[str]], kinds: Sequence[str]) -> None:
    """Aligned columns, two spaces apart; numbers to the right."""
    lines = ([titles] if titles else []) + cells
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [kind in ("size", "number", "age", "percent") for kind in kinds]
    out = []
    for line in lines:
        parts = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        out.append("  ".join(parts).rstrip())
    click.echo("\n".join(out))


def _rich(titles: list[str] | None, cells: list[list[str]], kinds: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, show_header=titles is not None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, kind in enumerate(kinds):
        right = kind in ("size", "number", "age", "percent")
        table.add_column(titles[number] if titles else "", justify="right" if right else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
    Console(highlight=False).print(table)


def print_data(data: Any, form: str) -> None:
    """Print data as JSON or YAML."""
    if form == "yaml":
        import yaml

        click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip())
    else:
        import json

        click.echo(json.dumps(data, indent=2, ensure_ascii=False))


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _kept(value: Any) -> Any:
    """A dict without its empty fields; anything else as it is."""
    return {k: v for k, v in value.items() if v not in _EMPTY} if isinstance(value, dict) else value


def print_object(row: Row, style: Style, *, hide: Iterable[str] = ()) -> None:
    """Print one object: a line per field, tables for lists of objects. Empty fields are left away."""
    if style.format != "table":
        print_data(row, style.format)
        return
    shown = {k: _kept(v) for k, v in row.items() if k not in hide}
    shown = {k: v for k, v in shown.items() if v not in _EMPTY}
    tables = {k: v for k, v in shown.items() if isinstance(v, list) and isinstance(v[0], dict)}
    width = max((len(k) for k in shown if k not in tables), default=0) + 1
    for name, value in shown.items():
        if name in tables:
            continue
        title = heading(name) + ":"
        if isinstance(value, dict):
            click.echo(title)
            for key, inner in value.items():
                click.echo(f"  {key}: {text(inner, kind_of(key))}")
        elif name == "commands":
            click.echo("What to type:")
            for command in value:
                click.echo(f"  $ {command}")
        else:
            click.echo(f"{title:<{width}} {text(value, kind_of(name))}")
    for name, items in tables.items():
        click.echo(f"\n{heading(name)}:")
        keys = [key for key in items[0] if any(item.get(key) not in (None, "") for item in items)]
        cells = [["  " + text(item.get(keys[0]), kind_of(keys[0])), *(text(item.get(k), kind_of(k)) for k in keys[1:])] for item in items]
        print_plain(["  " + keys[0].capitalize(), *(k.capitalize() for k in keys[1:])], cells, ["text", *(kind_of(k) for k in keys[1:])])
