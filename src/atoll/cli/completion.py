"""``atoll completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAMS = ("atoll", "gnt-backup", "gnt-cluster", "gnt-node", "gnt-group", "gnt-instance", "gnt-job", "gnt-os", "gnt-storage")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--program", type=click.Choice(PROGRAMS), default="atoll", show_default=True, help="The command to complete.")
def completion(shell: str, program: str) -> None:
    """Print a completion script: eval "$(atoll completion bash)".

    It completes commands, options and the names of the cluster's objects.
    """
    found = get_completion_class(shell)
    assert found is not None
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    # Only ``source`` is used, which asks nothing of the command itself.
    click.echo(found(click.Group(program), {}, program, variable).source())
