"""Our commands and Ganeti's, from the command line's own tree."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from atoll.cli.ganeti import PROGRAMS
from atoll.cli.ganeti_fields import TABLES
from atoll.cli.main import atoll
from refpages.markdown import cell, page, table


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below (and at) this one that is not a group."""
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from walk(inner, (*path, name))
    else:
        yield path, command


def usage(path: tuple[str, ...], command: click.Command) -> str:
    words = [*path]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = (parameter.metavar or str(parameter.name).upper()).removesuffix("...").strip("[]")
            word = word if parameter.required else f"[{word}]"
            words.append(word + "..." if parameter.nargs == -1 else word)
    return " ".join(words)


def options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


def spelled(option: click.Option) -> str:
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    if option.is_flag:
        return f"`{names}`"
    if isinstance(option.type, click.Choice):
        return f"`{names} {'|'.join(map(str, option.type.choices))}`"
    return f"`{names} {option.metavar or option.type.name.upper().split()[0]}`"


def commands() -> str:
    lines = [
        "`atoll --help` and `atoll NOUN VERB --help` say the same. Commands that make a job also know `--submit` (print the job's number",
        "and do not wait) and `--dry-run` (check only, change nothing). Most know `--format table|json|yaml`; lists also `--no-headers`,",
        "`--separator TEXT`, `-o FIELDS` (`+FIELDS` adds to the default ones) and `--units h|m|g|t`.",
        "",
        "Sizes have a unit, such as `10G`; without one they are MiB, as in Ganeti.",
        "",
    ]
    shared = {"--format", "--submit", "--dry-run", "--no-headers", "--separator", "--output", "--units"}
    noun = ""
    for path, command in walk(atoll, ("atoll",)):
        if path[1] != noun:
            noun = path[1]
            lines += [f"## {noun}", ""]
        lines += [f"### `{usage(path, command)}`", "", cell(inspect.cleandoc(command.help or "")), ""]
        rows = [(spelled(o), _about(o)) for o in options(command) if not shared & set(o.opts)]
        lines += table(("Option", "Meaning"), rows) if rows else []
    return page("Commands", *lines)


def _about(option: click.Option) -> str:
    text = option.help or ""
    if option.required:
        text += " Required."
    elif option.show_default and option.default not in (None, ()) and not callable(option.default):
        text += f" Default: {option.default}."
    return text.strip()


def ganeti() -> str:
    lines = [
        "`gnt-backup`, `gnt-cluster`, `gnt-node`, `gnt-group`, `gnt-instance`, `gnt-job`, `gnt-os` and `gnt-storage`",
        "are `atoll`'s commands with Ganeti's verbs,",
        "option names, list fields and status words. What is listed here works as in Ganeti, so that scripts go on; `atoll` remains the",
        "place where new things come first.",
        "",
        "## Where it differs",
        "",
        "- `gnt-instance failover` of an instance whose node is dead wants `--node-is-dead`: your word is the proof. There is no",
        "  `--ignore-consistency`, because nothing is ever inconsistent by a flag.",
        "- `-t ext:NAME`, `drbd`, `plain`, `rbd`, `gluster` and `blockdev` are not there yet. `file` and `sharedfile` are.",
        "- `-o OS` is a note of what is installed. There are no OS scripts yet; a guest boots from its disk or from `--kernel`.",
        "- Tags, jobs and `--submit` are as in Ganeti. Job numbers count from 1. There is no `gnt-backup`, `gnt-os` or `gnt-debug`.",
        "",
    ]
    for noun, make in PROGRAMS.items():
        program = f"gnt-{noun}"
        lines += [f"## {program}", ""]
        rows = []
        for path, command in walk(make(), (program,)):
            known = [n for o in options(command) for n in (*o.opts, *o.secondary_opts) if n not in ("--format", "--units")]
            rows.append((f"`{usage(path, command)}`", " ".join(f"`{n}`" for n in known)))
        lines += table(("Command", "Options"), rows)
        if noun in TABLES:
            lines += [f"Fields of `{program} list -o FIELDS`: {', '.join(f'`{n}`' for n in TABLES[noun].columns)}.", ""]
    return page("Ganeti's commands", *lines)
