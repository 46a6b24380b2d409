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
    work.tell_plan(plan)


@storage.command()
@target("node")
@job_options
def join(target: str, **options: Any) -> None:
    """Let NODE have a part in its group's storage cluster. Its disks (-S) are erased. After node add this is done by itself."""
    work.run("node", "join-storage", target, {}, **options)


@storage.command("add-disks")
@target("node")
@click.argument("disks", nargs=-1, required=True, metavar="DISK...")
@job_options
def add_disks(target: str, disks: tuple[str, ...], **options: Any) -> None:
    """Let NODE give more disks, such as /dev/sdd, to its storage cluster. They are erased; guests go on meanwhile."""
    work.run("node", "add-storage-disks", target, {"disks": list(disks)}, **options)


@storage.command("remove-disks")
@target("node")
@click.argument("disks", nargs=-1, required=True, metavar="DISK...")
@click.option("--dead", is_flag=True, help="They have failed: what is on them is given up, if there are other copies.")
@job_options
def remove_disks(target: str, disks: tuple[str, ...], dead: bool, **options: Any) -> None:
    """Take disks of NODE out of its storage cluster. Their data moves to other disks first, then they are erased."""
    work.run("node", "remove-storage-disks", target, {"disks": list(disks), "dead": True if dead else None}, **options)


@storage.command("replace-node")
@click.argument("dead", metavar="DEAD", shell_complete=complete("node"))
@click.argument("new", metavar="NEW", shell_complete=complete("node"))
@job_options
def replace_node(dead: str, new: str, **options: Any) -> None:
    """Put the node NEW of the same group in the place of DEAD, which died for good: NEW joins, then what DEAD had is given up."""
    work.run("node", "replace-storage", dead, {"node": new}, **options)


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
