"""``atoll pool``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import tags, work
from atoll.cli.client import Client, path_of
from atoll.cli.columns import TABLES
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, confirm, force_option, job_options, on_node, output_options, pairs, style, target
from atoll.cli.output import print_rows
from atoll.cli.reads import info_command, list_command


@click.group(cls=OrderedGroup)
def pool() -> None:
    """Storage pools: a driver, its options, and the node groups that reach it."""


pool.add_command(list_command("pool"))
pool.add_command(info_command("pool"))


@pool.command()
@click.argument("name")
@click.option("-t", "--driver", required=True, metavar="DRIVER", help="Such as file or sharedfile.")
@click.option("-O", "--option", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the driver, such as path=/srv/images.")
@click.option(
    "-g", "--group", "groups", multiple=True, metavar="GROUP", help="Connect it to this group only.", shell_complete=complete("group")
)
@click.option("--observe", is_flag=True, help="Only look at what is there: nothing is ever written to it, and nothing can be made in it.")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
@job_options
def add(
    name: str, driver: str, settings: tuple[str, ...], groups: tuple[str, ...], observe: bool, more: tuple[str, ...], **options: Any
) -> None:
    """Make a pool and connect it to all groups (or the named ones).

    Example: atoll pool add images -t sharedfile path=/srv/images
    """
    body: dict[str, Any] = {"name": name, "driver": driver, "options": pairs((*settings, *more), "-O"), "groups": list(groups)}
    body |= {"observe": True} if observe else {}
    work.run("pool", "add", body=body, **options)


@pool.command()
@target("pool")
@output_options
def images(target: str, **options: Any) -> None:
    """What lies in a pool now, other people's images included, and who has it open; for pools whose driver can observe."""
    rows = Client().get(path_of("pool", target, "images"), timeout=60.0)["items"]
    print_rows(rows, TABLES["image"], style(**options))


@pool.command()
@target("pool")
@click.argument("group", shell_complete=complete("group"))
@job_options
def connect(target: str, group: str, **options: Any) -> None:
    """Let a node group reach the pool; every node of it is prepared."""
    work.run("pool", "connect", target, {"group": group}, **options)


@pool.command()
@target("pool")
@click.argument("group", shell_complete=complete("group"))
@job_options
def disconnect(target: str, group: str, **options: Any) -> None:
    """Take the pool from a group that no longer uses it."""
    work.run("pool", "disconnect", target, {"group": group}, **options)


@pool.command()
@target("pool")
@job_options
def check(target: str, **options: Any) -> None:
    """Look at the storage from every node, and measure how well it tells who writes."""
    work.run("pool", "check", target, {}, **options)


@pool.command()
@target("pool")
@on_node("As this node sees it; node-local pools need one.")
@job_options
def mark(target: str, node: str | None, **options: Any) -> None:
    """Mark the storage as this pool's again, if its file .atoll-pool was removed; some of the pool's images must be there."""
    work.run("pool", "mark", target, {"node": node}, **options)


@pool.command()
@target("pool")
@click.option("--open/--close", "opened", required=True, help="Take new volumes, or take no more.")
@click.option("--reason", default="", help="Why it is closed.")
@job_options
def modify(target: str, opened: bool, reason: str, **options: Any) -> None:
    """Open a pool for new volumes, or close it."""
    work.run("pool", "modify", target, {"state": "ready" if opened else "closed", "reason": reason}, **options)


@pool.command()
@target("pool")
@force_option
@job_options
def remove(target: str, force: bool, **options: Any) -> None:
    """Remove a pool without volumes; files that are not Atoll's stay."""
    confirm(f"Remove the pool {target}?", force or options["dry_run"])
    work.run("pool", "remove", target, {}, **options)


tags.ours(pool, "pool")
