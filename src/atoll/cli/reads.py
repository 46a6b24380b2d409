"""``list`` and ``info`` of every noun."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import health
from atoll.cli.client import Client, path_of
from atoll.cli.columns import TABLES
from atoll.cli.options import format_option, output_options, style, target
from atoll.cli.output import Row, Style, print_object, print_rows
from atoll.model.errors import NotFound

_HIDDEN = {
    "instance": ("claim", "disk_size", "pin"),
    "pool": ("capabilities", "health"),
    "job": ("deadline", "cancel_asked"),
    "volume": ("attachments",),
    "storage": ("layout",),
}


def named(rows: list[Row], names: tuple[str, ...], noun: str) -> list[Row]:
    """The rows with these names or ids, in the order of the names; all if none is given. Errors: NotFound."""
    if not names:
        return rows
    by_name = {str(row.get("id")): row for row in rows} | {str(row["name"]): row for row in rows if "name" in row}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise NotFound(f"there is no {noun} {', '.join(missing)}", hint=f"atoll {noun} list")
    return [by_name[name] for name in names]


def list_command(noun: str) -> click.Command:
    """``atoll NOUN list [NAME...]``."""

    @click.command("list", help=f"All {noun}s, or the named ones.")
    @target(noun, nargs=-1)
    @output_options
    def command(targets: tuple[str, ...], **options: Any) -> None:
        show(noun, targets, style(**options))

    return command


def show(noun: str, names: tuple[str, ...], wanted: Style) -> None:
    """Print the list of a noun."""
    print_rows(named(Client().all(noun), names, noun), TABLES[noun], wanted)


def info_command(noun: str) -> click.Command:
    """``atoll NOUN info NAME``."""

    @click.command("info", help=f"Everything about one {noun}.")
    @target(noun)
    @format_option
    def command(target: str, format: str) -> None:
        row = Client().get(path_of(noun, target))
        print_object(row, Style(format=format), hide=_HIDDEN.get(noun, ()))
        if format == "table" and noun == "pool":
            _capabilities(row)
            health.show(row)

    return command


def _capabilities(row: Row) -> None:
    can = row["capabilities"]
    words = [name.replace("_", " ") for name, value in can.items() if value is True]
    click.echo(f"Its driver: {can['description']}")
    click.echo(
        f"It can: {', '.join(words)}; mirroring {can['mirroring']}, access {' and '.join(can['access'])}, adoption {can['adoption']}"
    )
