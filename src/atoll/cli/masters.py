"""``atoll cluster backup``, ``restore`` and ``master-failover``: typed as root on the node, for there may be no master to ask."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

import click

from atoll.cli.options import confirm, force_option
from atoll.cli.settings import config_option
from atoll.model.errors import InvalidInput

_dead_option = click.option(
    "--node-is-dead", "dead", multiple=True, metavar="NODE", help="Your word that this node is off, for this moment. May be repeated."
)
_dry_option = click.option("--dry-run", is_flag=True, help="Only say what would be.")


@click.command()
@click.argument("file")
@config_option
def backup(file: str, config: str) -> None:
    """Write all that this master needs to FILE (or - for stdout), while it works.

    Secrets in it are sealed with the master key, /etc/atoll/master.key, which is not in it: keep that elsewhere.
    """
    if file == "-" and sys.stdout.isatty():
        raise InvalidInput("a backup is no text for a terminal", hint="atoll cluster backup - > FILE, or give a FILE")
    made = import_module("atoll.master.backup").backup(Path(config), file)
    click.echo(f"The cluster {made['cluster']} as of revision {made['revision']} is in {file}.", err=file == "-")
    click.echo("To restore it you also need /etc/atoll/master.key: keep a copy of that elsewhere.", err=True)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--master-key", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="The master key of the day of the backup.")
@click.option("--node", default="", metavar="NAME", help="This node's name (default: as configured, or the old master's).")
@click.option("--address", default="", metavar="IP", help="Where other nodes reach this one.")
@_dead_option
@force_option
@_dry_option
@config_option
def restore(
    file: str, master_key: str | None, node: str, address: str, dead: tuple[str, ...], force: bool, dry_run: bool, config: str
) -> None:
    """Make this machine the master, with a backup. Guests go on."""
    _ask(dead, force or dry_run)
    if not dry_run:
        confirm("Replace the store of this machine by an older one? What was done since the backup is lost.", force)
    key = Path(master_key) if master_key else None
    work = import_module("atoll.master.backup").restore
    _tell(work(Path(config), Path(file), dead, master_key=key, node=node, address=address, dry_run=dry_run), dry_run)


@click.command("master-failover")
@_dead_option
@force_option
@_dry_option
@config_option
def master_failover(dead: tuple[str, ...], force: bool, dry_run: bool, config: str) -> None:
    """Make this master candidate the master, with its copy of the store. Guests go on.

    It is refused while the old master leads. If its node cannot be asked: --node-is-dead NODE.
    """
    _ask(dead, force or dry_run)
    began = time.monotonic()
    _tell(import_module("atoll.master.failover").failover(Path(config), dead, dry_run), dry_run)
    if not dry_run:
        click.echo(f"It took {time.monotonic() - began:.1f} s.", err=True)


def _ask(dead: tuple[str, ...], sure: bool) -> None:
    if dead:
        confirm(f"Are you sure that {' and '.join(dead)} {'is' if len(dead) == 1 else 'are'} off? If not, disks may be destroyed.", sure)


def _tell(lines: list[str], dry_run: bool) -> None:
    for line in lines:
        click.echo(line)
    if dry_run:
        click.echo("Nothing was changed.")
        return
    started = any(line.startswith("started") for line in lines)
    click.echo("This node is the master now." if started else "This node is to be the master now.")
    first = "" if started else "start atoll-master and atoll-agent, then "
    click.echo(f"Next: {first}atoll node list; atoll cluster verify", err=True)


COMMANDS = (backup, restore, master_failover)
