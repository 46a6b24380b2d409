"""The disks of an instance: grow, add, attach, detach, remove, activate, recreate."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli import work
from atoll.cli.client import Client, path_of
from atoll.cli.options import (
    complete,
    confirm,
    disk_spec,
    force_option,
    image_options,
    image_source,
    job_options,
    numbered,
    on_node,
    pairs,
    split_words,
    target,
    whole,
)
from atoll.cli.volume import growth
from atoll.model.errors import InvalidInput
from atoll.model.units import parse_size

_timeout = click.option(
    "--timeout", type=click.FloatRange(1, 600), default=20.0, show_default=True, help="Seconds for the guest to let go."
)


@click.command("grow-disk")
@target("instance")
@click.argument("index", type=click.IntRange(0, 63))
@click.argument("amount")
@click.option("--absolute", is_flag=True, help="AMOUNT is the new size, not what is added.")
@job_options
def grow_disk(target: str, index: int, amount: str, absolute: bool, **options: Any) -> None:
    """Grow disk INDEX by AMOUNT, such as 5G; a running guest sees it at once."""
    work.run("instance", "grow-disk", target, {"index": index, **growth(amount, absolute)}, **options)


@click.command("add-disk")
@target("instance")
@click.option("--disk", "disk_text", metavar="size=,pool=,...", help="All in one, as in instance add.")
@click.option("-s", "--size", metavar="SIZE", help="Such as 10G; without a unit MiB.")
@click.option("-p", "--pool", metavar="POOL", help="Its pool; default: that of the other disks.", shell_complete=complete("pool"))
@click.option("-t", "--disk-template", "template", metavar="POOL", help="POOL, DRIVER:POOL or DRIVER.")
@image_options
@click.option("--adopt", metavar="IMAGE", help="Take this existing image of the pool.")
@click.option("--name", metavar="NAME", help="The volume's name.")
@click.option("--mode", type=click.Choice(["rw", "ro"]), default="rw", show_default=True)
@click.option("-O", "--option", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the driver.")
@job_options
def add_disk(
    target: str,
    disk_text: str | None,
    size: str | None,
    pool: str | None,
    template: str | None,
    image: str | None,
    image_format: str | None,
    adopt: str | None,
    name: str | None,
    mode: str,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Make a volume and plug it, also into a running guest."""
    if disk_text:
        disk = disk_spec(numbered((disk_text,), "--disk")[0])
    else:
        if not size and not adopt and not image:
            raise InvalidInput("neither a size nor an image is given", hint="-s 10G")
        source = image_source(image, image_format) if image else None
        known = {"pool": pool, "adopt": adopt, "image": source, "name": name, "options": pairs(settings, "-O") or None}
        disk = {"mode": mode, **{k: v for k, v in known.items() if v is not None}}
        if size:
            disk["size"] = parse_size(size, default_unit="m")
    work.run("instance", "add-disk", target, {"disk": disk, "template": template}, **options)


@click.command("attach-disk")
@target("instance")
@click.argument("volume", shell_complete=complete("volume"))
@click.option("--mode", type=click.Choice(["rw", "ro"]), default="rw", show_default=True)
@job_options
def attach_disk(target: str, volume: str, mode: str, **options: Any) -> None:
    """Plug an existing volume, also into a running guest."""
    work.run("instance", "attach-disk", target, {"volume": volume, "mode": mode}, **options)


def _which(text: str) -> dict[str, Any]:
    """A disk by index, or by its volume's name or id."""
    return {"index": int(text)} if text.isdigit() else {"volume": text}


@click.command("detach-disk")
@target("instance")
@click.argument("disk", metavar="INDEX|VOLUME")
@_timeout
@job_options
def detach_disk(target: str, disk: str, timeout: float, **options: Any) -> None:
    """Unplug a disk; its volume stays."""
    work.run("instance", "detach-disk", target, {**_which(disk), "timeout": timeout}, **options)


@click.command("remove-disk")
@target("instance")
@click.argument("disk", metavar="INDEX|VOLUME")
@_timeout
@force_option
@job_options
def remove_disk(target: str, disk: str, timeout: float, force: bool, **options: Any) -> None:
    """Unplug a disk and delete its volume."""
    confirm(f"Remove disk {disk} of {target} and all its data?", force or options["dry_run"])
    work.run("instance", "remove-disk", target, {**_which(disk), "timeout": timeout}, **options)


@click.command("activate-disks")
@target("instance")
@on_node("On this node; default: where it ran last.")
@job_options
def activate_disks(target: str, node: str | None, **options: Any) -> None:
    """Make the disks of a stopped instance usable on a node, and print their paths."""
    work.run("instance", "activate-disks", target, {"node": node}, **options)


@click.command("deactivate-disks")
@target("instance")
@on_node("On this node; default: where they are active.")
@job_options
def deactivate_disks(target: str, node: str | None, **options: Any) -> None:
    """End what activate-disks did."""
    work.run("instance", "deactivate-disks", target, {"node": node}, **options)


@click.command()
@target("instance")
@click.option("--disk", "indexes", type=click.IntRange(0, 63), multiple=True, metavar="INDEX", help="Only this disk.")
@job_options
def recreate(target: str, indexes: tuple[int, ...], **options: Any) -> None:
    """Make missing images of its disks again, empty; those that exist are left alone."""
    work.run("instance", "recreate", target, {"disks": list(indexes)}, **options)


COMMANDS: tuple[click.Command, ...] = (
    grow_disk,
    add_disk,
    attach_disk,
    detach_disk,
    remove_disk,
    activate_disks,
    deactivate_disks,
    recreate,
)


# --- Ganeti's modify --disk ---


def ganeti_order(text: str) -> tuple[str, int | None, dict[str, str]]:
    """``add:size=1G``, ``N:add,size=1G``, ``attach:name=v``, ``N:remove``, ``detach``: verb, index and words. Errors: InvalidInput."""
    head, _, rest = text.partition(":")
    if head in ("add", "attach", "detach", "remove"):
        return head, None, split_words(rest, "--disk") if rest else {}
    verb, _, words = rest.partition(",")
    if head.lstrip("-").isdigit() and verb in ("add", "attach", "detach", "remove"):
        index = whole(head, "--disk")
        return verb, None if index < 0 else index, split_words(words, "--disk") if words else {}
    raise InvalidInput(
        f"--disk: {text!r} is not understood", hint="--disk add:size=10G, --disk attach:name=VOLUME, --disk N:remove or N:detach"
    )


def resolved(instance: str, verb: str, index: int | None, words: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The operation and request of such an order; no index means the last disk, as in Ganeti."""
    if verb == "add":
        return "add-disk", {"disk": disk_spec(words)}
    if verb == "attach":
        volume = words.get("name") or words.get("uuid")
        if not volume:
            raise InvalidInput("--disk attach: no volume is named", hint="--disk attach:name=VOLUME")
        return "attach-disk", {"volume": volume}
    if index is None:
        count = len(Client().get(path_of("instance", instance))["disks"])
        if not count:
            raise InvalidInput(f"{instance} has no disks")
        index = count - 1
    return f"{verb}-disk", {"index": index}
