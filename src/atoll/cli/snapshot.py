"""``atoll snapshot``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import tags as tagging
from atoll.cli import work
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, confirm, force_option, job_options, target
from atoll.cli.reads import info_command, list_command


@click.group(cls=OrderedGroup)
def snapshot() -> None:
    """Snapshots: what a volume held at one moment. They stay when the volume is deleted."""


snapshot.add_command(list_command("snapshot"))
snapshot.add_command(info_command("snapshot"))


@snapshot.command()
@click.argument("volume", shell_complete=complete("volume"))
@click.option("--name", metavar="NAME", help="Its name; default: its id.")
@click.option("--tags", metavar="TAGS", help="Tags, with commas.")
@job_options
def create(volume: str, name: str | None, tags: str | None, **options: Any) -> None:
    """Make a snapshot of VOLUME.

    Of a disk whose guest runs it holds what a power cut would have left: what the guest had flushed is in it, and file systems and
    databases repair themselves when they are next used. Stop the guest first, or let it flush, for more.

    The pool's driver must be able to (see atoll pool info). A volume from it: atoll volume create --from-snapshot.
    """
    body = {"volume": volume, "name": name, "tags": tags.split(",") if tags else []}
    work.run("snapshot", "create", body=body, **options)


tagging.ours(snapshot, "snapshot")


@snapshot.command()
@target("snapshot")
@force_option
@job_options
def delete(target: str, force: bool, **options: Any) -> None:
    """Delete a snapshot. Volumes that were made from it stay as they are."""
    confirm(f"Delete the snapshot {target}?", force or options["dry_run"])
    work.run("snapshot", "delete", target, {}, **options)
