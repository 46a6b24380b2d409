"""Options that many commands share, and the words inside Ganeti's options (``size=10G,pool=p``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from atoll.cli.output import Style
from atoll.cli.settings import local_config
from atoll.model.errors import AtollError, InvalidInput
from atoll.model.units import parse_size

F = TypeVar("F", bound=Callable[..., Any])
FORMATS = click.Choice(["table", "json", "yaml"])


def output_options(function: F) -> F:
    """``--format``, ``--no-headers``, ``--separator``, ``-o``, ``--units``; the command gets ``style``."""
    for option in reversed(
        [
            click.option("--format", "format", type=FORMATS, default="table", help="table (default), json or yaml."),
            click.option("--no-headers", is_flag=True, help="No line with titles."),
            click.option("--separator", metavar="TEXT", help="Between fields, instead of alignment."),
            click.option("-o", "--output", metavar="FIELDS", help="Fields, with commas; +FIELDS adds to the default ones."),
            click.option("--units", type=click.Choice(["h", "m", "g", "t"]), help="Sizes: h with units, m MiB, g GiB, t TiB."),
        ]
    ):
        function = option(function)
    return function


def style(
    format: str, no_headers: bool = False, separator: str | None = None, output: str | None = None, units: str | None = None
) -> Style:
    """The values of ``output_options`` as one thing."""
    return Style(format=format, headers=not no_headers, separator=separator, fields=output, units=units or "")


format_option = click.option("--format", "format", type=FORMATS, default="table", help="table (default), json or yaml.")


def job_options(function: F) -> F:
    """``--submit``, ``--dry-run``, ``--format`` of commands that make a job."""
    for option in reversed(
        [
            click.option("--submit", is_flag=True, help="Print the job's number; do not wait."),
            click.option("--dry-run", is_flag=True, help="Check only; change nothing."),
            format_option,
        ]
    ):
        function = option(function)
    return function


force_option = click.option("-f", "--force", is_flag=True, help="Do not ask.")
#: For commands that never ask, but whose Ganeti namesakes do: scripts give the option.
unasked_option = click.option("-f", "--force", is_flag=True, hidden=True, expose_value=False, help="Accepted for Ganeti's scripts.")


def confirm(question: str, force: bool) -> None:
    """Ask before something that cannot be taken back. Errors: InvalidInput where nobody can be asked."""
    if force:
        return
    if not sys.stdin.isatty():
        raise InvalidInput(f"{question} There is no terminal to ask on", hint="repeat with -f")
    click.confirm(question, abort=True, err=True)


# --- completion ---


def complete(noun: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Completion with the names of the cluster's objects; nothing where no master answers."""

    def names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from atoll.cli.client import Client

        field = "id" if noun == "job" else "name"
        try:
            rows = Client().get(f"/v1/{noun}s", {"fields": field}, timeout=2.0)["items"]
        except AtollError:
            return []
        return [CompletionItem(str(row[field])) for row in rows if str(row[field]).startswith(incomplete)]

    return names


def target(noun: str, **kwargs: Any) -> Callable[[F], F]:
    """The argument that names an object."""
    return click.argument(
        "target" if kwargs.get("nargs", 1) == 1 else "targets", metavar=noun.upper(), shell_complete=complete(noun), **kwargs
    )


def on_node(help: str, required: bool = False) -> Callable[[F], F]:
    """``-n NODE``."""
    return click.option("-n", "--node", metavar="NODE", required=required, help=help, shell_complete=complete("node"))


#: ``-S`` of cluster, group and node.
storage_option = click.option(
    "-S",
    "--storage-option",
    "storage_texts",
    multiple=True,
    metavar="TYPE:KEY=VALUE,...",
    help="How a storage cluster shall be made, such as ceph:disk=/dev/sdb:/dev/sdc; an empty value removes one.",
)


#: ``-D`` of ``group``; the cluster's sets defaults of new pools, too.
disk_parameters_option = click.option(
    "-D",
    "--disk-parameters",
    "parameter_texts",
    multiple=True,
    metavar="DRIVER:KEY=VALUE,...",
    help="How disks are attached from the next start or migration on, such as rbd:access=kernelspace; an empty value removes one.",
)


drain_option = click.option(
    "--drain",
    is_flag=True,
    help="Take its part out of its storage cluster for good: data moves to other nodes first, then its disks are erased.",
)
io_may_stop_option = click.option(
    "--io-may-stop",
    is_flag=True,
    help="With --offline yes: even if its storage cluster then stops serving guests.",
)


# --- words inside options ---


def split_words(text: str, option: str) -> dict[str, str]:
    """``a=1,b=2`` as a dict; ``\\,`` is a comma, a word without ``=`` has an empty value. Errors: InvalidInput."""
    words: dict[str, str] = {}
    for word in text.replace("\\,", "\0").split(","):
        name, _, value = word.replace("\0", ",").partition("=")
        if not name.strip():
            raise InvalidInput(f"{option}: {text!r} has an empty word", hint=f"{option} name=value,name=value")
        if name.strip() in words:
            raise InvalidInput(f"{option}: {name.strip()} is given twice")
        words[name.strip()] = value
    return words


def by_driver(texts: tuple[str, ...], option: str) -> dict[str, dict[str, str]]:
    """``DRIVER:KEY=VALUE,...``, repeated, as driver -> option -> value. Errors: UsageError."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        driver, colon, rest = text.partition(":")
        if not colon:
            raise click.UsageError(f"{option}: {text!r} is not of the form NAME:KEY=VALUE")
        found.setdefault(driver, {}).update(split_words(rest, option))
    return found


def pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """Repeated ``key=value`` as a dict. Errors: InvalidInput."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"{option}: {text!r} is not of the form key=value")
        found[name] = value
    return found


