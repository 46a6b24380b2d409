"""``atoll group``."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import tags, work
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import by_driver, complete, disk_parameters_option, job_options, pairs, storage_option, target
from atoll.cli.reads import info_command, list_command

_pins = [
    click.option("--cpu-model", metavar="MODEL", help="The CPU that guests see, such as qemu64."),
    click.option("--accelerator", type=click.Choice(["tcg", "kvm"])),
    click.option("--machine", metavar="TYPE", help="QEMU's machine type, such as pc-q35-7.2."),
]


def _pin_options(function: Any) -> Any:
    for option in reversed(_pins):
        function = option(function)
    return function


@click.group(cls=OrderedGroup)
def group() -> None:
    """Node groups: nodes that share storage."""


group.add_command(list_command("group"))
group.add_command(info_command("group"))


@group.command()
@click.argument("name")
@_pin_options
@disk_parameters_option
@job_options
def add(
    name: str, cpu_model: str | None, accelerator: str | None, machine: str | None, parameter_texts: tuple[str, ...], **options: Any
) -> None:
    """Make a node group."""
    body: dict[str, Any] = {"name": name, "cpu_model": cpu_model, "accelerator": accelerator, "machine": machine}
    if parameter_texts:
        body["driver_options"] = by_driver(parameter_texts, "-D")
    work.run("group", "add", body=body, **options)


@group.command()
@target("group")
@_pin_options
@click.option("--default-pool", multiple=True, metavar="DRIVER=POOL", help="What -t DRIVER means here; an empty POOL removes it.")
@disk_parameters_option
@storage_option
@job_options
def modify(
    target: str,
    cpu_model: str | None,
    accelerator: str | None,
    machine: str | None,
    default_pool: tuple[str, ...],
    parameter_texts: tuple[str, ...],
    storage_texts: tuple[str, ...],
    **options: Any,
) -> None:
    """Change a group; new pins hold for instances made from then on, disk parameters from each next start or migration on."""
    body: dict[str, Any] = {"cpu_model": cpu_model, "accelerator": accelerator, "machine": machine}
    if default_pool:
        body["default_pools"] = pairs(default_pool, "--default-pool")
    if parameter_texts:
        body["driver_options"] = by_driver(parameter_texts, "-D")
    if storage_texts:
        body["storage_options"] = by_driver(storage_texts, "-S")
    work.run("group", "modify", target, body, **options)


@group.command()
@target("group")
@click.argument("new_name")
@job_options
def rename(target: str, new_name: str, **options: Any) -> None:
    """Give a group another name."""
    work.run("group", "rename", target, {"new_name": new_name}, **options)


@group.command("assign-nodes")
@target("group")
@click.argument("nodes", nargs=-1, required=True, shell_complete=complete("node"))
@job_options
def assign_nodes(target: str, nodes: tuple[str, ...], **options: Any) -> None:
    """Put nodes into a group."""
    work.run("group", "assign-nodes", target, {"nodes": list(nodes)}, **options)


@group.command()
@target("group")
@job_options
def remove(target: str, **options: Any) -> None:
    """Remove a group that has no nodes."""
    work.run("group", "remove", target, {}, **options)


tags.ours(group, "group")
