"""``atoll``: the command, its groups and how errors are told."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from atoll import __version__
from atoll.cli.lazy import LazyGroup
from atoll.cli.settings import Settings
from atoll.model.errors import AtollError

GROUPS = {
    "cluster": ("atoll.cli.cluster:cluster", "Make a cluster, look at it, change its defaults."),
    "node": ("atoll.cli.node:node", "Add nodes, empty them, say that one is dead."),
    "group": ("atoll.cli.group:group", "Node groups: nodes that share storage."),
    "pool": ("atoll.cli.pool:pool", "Storage pools: where volumes live."),
    "storage": ("atoll.cli.storage:storage", "Storage clusters that Atoll makes of nodes: make one, look at it."),
    "volume": ("atoll.cli.volume:volume", "Volumes: the disks."),
    "snapshot": ("atoll.cli.snapshot:snapshot", "Snapshots: what a volume held at one moment."),
    "instance": ("atoll.cli.instance:instance", "Virtual machines: make, start, migrate, fail over."),
    "os": ("atoll.cli.os:os", "OS definitions: scripts on the nodes that install instances."),
    "job": ("atoll.cli.job:job", "What the cluster does and did; what needs attention."),
    "doctor": ("atoll.cli.doctor:doctor", "Look at this machine: what would keep it from being a good node."),
    "lab": ("atoll.lab.commands:lab", "A whole cluster on this machine, for trying out."),
    "completion": ("atoll.cli.completion:completion", "Completion for your shell."),
}


@click.group(cls=LazyGroup, lazy=GROUPS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--socket", metavar="PATH", help="The master's Unix socket (or ATOLL_SOCKET; default /run/atoll/api.sock).")
@click.version_option(__version__, prog_name="atoll")
@click.pass_context
def atoll(ctx: click.Context, socket: str | None) -> None:
    """Shared storage for clusters of virtual machines.

    Commands talk to the master through its Unix socket (as root on a master), or over HTTPS: ATOLL_MASTER=https://HOST:7770,
    ATOLL_CA=FILE, ATOLL_TOKEN_FILE=FILE.
    """
    ctx.obj = Settings(socket=socket)


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command as a program: errors go to stderr as ``Error:`` and ``Next:``, and the exit code tells their kind."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        _tell(error.format_message(), f"{path} --help")
        code = error.exit_code
    except click.ClickException as error:
        _tell(error.format_message(), "")
        code = error.exit_code
    except AtollError as error:
        _tell(error.message, error.hint)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _tell(message: str, hint: str) -> None:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Next: {hint}", err=True)


def main() -> NoReturn:
    """The entry point."""
    run(atoll, "atoll")


if __name__ == "__main__":
    main()
