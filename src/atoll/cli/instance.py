"""``atoll instance``: make, start, stop, change, remove. Moving is in movement.py, disks are in disks.py."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import backup, disks, movement, work
from atoll.cli import tags as tagging
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import (
    backend,
    complete,
    confirm,
    disk_spec,
    force_option,
    hypervisor,
    image_options,
    image_source,
    job_options,
    nic_spec,
    numbered,
    on_node,
    target,
    unasked_option,
)
from atoll.cli.os import parameters as os_parameters
from atoll.cli.reads import info_command, list_command
from atoll.cli.seed import seed_of, seed_options
from atoll.model.errors import InvalidInput
from atoll.model.units import parse_size


@click.group(cls=OrderedGroup)
def instance() -> None:
    """Virtual machines."""


def _machine_options(function: Any) -> Any:
    for option in reversed(
        [
            click.option(
                "-B", "--backend-parameters", "backend_text", metavar="maxmem=SIZE,vcpus=N", help="Memory (MiB without unit) and CPUs."
            ),
            click.option(
                "-H", "--hypervisor-parameters", "hypervisor_text", metavar="KEY=VALUE,...", help="kernel_path, initrd_path, kernel_args."
            ),
            click.option("--kernel", metavar="PATH", help="Boot this kernel of the node directly."),
            click.option("--initrd", metavar="PATH"),
            click.option("--append", metavar="TEXT", help="The kernel's command line."),
            click.option("--net", "nets", multiple=True, metavar="N:mode=,link=,mac=", help="A network card: mode user or bridged."),
        ]
    ):
        function = option(function)
    return function


def _os_options(function: Any) -> Any:
    for option in reversed(
        [
            click.option("-O", "--os-parameters", "os_texts", multiple=True, metavar="NAME=VALUE,...", help="For the scripts of -o."),
            click.option(
                "--os-timeout", type=click.FloatRange(1, 82800), default=3600.0, show_default=True, help="Seconds that a script may take."
            ),
        ]
    ):
        function = option(function)
    return function


instance.add_command(list_command("instance"))
instance.add_command(info_command("instance"))


@instance.command()
@click.argument("name")
@click.option("-t", "--disk-template", "template", metavar="POOL", help="POOL, DRIVER:POOL, or DRIVER for the group's pool of it.")
@click.option(
    "--disk", "disk_texts", multiple=True, metavar="N:size=,pool=,...", help="A disk: size, pool, image, adopt, mode, name, driver options."
)
@click.option("-s", "--os-size", "size", metavar="SIZE", help="The size of its only disk.")
@image_options
@click.option("-n", "--node", metavar="NODE[:SECONDARY]", help="Where; default: the best place.", shell_complete=complete("node"))
@click.option("-g", "--node-group", "group", metavar="GROUP", help="In which group.", shell_complete=complete("group"))
@click.option("-o", "--os-type", "os", default="", metavar="OS[+VARIANT]", help="Install it with this OS definition of the node.")
@_os_options
@click.option("--no-install", is_flag=True, help="Run no scripts: -o is a note of what is installed.")
@_machine_options
@seed_options
@click.option("--tags", metavar="TAGS", help="Tags, with commas.")
@click.option("--no-start", is_flag=True, help="Do not start it.")
@job_options
def add(
    name: str,
    template: str | None,
    disk_texts: tuple[str, ...],
    size: str | None,
    image: str | None,
    image_format: str | None,
    node: str | None,
    group: str | None,
    os: str,
    os_texts: tuple[str, ...],
    os_timeout: float,
    no_install: bool,
    backend_text: str | None,
    hypervisor_text: str | None,
    kernel: str | None,
    initrd: str | None,
    append: str | None,
    nets: tuple[str, ...],
    tags: str | None,
    no_start: bool,
    **options: Any,
) -> None:
    """Make an instance and start it.

    Example: atoll instance add web1 -t sharedfile --disk 0:size=10G -B maxmem=1G,vcpus=2
    """
    chosen = _disks(size, disk_texts, image, image_format)
    primary, _, secondary = (node or "").partition(":")
    body = {
        "name": name,
        "template": template if template != "diskless" else None,
        "disks": chosen,
        "nics": [nic_spec(words) for words in numbered(nets, "--net")],
        "node": primary or None,
        "secondary": secondary or None,
        "group": group,
        "os": os,
        "os_parameters": os_parameters(os_texts),
        "os_timeout": os_timeout,
        "no_install": no_install,
        "cloud_init": seed_of(options),
        "start": not no_start,
        "tags": tags.split(",") if tags else [],
        **backend(backend_text),
        **hypervisor(hypervisor_text, kernel, initrd, append),
    }
    work.run("instance", "add", body=body, **options)


def _disks(size: str | None, texts: tuple[str, ...], image: str | None, image_format: str | None) -> list[dict[str, Any]]:
    """The disks of a new instance; ``--image`` fills the first one, whose size may then be left away."""
    if size and texts:
        raise InvalidInput("-s and --disk exclude each other", hint="--disk 0:size=10G")
    if not image:
        return [{"size": parse_size(size, default_unit="m")}] if size else [disk_spec(words) for words in numbered(texts, "--disk")]
    source = image_source(image, image_format)
    if size or not texts:
        return [{"size": parse_size(size, default_unit="m") if size else None, "image": source}]
    first, *more = numbered(texts, "--disk")
    if "image" in first or "adopt" in first:
        raise InvalidInput("disk 0 cannot be made from two images", hint="leave --image away, or image= and adopt= of --disk 0")
    filled = {**disk_spec({"size": "1M", **first}), "image": source}
    if "size" not in first:
        del filled["size"]
    return [filled, *(disk_spec(words) for words in more)]


@instance.command()
@target("instance", nargs=-1, required=True)
@on_node("On this node, where all its disks can be reached.")
@click.option("--node-is-dead", is_flag=True, help="Your word that the node where it was is off, for this moment.")
@job_options
def start(targets: tuple[str, ...], node: str | None, node_is_dead: bool, **options: Any) -> None:
    """Start instances."""
    work.run_many("instance", "start", targets, {"node": node, "node_is_dead": node_is_dead}, **options)


@instance.command()
@target("instance", nargs=-1, required=True)
@click.option("--timeout", type=click.FloatRange(0, 3600), default=120.0, show_default=True, help="Seconds before force; 0 = at once.")
@job_options
def stop(targets: tuple[str, ...], timeout: float, **options: Any) -> None:
    """Stop instances: ask by ACPI, after the timeout end them."""
    work.run_many("instance", "stop", targets, {"timeout": timeout}, **options)


@instance.command()
@target("instance", nargs=-1, required=True)
@job_options
def resume(targets: tuple[str, ...], **options: Any) -> None:
    """Let instances go on that their storage stopped: what failed is tried again, and nothing is lost."""
    work.run_many("instance", "resume", targets, {}, **options)


@instance.command()
@target("instance", nargs=-1, required=True)
@click.option("-t", "--type", type=click.Choice(["soft", "hard", "full"]), default="hard", show_default=True)
@job_options
def reboot(targets: tuple[str, ...], type: str, **options: Any) -> None:
    """soft asks the guest, hard resets it, full stops it and starts it with its present parameters."""
    work.run_many("instance", "reboot", targets, {"type": type}, **options)


for _command in (movement.migrate, movement.failover, movement.move):
    instance.add_command(_command)


@instance.command()
@target("instance")
@_machine_options
@click.option("-o", "--os-type", "os", metavar="OS", help="A note of what is installed.")
@click.option("--disk", "disk_texts", multiple=True, metavar="add:size=... | N:remove | N:detach", help="Ganeti's way to change disks.")
@job_options
def modify(
    target: str,
    backend_text: str | None,
    hypervisor_text: str | None,
    kernel: str | None,
    initrd: str | None,
    append: str | None,
    nets: tuple[str, ...],
    os: str | None,
    disk_texts: tuple[str, ...],
    **options: Any,
) -> None:
    """Change parameters; they take effect at the next start. Disks are changed at once."""
    body: dict[str, Any] = {**backend(backend_text), **hypervisor(hypervisor_text, kernel, initrd, append)}
    if os is not None:
        body["os"] = os
    if nets:
        body["nics"] = [] if nets == ("none",) else [nic_spec(words) for words in numbered(nets, "--net")]
    orders = [disks.ganeti_order(text) for text in disk_texts]
    if not body and not orders:
        raise InvalidInput("nothing to change is given", hint="atoll instance modify --help")
    if body:
        work.run("instance", "modify", target, body, **options)
    for order in orders:
        verb, parameters = disks.resolved(target, *order)
        work.run("instance", verb, target, parameters, **options)


@instance.command()
@target("instance")
@click.argument("new_name")
@click.option("--no-script", is_flag=True, help="Do not run the rename script of its OS definition.")
@unasked_option
@job_options
def rename(target: str, new_name: str, no_script: bool, **options: Any) -> None:
    """Give an instance another name. The scripts that have installed it tell the guest."""
    work.run("instance", "rename", target, {"new_name": new_name, "run_script": not no_script}, **options)


@instance.command()
@target("instance")
@click.option("-o", "--os-type", "os", metavar="OS[+VARIANT]", help="Another OS definition; default: the one that it has.")
@_os_options
@force_option
@job_options
def reinstall(target: str, os: str | None, os_texts: tuple[str, ...], os_timeout: float, force: bool, **options: Any) -> None:
    """Install a stopped instance anew, with the scripts of an OS definition."""
    confirm(f"Reinstall the instance {target}? All data on its disks is lost.", force or options["dry_run"])
    body = {"os": os, "os_parameters": os_parameters(os_texts), "os_timeout": os_timeout}
    work.run("instance", "reinstall", target, body, **options)


tagging.ours(instance, "instance")


@instance.command()
@target("instance")
@click.option("--keep-disks", is_flag=True, help="Leave its disks as volumes.")
@click.option("--timeout", type=click.FloatRange(0, 3600), default=30.0, show_default=True, help="Seconds to stop it; 0 = at once.")
@force_option
@job_options
def remove(target: str, keep_disks: bool, timeout: float, force: bool, **options: Any) -> None:
    """Stop an instance and remove it with its disks."""
    what = "its disks stay as volumes" if keep_disks else "all data on its disks is lost"
    confirm(f"Remove the instance {target}? {what[0].upper()}{what[1:]}.", force or options["dry_run"])
    work.run("instance", "remove", target, {"keep_disks": keep_disks, "timeout": timeout}, **options)


for _command in (*disks.COMMANDS, *backup.COMMANDS):
    instance.add_command(_command)


@instance.command()
@target("instance")
def console(target: str) -> None:
    """Its serial console, on the node where it runs. Ctrl-] leaves."""
    from atoll.cli.console import console as attach

    attach(target)
