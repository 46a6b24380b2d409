"""``atoll os``: the OS definitions on the nodes."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli.client import Client
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import format_option
from atoll.cli.output import Row, Style, print_object
from atoll.model.errors import HostError, NotFound


@click.group(cls=OrderedGroup)
def os() -> None:
    """OS definitions: directories of scripts on the nodes that install an instance."""


def _rows() -> list[Row]:
    found: list[Row] = Client().get("/v1/os")["items"]
    return found


def _named(names: tuple[str, ...]) -> list[Row]:
    rows = {row["name"]: row for row in _rows()}
    if missing := [name for name in names if name.partition("+")[0] not in rows]:
        raise NotFound(f"there is no OS definition {', '.join(missing)} on any node", hint="atoll os list")
    return [rows[name.partition("+")[0]] for name in dict.fromkeys(names)] if names else list(rows.values())


def choices(row: Row) -> list[str]:
    """What ``-o`` takes for a definition."""
    return [f"{row['name']}+{variant}" for variant in row["variants"]] or [row["name"]]


@os.command("list")
@click.option("--no-headers", is_flag=True, help="No line with titles.")
@format_option
def list_(no_headers: bool, format: str) -> None:
    """What instance add -o takes: the definitions that all nodes have, with their variants."""
    names = [name for row in _rows() if row["valid"] for name in choices(row)]
    if format != "table":
        print_object({"items": names}, Style(format=format))
        return
    for name in [*([] if no_headers else ["Name"]), *names]:
        click.echo(name)


@os.command()
@click.argument("names", nargs=-1, metavar="[OS]...")
@format_option
def info(names: tuple[str, ...], format: str) -> None:
    """Variants and parameters of OS definitions."""
    rows = _named(names)
    if format != "table":
        print_object({"items": rows}, Style(format=format))
        return
    for row in rows:
        click.echo(f"{row['name']}:")
        click.echo(f"  valid: {'yes' if row['valid'] else 'no; see atoll os diagnose'}")
        click.echo(f"  variants: {', '.join(row['variants']) or 'none'}")
        click.echo(f"  scripts: {', '.join(row['scripts'])}")
        click.echo("  parameters:" + ("" if row["parameters"] else " none"))
        for name, about in row["parameters"].items():
            click.echo(f"    {name}: {about}")


@os.command()
@format_option
def diagnose(format: str) -> None:
    """Every definition on every node, and why some cannot be used; exit code 1 if there are such."""
    rows = _rows()
    if format != "table":
        print_object({"items": rows}, Style(format=format))
    for row in rows if format == "table" else []:
        click.echo(f"OS: {row['name']} [global status: {'valid' if row['valid'] else 'invalid'}]")
        nodes = sorted({*row["paths"], *row["problems"]})
        for node in nodes:
            path = row["paths"].get(node, "")
            click.echo(f"  {node}: {row['problems'].get(node, 'valid')}" + (f" ({path})" if path else ""))
    bad = [row["name"] for row in rows if not row["valid"]]
    if bad:
        raise HostError(
            f"not usable on every node: {', '.join(bad)}", hint="install the same definition on all nodes; docs/howto/os-definitions.md"
        )


def parameters(texts: tuple[str, ...]) -> dict[str, Any]:
    """``-O suite=bookworm,arch=amd64``, repeated, as a dict."""
    from atoll.cli.options import split_words

    return {name: value for text in texts for name, value in split_words(text, "-O").items()}