def numbered(texts: tuple[str, ...], option: str) -> list[dict[str, str]]:
    """Ganeti's ``N:a=1,b=2``, repeated; numbers must be 0, 1, 2... and may be left away. Errors: InvalidInput."""
    found: dict[int, dict[str, str]] = {}
    for text in texts:
        head, colon, rest = text.partition(":")
        if colon and head.isdigit():
            number, words = int(head), split_words(rest, option) if rest else {}
        else:
            number, words = len(found), split_words(text, option)
        if number in found:
            raise InvalidInput(f"{option}: number {number} is given twice")
        found[number] = words
    if sorted(found) != list(range(len(found))):
        raise InvalidInput(f"{option}: numbers must be 0, 1, 2 and so on; given: {', '.join(map(str, sorted(found)))}")
    return [found[number] for number in range(len(found))]


def image_source(text: str, image_format: str | None = None) -> dict[str, Any]:
    """An image as ``NODE:PATH``, or ``PATH`` on this very node. Errors: InvalidInput (this machine is no node)."""
    node, colon, path = text.partition(":")
    if not colon or "/" in node:
        node, path = str(local_config().get("node", "")), os.path.abspath(text)
        if not node:
            raise InvalidInput(f"this machine is no node of the cluster, so {text} is on none", hint=f"--image NODE:{path}")
    if not path.startswith("/"):
        raise InvalidInput(f"--image: {path!r} is not an absolute path on node {node}", hint=f"--image {node}:/var/lib/atoll/images/FILE")
    if path.startswith("//"):
        path = "/" + path.lstrip("/")
    return {"node": node, "path": os.path.normpath(path), "format": image_format}


def file_of_node(text: str) -> dict[str, str]:
    """A file as ``NODE:PATH``, or ``PATH`` on this very node. Errors: InvalidInput."""
    found = image_source(text)
    return {"node": found["node"], "path": found["path"]}


def image_options(function: F) -> F:
    """``--image`` and ``--image-format``; the command gets ``image`` and ``image_format``."""
    kinds = click.Choice(["raw", "qcow2"])
    for option in reversed(
        [
            click.option("--image", metavar="[NODE:]PATH", help="Fill it from this image: a file of this node, or of NODE."),
            click.option("--image-format", type=kinds, help="What the image is; default: its first bytes tell."),
        ]
    ):
        function = option(function)
    return function


def disk_spec(words: dict[str, str], option: str = "--disk") -> dict[str, Any]:
    """A DiskSpec from ``size=10G,pool=p,image=[NODE:]PATH,adopt=image,mode=ro,name=n``; other words are options of the driver."""
    rest = dict(words)
    spec: dict[str, Any] = {}
    if "size" in rest:
        spec["size"] = parse_size(rest.pop("size"), default_unit="m")
    for name in ("pool", "adopt", "name", "mode"):
        if name in rest:
            spec[name] = rest.pop(name)
    if "image" in rest:
        spec["image"] = image_source(rest.pop("image"), rest.pop("image-format", None))
    if not spec.keys() & {"size", "adopt", "image"}:
        raise InvalidInput(f"{option}: neither size, image nor adopt is given", hint=f"{option} 0:size=10G")
    bare = [name for name, value in rest.items() if not value]
    if bare:
        raise InvalidInput(f"{option}: {bare[0]!r} has no value", hint=f"{option} 0:size=10G,pool=POOL")
    if rest:
        spec["options"] = rest
    return spec


def nic_spec(words: dict[str, str]) -> dict[str, Any]:
    """A NicSpec from ``mode=bridged,link=br0,mac=...``."""
    unknown = sorted(set(words) - {"mode", "link", "mac"})
    if unknown:
        raise InvalidInput(f"--net: there is no {', '.join(unknown)}", hint="--net 0:mode=bridged,link=br0")
    return {name: value.lower() if name == "mac" else value for name, value in words.items()}


def backend(text: str | None) -> dict[str, Any]:
    """Memory and CPUs from Ganeti's ``-B maxmem=512M,vcpus=2``; memory without a unit is MiB."""
    if not text:
        return {}
    words = split_words(text, "-B")
    found: dict[str, Any] = {}
    for name, value in words.items():
        if name in ("maxmem", "memory"):
            found["memory"] = parse_size(value, default_unit="m")
        elif name == "vcpus":
            found["vcpus"] = whole(value, "-B vcpus")
        else:
            raise InvalidInput(f"-B: there is no {name!r}", hint="-B maxmem=512M,vcpus=2")
    return found


def whole(text: str, option: str) -> int:
    """A whole number. Errors: InvalidInput."""
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(f"{option}: {text!r} is not a number") from None


_HYPERVISOR = {"kernel_path": "kernel", "initrd_path": "initrd", "kernel_args": "append"}


def hypervisor(text: str | None, kernel: str | None, initrd: str | None, append: str | None) -> dict[str, str]:
    """Direct boot from ``--kernel/--initrd/--append`` or Ganeti's ``-H [kvm:]kernel_path=,initrd_path=,kernel_args=``."""
    found: dict[str, str] = {}
    if text:
        head, colon, rest = text.partition(":")
        words = split_words(rest if colon and "=" not in head else text, "-H")
        for name, value in words.items():
            if name not in _HYPERVISOR:
                raise InvalidInput(f"-H: there is no {name!r}", hint=f"-H {'=...,'.join(_HYPERVISOR)}=...")
            found[_HYPERVISOR[name]] = value
    given = {"kernel": kernel, "initrd": initrd, "append": append}
    return {**found, **{name: value for name, value in given.items() if value is not None}}
