"""``atoll job``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import follow, work
from atoll.cli.client import Client, path_of
from atoll.cli.columns import JOBS
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, format_option, output_options, style, target
from atoll.cli.output import print_rows
from atoll.cli.reads import info_command

_ACTIVE = ("queued", "running", "undoing", "needs-attention")


@click.group(cls=OrderedGroup)
def job() -> None:
    """What the cluster does and did. A job that needs attention waits for you."""


@job.command("list")
@click.option("--active", is_flag=True, help="Only those that have not ended.")
@click.option("--limit", type=click.IntRange(1, 10000), default=30, show_default=True, help="The newest so many.")
@output_options
def list_jobs(active: bool, limit: int, **options: Any) -> None:
    """The newest jobs; the newest is the last."""
    rows = Client().get("/v1/jobs", {"limit": 10000 if active else limit})["items"]
    if active:
        rows = [row for row in rows if row["state"] in _ACTIVE][:limit]
    print_rows(rows[::-1], JOBS, style(**options))


job.add_command(info_command("job"))


@job.command()
@click.argument("target", metavar="[JOB]", required=False, shell_complete=complete("job"))
@format_option
def watch(target: str | None, format: str) -> None:
    """Show a job's progress until it ends; without JOB, what all jobs do, until Ctrl-C. Ctrl-C stops the watching, not the job."""
    client = Client()
    if target is None:
        follow.jobs(client, format)
        return
    number = client.get(path_of("job", target))["id"]
    follow.job(client, number)
    work.finish(client, number, format)


@job.command()
@target("job")
@click.option("--submit", is_flag=True, help="Do not wait until it has been undone.")
@format_option
def cancel(target: str, submit: bool, format: str) -> None:
    """Stop a job and undo what it has done. Past its commit it goes on."""
    client = Client()
    number = client.send("POST", path_of("job", target, "cancel"))["id"]
    _undone(client, number, submit, format, "cancelled")


def _undone(client: Client, number: int, submit: bool, format: str, word: str) -> None:
    """Wait for a job that is to be undone: that it was is success here."""
    if submit:
        click.echo(str(number))
        return
    found = work.watch(client, number)
    if found["state"] == "undone" and format == "table":
        click.echo(f"Job {number} was {word}; what it had done is undone: {found['summary']}")
        return
    work.finish(client, number, format)


@job.command()
@target("job")
@click.option("--node-is-dead", metavar="NODE", help="Your word that this node is off, for this moment.", shell_complete=complete("node"))
@click.option("--submit", is_flag=True, help="Do not wait.")
@format_option
def resume(target: str, node_is_dead: str | None, submit: bool, format: str) -> None:
    """Let a job that needs attention try again."""
    client = Client()
    body = {"node_is_dead": node_is_dead} if node_is_dead else {}
    number = client.send("POST", path_of("job", target, "resume"), body)["id"]
    if submit:
        click.echo(str(number))
        return
    work.finish(client, number, format)


@job.command()
@target("job")
@click.option("--submit", is_flag=True, help="Do not wait.")
@format_option
def undo(target: str, submit: bool, format: str) -> None:
    """Undo a job that needs attention."""
    client = Client()
    number = client.send("POST", path_of("job", target, "undo"), {})["id"]
    _undone(client, number, submit, format, "undone")
