"""``atoll volume``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import tags as tagging
from atoll.cli import work
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, confirm, force_option, image_options, image_source, job_options, on_node, pairs, target
from atoll.cli.reads import info_command, list_command
from atoll.model.units import parse_size


@click.group(cls=OrderedGroup)
def volume() -> None:
    """Volumes: the disks of instances, and those that wait for one."""


volume.add_command(list_command("volume"))
volume.add_command(info_command("volume"))


@volume.command()
@click.argument("name", required=False)
@click.option("-p", "--pool", "-t", metavar="POOL", help="POOL, DRIVER:POOL or DRIVER.", shell_complete=complete("pool"))
@click.option("-s", "--size", metavar="SIZE", help="Such as 10G; without a unit MiB.")
@on_node("Where it shall be, for node-local pools.")
@image_options
@click.option("--adopt", metavar="IMAGE", help="Take this existing image of the pool instead of making one.")
@click.option(
    "--from-snapshot", metavar="SNAPSHOT", help="Begin with what this snapshot holds, in its pool.", shell_complete=complete("snapshot")
)
@click.option("-O", "--option", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the driver.")
@click.option("--tags", metavar="TAGS", help="Tags, with commas.")
@job_options
def create(
    name: str | None,
    pool: str | None,
    size: str | None,
    node: str | None,
    image: str | None,
    image_format: str | None,
    adopt: str | None,
    from_snapshot: str | None,
    settings: tuple[str, ...],
    tags: str | None,
    **options: Any,
) -> None:
    """Make a volume that no instance has yet: empty, from an image or from a snapshot."""
    if pool is None and from_snapshot is None:
        raise click.UsageError("Missing option '-p' / '--pool': the pool in which it shall be.")
    body = {
        "name": name,
        "pool": pool,
        "size": parse_size(size, default_unit="m") if size else None,
        "node": node,
        "adopt": adopt,
        "image": image_source(image, image_format) if image else None,
        "snapshot": from_snapshot,
        "options": pairs(settings, "-O"),
        "tags": tags.split(",") if tags else [],
    }
    work.run("volume", "create", body=body, **options)


@volume.command()
@target("volume")
@click.argument("amount")
@click.option("--absolute", is_flag=True, help="AMOUNT is the new size, not what is added.")
@job_options
def grow(target: str, amount: str, absolute: bool, **options: Any) -> None:
    """Grow a volume by AMOUNT, such as 5G. A volume cannot shrink again."""
    work.run("volume", "grow", target, growth(amount, absolute), **options)


def growth(amount: str, absolute: bool) -> dict[str, Any]:
    """Ganeti's amount: added, unless it is absolute; MiB without a unit."""
    return {"size" if absolute else "increment": parse_size(amount, default_unit="m")}


@volume.command()
@target("volume")
@job_options
def flatten(target: str, **options: Any) -> None:
    """Copy into a volume what it still reads of the snapshot that it was made from, also while its guest runs. It then takes all its
    room, and what it was made from can go. 'atoll job cancel' breaks it off; repeating it goes on where it was."""
    work.run("volume", "flatten", target, {}, **options)


@volume.command()
@target("volume")
@click.argument("new_name")
@job_options
def rename(target: str, new_name: str, **options: Any) -> None:
    """Give a volume another name."""
    work.run("volume", "rename", target, {"new_name": new_name}, **options)


tagging.ours(volume, "volume")


@volume.command()
@target("volume")
@force_option
@job_options
def delete(target: str, force: bool, **options: Any) -> None:
    """Delete a volume and its data."""
    confirm(f"Delete the volume {target} and all its data?", force or options["dry_run"])
    work.run("volume", "delete", target, {}, **options)
