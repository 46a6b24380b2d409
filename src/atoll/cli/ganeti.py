"""Ganeti's programs, ``gnt-backup`` to ``gnt-storage``: our commands with Ganeti's verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from atoll import __version__
from atoll.cli import tags, work
from atoll.cli.client import Client, path_of
from atoll.cli.ganeti_fields import STORAGE, TABLES
from atoll.cli.lazy import OrderedGroup
from atoll.cli.main import run
from atoll.cli.options import (
    by_driver,
    confirm,
    drain_option,
    force_option,
    io_may_stop_option,
    job_options,
    output_options,
    storage_option,
    style,
    target,
)
from atoll.cli.output import Row, print_rows
from atoll.cli.reads import named
from atoll.cli.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def _program(noun: str, source: click.Group, aliases: dict[str, str], *, without: tuple[str, ...] = ()) -> click.Group:
    """A group with the commands of ours, and aliases: Ganeti's verb -> ours."""

    @click.group(f"gnt-{noun}", cls=OrderedGroup, help=source.help, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--socket", metavar="PATH", help="The master's Unix socket (or ATOLL_SOCKET).")
    @click.version_option(__version__, prog_name=f"gnt-{noun}")
    @click.pass_context
    def program(ctx: click.Context, socket: str | None) -> None:
        ctx.obj = Settings(socket=socket)

    for name, command in source.commands.items():
        if name not in (*without, "tag", "untag"):
            program.add_command(command, name)
    for theirs, ours in aliases.items():
        program.add_command(source.commands[ours], theirs)
    if noun in ("cluster", "node", "group", "instance"):
        tags.ganetis(program, noun)
    return program


def _list(noun: str) -> click.Command:
    @click.command("list", help=f"All {noun}s, or the named ones, with Ganeti's fields.")
    @target(noun, nargs=-1)
    @output_options
    def command(targets: tuple[str, ...], **options: Any) -> None:
        rows = Client().all(noun)
        if noun == "job":
            rows = rows[::-1]
        print_rows(named(rows, targets, noun), TABLES[noun], style(**options))

    return command


def _list_fields(noun: str) -> click.Command:
    @click.command("list-fields", help="The fields that list -o knows.")
    def command() -> None:
        for name, column in TABLES[noun].columns.items():
            click.echo(f"{name:<16} {column.title}")

    return command


# --- gnt-instance ---


def _instance() -> click.Group:
    from atoll.cli.instance import instance as ours

    program = _program("instance", ours, {"startup": "start", "shutdown": "stop", "recreate-disks": "recreate"}, without=("list",))
    program.add_command(_list("instance"))
    program.add_command(_list_fields("instance"))
    return program


# --- gnt-node ---


def _yes_no(name: str, short: str, about: str) -> Callable[[F], F]:
    return click.option(short, f"--{name}", type=click.Choice(["yes", "no"]), help=about)


def _node() -> click.Group:
    from atoll.cli import node as ours

    program = _program("node", ours.node, {}, without=("list", "modify"))
    program.add_command(_list("node"))
    program.add_command(_list_fields("node"))

    @program.command()
    @target("node")
    @_yes_no("offline", "-O", "Nothing is asked of an offline node.")
    @_yes_no("drained", "-D", "A drained node gets nothing new.")
    @drain_option
    @io_may_stop_option
    @storage_option
    @job_options
    def modify(
        target: str,
        offline: str | None,
        drained: str | None,
        drain: bool,
        io_may_stop: bool,
        storage_texts: tuple[str, ...],
        **options: Any,
    ) -> None:
        """Set a node offline or drained, change its options for storage clusters, or take it out of its storage cluster."""
        said = [None if word is None else word == "yes" for word in (offline, drained)]
        ours.change(target, said[0], said[1], None, storage_texts, options, io_may_stop, drain)

    @program.command("list-storage")
    @target("node", nargs=-1)
    @click.option("-t", "--storage-type", "driver", metavar="DRIVER", help="Pools of this driver only.")
    @output_options
    def list_storage(targets: tuple[str, ...], driver: str | None, **options: Any) -> None:
        """The pools that nodes reach, with their space; shared space is that of the pool, the same on every node."""
        client = Client()
        nodes = named(client.all("node"), targets, "node")
        pools = [pool for pool in client.all("pool") if driver in (None, pool["driver"])]
        rows = [_storage(node, pool) for node in nodes for pool in pools if node["group"] in pool["groups"]]
        print_rows(rows, STORAGE, style(**options))

    return program


def _storage(node: Row, pool: Row) -> Row:
    local = pool["capabilities"]["node_local"]
    space = pool["space_on"].get(node["name"], {}) if local else pool
    total, free = space.get("total"), space.get("free")
    return {
        "node": node["name"],
        "type": pool["driver"],
        "name": pool["name"],
        "size": total,
        "used": None if total is None or free is None else total - free,
        "free": free,
        "allocatable": "Y" if pool["state"] == "ready" else "N",
    }


# --- gnt-cluster ---


_PARAMETERS = "Defaults of new pools; and how disks are attached, such as rbd:access=kernelspace."


def _cluster() -> click.Group:
    from atoll.cli.cluster import cluster as ours

    program = _program("cluster", ours, {}, without=("modify",))

    @program.command()
    @click.option("--shared-file-storage-dir", metavar="DIR", help="Where new sharedfile pools keep their images.")
    @click.option("--file-storage-dir", metavar="DIR", help="Where new file pools keep their images.")
    @click.option("-D", "--disk-parameters", "texts", multiple=True, metavar="DRIVER:KEY=VALUE,...", help=_PARAMETERS)
    @click.option("--hypervisor", type=click.Choice(["qemu", "fake"]), help="For new instances.")
    @storage_option
    @job_options
    def modify(
        shared_file_storage_dir: str | None,
        file_storage_dir: str | None,
        texts: tuple[str, ...],
        hypervisor: str | None,
        storage_texts: tuple[str, ...],
        **options: Any,
    ) -> None:
        """Change the cluster's defaults."""
        found, storage = by_driver(texts, "-D"), by_driver(storage_texts, "-S")
        for driver, path in (("sharedfile", shared_file_storage_dir), ("file", file_storage_dir)):
            if path is not None:
                found.setdefault(driver, {})["path"] = path
        if not found and not storage and hypervisor is None:
            raise click.UsageError("nothing to change is given")
        body = {"hypervisor": hypervisor, "driver_options": found or None, "storage_options": storage or None}
        work.run("cluster", "modify", body=body, **options)

    @program.command("renew-crypto")
    @click.option("--new-cluster-certificate", "ca", is_flag=True, help="Change the CA, and with it every certificate.")
    @click.option("--new-node-certificates", "nodes", is_flag=True, help="New certificates by the same CA.")
    @job_options
    def renew_crypto(ca: bool, nodes: bool, **options: Any) -> None:
        """Renew the certificates. Nothing is stopped for it."""
        if not ca and not nodes:
            raise click.UsageError("say what: --new-cluster-certificate or --new-node-certificates")
        work.run("cluster", "rotate-ca" if ca else "renew-certificates", body={}, **options)

    @program.command()
    def version() -> None:
        """The version of this program."""
        click.echo(f"Atoll {__version__}")

    return program


# --- gnt-group, gnt-job, gnt-storage ---


def _group() -> click.Group:
    from atoll.cli.group import group as ours

    program = _program("group", ours, {}, without=("list",))
    program.add_command(_list("group"))
    program.add_command(_list_fields("group"))
    return program


def _job() -> click.Group:
    from atoll.cli.job import job as ours

    program = _program("job", ours, {"wait": "watch"}, without=("list", "cancel"))
    program.add_command(_list("job"))
    program.add_command(_list_fields("job"))

    @program.command()
    @target("job", nargs=-1, required=True)
    @force_option
    def cancel(targets: tuple[str, ...], force: bool) -> None:
        """Stop jobs; what they have done is undone."""
        confirm(f"Cancel {', '.join(targets)}?", force)
        client = Client()
        for number in targets:
            client.send("POST", path_of("job", number, "cancel"))
            click.echo(f"Job {number} is being cancelled.")

    return program


def _storage_program() -> click.Group:
    from atoll.cli.pool import pool as ours
    from atoll.cli.storage import add_disks, init, remove_disks, replace_node

    program = _program("storage", ours, {"diagnose": "list"})
    program.add_command(init, "init-distributed-storage")
    for command in (replace_node, add_disks, remove_disks):
        program.add_command(command)
    return program


def _os() -> click.Group:
    from atoll.cli.os import os as ours

    return _program("os", ours, {})


def _backup() -> click.Group:
    from atoll.cli.backup import backup as ours

    return _program("backup", ours, {})


def backup() -> NoReturn:
    """``gnt-backup``."""
    run(_backup(), "gnt-backup")


def cluster() -> NoReturn:
    """``gnt-cluster``."""
    run(_cluster(), "gnt-cluster")


def node() -> NoReturn:
    """``gnt-node``."""
    run(_node(), "gnt-node")


def group() -> NoReturn:
    """``gnt-group``."""
    run(_group(), "gnt-group")


def instance() -> NoReturn:
    """``gnt-instance``."""
    run(_instance(), "gnt-instance")


def job() -> NoReturn:
    """``gnt-job``."""
    run(_job(), "gnt-job")


def storage() -> NoReturn:
    """``gnt-storage``."""
    run(_storage_program(), "gnt-storage")


def os() -> NoReturn:
    """``gnt-os``."""
    run(_os(), "gnt-os")


PROGRAMS = {
    "backup": _backup,
    "cluster": _cluster,
    "node": _node,
    "group": _group,
    "instance": _instance,
    "job": _job,
    "os": _os,
    "storage": _storage_program,
}
