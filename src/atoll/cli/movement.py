"""``atoll instance migrate|failover|move``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import work
from atoll.cli.options import complete, job_options, on_node, target, unasked_option


@click.command()
@target("instance")
@on_node("Where to; default: the best place.")
@click.option("--allow-failover", is_flag=True, help="If it does not run, or its node is dead, start it elsewhere instead.")
@unasked_option
@job_options
def migrate(target: str, node: str | None, allow_failover: bool, **options: Any) -> None:
    """Move a running instance to another node, alive."""
    work.run("instance", "migrate", target, {"node": node, "allow_failover": allow_failover}, **options)


@click.command()
@target("instance")
@on_node("Where to; default: the best place.")
@click.option("--node-is-dead", is_flag=True, help="Your word that its node is off, for this moment.")
@click.option(
    "--timeout", "--shutdown-timeout", type=click.FloatRange(0, 3600), default=120.0, show_default=True, help="Seconds to stop it."
)
@unasked_option
@job_options
def failover(target: str, node: str | None, node_is_dead: bool, timeout: float, **options: Any) -> None:
    """Stop an instance and start it on another node; if its node does not answer, only with --node-is-dead."""
    work.run("instance", "failover", target, {"node": node, "node_is_dead": node_is_dead, "timeout": timeout}, **options)


@click.command()
@target("instance")
@on_node("Where to.", required=True)
@click.option("--pool", metavar="POOL", help="The pool there; default: the same.", shell_complete=complete("pool"))
@unasked_option
@job_options
def move(target: str, node: str, pool: str | None, **options: Any) -> None:
    """Copy an instance's node-local disks to another node and let it run there; alive if it runs."""
    work.run("instance", "move", target, {"node": node, "pool": pool}, **options)
