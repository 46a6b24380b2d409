"""``atoll cluster``."""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from atoll.cli import masters, tags, work
from atoll.cli.bundle import support_bundle
from atoll.cli.client import Client, path_of
from atoll.cli.columns import AUDIT, TOKENS
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import by_driver, format_option, job_options, output_options, pairs, storage_option, style
from atoll.cli.output import Style, duration, print_data, print_object, print_rows
from atoll.cli.settings import config_option

set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Write this key into the configuration.")


_driver_option = click.option(
    "-D",
    "--driver-option",
    "texts",
    multiple=True,
    metavar="DRIVER:KEY=VALUE,...",
    help="Defaults of new pools; and how disks are attached from the next start or migration on, such as rbd:access=kernelspace.",
)


@click.group(cls=OrderedGroup)
def cluster() -> None:
    """The cluster as a whole."""


@cluster.command()
@click.argument("name")
@click.option("--node", default=lambda: socket.gethostname().split(".")[0], metavar="NAME", help="This node's name (default: the host's).")
@click.option("--address", required=True, metavar="IP", help="Where other nodes reach this one.")
@click.option("--hypervisor", type=click.Choice(["qemu", "fake"]), default="qemu", show_default=True)
@_driver_option
@storage_option
@config_option
@set_option
def init(
    name: str,
    node: str,
    address: str,
    hypervisor: str,
    texts: tuple[str, ...],
    storage_texts: tuple[str, ...],
    config: str,
    overrides: tuple[str, ...],
) -> None:
    """Make a cluster whose first node and master is this machine."""
    setup = import_module("atoll.master.setup")
    storage, drivers = by_driver(storage_texts, "-S"), by_driver(texts, "-D")
    done = setup.init(name, node, address, Path(config), hypervisor, pairs(overrides, "--set"), storage, drivers)
    click.echo(f"The cluster {name} is made; {node} is its master.")
    for line in done:
        click.echo(line)
    started = any(line.startswith("started") for line in done)
    click.echo(f"Next: {'' if started else 'start atoll-master and atoll-agent, then '}add nodes: atoll node add NAME", err=True)


@cluster.command()
@format_option
def info(format: str) -> None:
    """The cluster, and how many of everything it has."""
    print_object(Client().get("/v1/cluster"), Style(format=format), hide=("id",))


@cluster.command()
@format_option
@click.pass_context
def verify(ctx: click.Context, format: str) -> None:
    """Look at everything: what is strange, half-made, missing or held, since when, and what to type.

    The exit code is 1 if there is an error among the findings.
    """
    findings = Client().get("/v1/cluster/verify", timeout=300.0)["findings"]
    if format != "table":
        print_data(findings, format)
    elif not findings:
        click.echo("Nothing is wrong.")
    else:
        _tell(findings)
    if any(finding["severity"] == "error" for finding in findings):
        ctx.exit(1)


def _tell(findings: list[dict[str, Any]]) -> None:
    colors = {"error": "red", "warning": "yellow"}
    for finding in findings:
        head = click.style(finding["severity"], fg=colors.get(finding["severity"]), bold=True)
        age = f" (for {duration(finding['since'])})" if finding["since"] is not None else ""
        click.echo(f"{head}: {finding['about']}: {finding['what']}{age}")
        if finding["why"]:
            click.echo(f"  {finding['why']}")
        for command in finding["commands"]:
            click.echo(f"  $ {command}")
    errors = sum(finding["severity"] == "error" for finding in findings)
    click.echo(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}, {errors} of them error{'s' if errors != 1 else ''}")


@cluster.command()
@click.option("--hypervisor", type=click.Choice(["qemu", "fake"]), help="For new instances.")
@_driver_option
@storage_option
@job_options
def modify(hypervisor: str | None, texts: tuple[str, ...], storage_texts: tuple[str, ...], **options: Any) -> None:
    """Change the cluster's defaults."""
    body: dict[str, Any] = {"hypervisor": hypervisor}
    if texts:
        body["driver_options"] = by_driver(texts, "-D")
    if storage_texts:
        body["storage_options"] = by_driver(storage_texts, "-S")
    work.run("cluster", "modify", body=body, **options)


@cluster.command()
@click.argument("name")
@click.option("--role", type=click.Choice(["reader", "operator", "admin"]), default="reader", show_default=True)
@click.option("--days", type=click.IntRange(1, 36500), metavar="N", help="Good for so long; default: until it is revoked.")
@format_option
def token(name: str, role: str, days: int | None, format: str) -> None:
    """Make an API token for NAME. It is printed once, and kept only as a hash."""
    made = Client().send("POST", "/v1/tokens", {"name": name, "role": role, **({"days": days} if days else {})})
    if format != "table":
        print_data(made, format)
        return
    click.echo(made["token"])
    click.echo("Next: keep it in a file with mode 600 and set ATOLL_TOKEN_FILE", err=True)


@cluster.command()
@output_options
def tokens(**options: Any) -> None:
    """The API tokens: names, roles and dates."""
    print_rows(Client().get("/v1/tokens")["items"], TOKENS, style(**options))


@cluster.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Revoke the API token of NAME; it is refused from now on."""
    Client().send("DELETE", path_of("token", name))
    click.echo(f"The token {name} is revoked.")


@cluster.command()
@click.option("-n", "--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many, counted from the newest.")
@click.option("--who", metavar="NAME", help="Only what this caller asked.")
@click.option("--path", metavar="TEXT", help="Only where the address, or a job's operation, has this in it.")
@click.option("--since", metavar="TIME", help="Only from then on: the beginning of a time in UTC, such as 2026-01-31T18.")
@output_options
def audit(limit: int, who: str | None, path: str | None, since: str | None, **options: Any) -> None:
    """Who asked for what, when, from where, and what came of it, as this master has written it down."""
    asked = {"limit": limit, "who": who, "path": path, "since": since}
    found = Client().get("/v1/cluster/audit", {name: value for name, value in asked.items() if value is not None})
    print_rows(found["items"], AUDIT, style(**options))
    if found["trouble"]:
        click.echo(f"The log cannot be written: {found['trouble']}; {found['lost']} entries are lost so far.", err=True)


@cluster.command("renew-certificates")
@job_options
def renew_certificates(**options: Any) -> None:
    """Give all nodes and the master new keys and certificates now, by the same CA."""
    work.run("cluster", "renew-certificates", body={}, **options)


@cluster.command("rotate-ca")
@click.option("--leave-behind", is_flag=True, help="Go on without nodes that do not answer; each comes back by: node add NAME --rejoin.")
@job_options
def rotate_ca(leave_behind: bool, **options: Any) -> None:
    """Change the CA, and with it every certificate: after a master's keys were stolen, or before the CA ends. Guests notice nothing."""
    work.run("cluster", "rotate-ca", body={"leave_behind": leave_behind}, **options)


for _command in (*masters.COMMANDS, support_bundle):
    cluster.add_command(_command)


@cluster.command()
@click.argument("nouns", nargs=-1)
@click.option("--after", type=click.IntRange(0), metavar="ID", help="Begin with what came after the event with this id.")
@format_option
def events(nouns: tuple[str, ...], after: int | None, format: str) -> None:
    """What changes in the cluster, while it changes, until Ctrl-C: of these NOUNS (instance, job, node...), or of all."""
    import_module("atoll.cli.follow").events(Client(), nouns, after, format)


tags.ours(cluster, "cluster")
