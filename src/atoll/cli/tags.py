"""``tag`` and ``untag``, and Ganeti's ``add-tags``, ``remove-tags``, ``list-tags``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import work
from atoll.cli.client import Client, path_of
from atoll.cli.options import job_options, target

_WORDS = {"add": "Add tags.", "remove": "Take tags away."}


def _change(noun: str, name: str, what: str) -> click.Command:
    if noun == "cluster":

        @click.command(name, help=_WORDS[what])
        @click.argument("tags", nargs=-1, required=True)
        @job_options
        def of_cluster(tags: tuple[str, ...], **options: Any) -> None:
            work.run(noun, "tags", body={what: list(tags)}, **options)

        return of_cluster

    @click.command(name, help=_WORDS[what])
    @target(noun)
    @click.argument("tags", nargs=-1, required=True)
    @job_options
    def of_object(target: str, tags: tuple[str, ...], **options: Any) -> None:
        work.run(noun, "tags", target, {what: list(tags)}, **options)

    return of_object


def _list(noun: str) -> click.Command:
    @click.command("list-tags", help="Its tags, a line each.")
    @click.argument("target", metavar=noun.upper(), required=noun != "cluster")
    def command(target: str | None) -> None:
        for tag in Client().get(path_of(noun, target) if target and noun != "cluster" else "/v1/cluster")["tags"]:
            click.echo(tag)

    return command


def ours(group: click.Group, noun: str) -> None:
    """Add ``tag`` and ``untag`` to the commands of a noun."""
    group.add_command(_change(noun, "tag", "add"))
    group.add_command(_change(noun, "untag", "remove"))


def ganetis(group: click.Group, noun: str) -> None:
    """Add Ganeti's three."""
    group.add_command(_change(noun, "add-tags", "add"))
    group.add_command(_change(noun, "remove-tags", "remove"))
    group.add_command(_list(noun))
