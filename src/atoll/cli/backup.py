"""``atoll instance export`` and ``import``, and Ganeti's ``gnt-backup``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import work
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import complete, file_of_node, job_options, target

#: Where operators may have exports, on every node.
EXPORTS = "/var/lib/atoll/exports"
_shutdown = click.option("--shutdown", is_flag=True, help="Stop it for the export if it runs, and start it again.")
_timeout = click.option(
    "--timeout", type=click.FloatRange(0, 3600), default=120.0, show_default=True, help="Seconds to stop it before force; 0 = at once."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
_template = click.option(
    "-t", "--disk-template", "template", metavar="POOL", help="Where its disks shall be; default: in pools of the same names as before."
)
_no_start = click.option("--no-start", is_flag=True, help="Do not start it.")


@click.command("export")
@target("instance")
@click.argument("place", metavar="[NODE:]PATH")
@_overwrite
@_shutdown
@_timeout
@job_options
def export(target: str, place: str, overwrite: bool, shutdown: bool, timeout: float, **options: Any) -> None:
    """Write a stopped instance with its disks into one file, on a node that reaches them.

    Example: atoll instance export web1 node1:/var/lib/atoll/exports/web1.atoll
    """
    body = {**file_of_node(place), "overwrite": overwrite, "shutdown": shutdown, "timeout": timeout}
    work.run("instance", "export", target, body, **options)


@click.command("import")
@click.argument("name")
@click.argument("place", metavar="[NODE:]PATH")
@_template
@_no_start
@job_options
def import_(name: str, place: str, template: str | None, no_start: bool, **options: Any) -> None:
    """Make the instance NAME from the file of an export, and start it."""
    body = {"name": name, **file_of_node(place), "template": template, "start": not no_start}
    work.run("instance", "import", body=body, **options)


COMMANDS: tuple[click.Command, ...] = (export, import_)


@click.group(cls=OrderedGroup)
def backup() -> None:
    """Exports of instances: one file each."""


@backup.command("export")
@click.option("-n", "--node", metavar="NODE", required=True, help="On this node.", shell_complete=complete("node"))
@click.option("--noshutdown", is_flag=True, help="Do not stop it: then it must be stopped already.")
@click.option("--shutdown-timeout", "timeout", type=click.FloatRange(0, 3600), default=120.0, help="Seconds before force.")
@target("instance")
@job_options
def ganeti_export(node: str, noshutdown: bool, timeout: float, target: str, **options: Any) -> None:
    """Write an instance into /var/lib/atoll/exports/INSTANCE.atoll of a node; an earlier export of it there is replaced."""
    place = {"node": node, "path": f"{EXPORTS}/{target}.atoll", "overwrite": True}
    work.run("instance", "export", target, {**place, "shutdown": not noshutdown, "timeout": timeout}, **options)


@backup.command("import")
@click.option("--src-node", metavar="NODE", help="The node that has the export; default: -n.", shell_complete=complete("node"))
@click.option("--src-dir", "directory", metavar="DIR", default=EXPORTS, show_default=True, help="Where on it.")
@click.option("-n", "--node", metavar="NODE", help="The same node: disks are made where the export is.", shell_complete=complete("node"))
@_template
@_no_start
@click.argument("name")
@job_options
def ganeti_import(
    src_node: str | None, directory: str, node: str | None, template: str | None, no_start: bool, name: str, **options: Any
) -> None:
    """Make an instance from DIR/NAME.atoll of a node."""
    chosen = src_node or node
    if not chosen or (node and node != chosen):
        raise click.UsageError("--src-node says where the export is, and -n can only be the same node")
    body = {"name": name, "node": chosen, "path": f"{directory.rstrip('/')}/{name}.atoll", "template": template, "start": not no_start}
    work.run("instance", "import", body=body, **options)
