#!/usr/bin/env python3
"""Writes a manual page for each command: ``scripts/gen_man.py DIRECTORY``. Read one with ``man -l build/man/atoll-instance-add.1``."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

from atoll import __version__
from atoll.cli import ganeti
from atoll.cli.main import atoll

COMMANDS: dict[str, click.Command] = {"atoll": atoll, **{f"gnt-{noun}": make() for noun, make in ganeti.PROGRAMS.items()}}


def whole(command: click.Command, context: click.Context) -> click.Command:
    """With all its commands imported: pages are made of those that are there. Groups need a help text."""
    command.help = (command.help or command.short_help or "").replace("\b\n", "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            command.commands[name] = whole(found, context)
    return command


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        write_man_pages(name, whole(command, click.Context(command)), version=__version__, target_dir=str(directory))
    print(f"{len(list(directory.glob('*.1')))} manual pages in {directory}")


if __name__ == "__main__":
    main()
