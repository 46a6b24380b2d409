"""``atoll storage``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import health, work
from atoll.cli.client import Client, path_of
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, format_option, job_options, target
from atoll.cli.output import Style, print_data, print_object, print_rows
from atoll.cli.reads import info_command, list_command


@click.group(cls=OrderedGroup)
def storage() -> None:
    """Storage clusters that Atoll makes of the nodes of a group."""


storage.add_command(list_command("storage"))
storage.add_command(info_command("storage"))


@storage.command()
@target("group")
@click.option("-s", "--storage-type", "kind", required=True, metavar="TYPE", help="Such as ceph.")
@job_options
def init(target: str, kind: str, **options: Any) -> None:
    """Make a storage cluster of the nodes of GROUP. Their disks (-S of cluster, group and node) are erased.

    With --dry-run: what would be made, and what it will survive. A group without nodes is only marked.
    """
    if options["dry_run"]:
        work.run("storage", "init", target, {"type": kind}, **options)
        _show_plan(target, kind, options["format"])
        return
    work.run("storage", "init", target, {"type": kind}, **options)


def _show_plan(group: str, kind: str, format: str) -> None:
    plan = Client().get(path_of("group", group, "storage-plan"), {"type": kind})
    if format != "table":
        print_data(plan, format)
        return
    for line in plan["lines"]:
        click.echo(f"  {line}")
    for head, lines in (("It survives:", plan["survives"]), ("Mind:", plan["warnings"])):
        if lines:
            click.echo(head)
        for line in lines:
            click.echo(f"  - {line}")


@storage.command()
@target("node")
@job_options
def join(target: str, **options: Any) -> None:
    """Let NODE have a part in its group's storage cluster. Its disks (-S) are erased. After node add this is done by itself."""
    work.run("node", "join-storage", target, {}, **options)


@storage.command()
@click.argument("target", metavar="[STORAGE|POOL]", required=False, shell_complete=complete("storage"))
@format_option
def status(target: str | None, format: str) -> None:
    """How storage is: a line for each pool whose storage tells (sampled every few seconds), all about one pool, or what a storage cluster
    that Atoll made says of itself now."""
    client = Client()
    watched = [row for row in client.all("pool") if row["health"]]
    if target is None:
        print_rows(watched, health.HEALTH, Style(format=format))
        return
    pool = next((row for row in watched if target in (row["name"], row["id"])), None)
    if pool is None or target in {row["name"] for row in client.all("storage")}:
        print_object(client.get(path_of("storage", target, "status"), timeout=90.0), Style(format=format))
    elif format == "table":
        health.show(pool)
    else:
        print_data(pool["health"], format)
