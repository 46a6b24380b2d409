"""``atoll node``."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from atoll.cli import settings, tags, work
from atoll.cli.client import Client, path_of
from atoll.cli.cluster import set_option
from atoll.cli.lazy import OrderedGroup
from atoll.cli.options import (
    by_driver,
    complete,
    confirm,
    drain_option,
    force_option,
    format_option,
    io_may_stop_option,
    job_options,
    on_node,
    pairs,
    storage_option,
    target,
    unasked_option,
)
from atoll.cli.output import print_data
from atoll.cli.reads import info_command, list_command
from atoll.cli.settings import config_option
from atoll.model.errors import HostError, InvalidInput

#: Seconds for a node to join over ssh.
SSH_DEADLINE = 300.0


@click.group(cls=OrderedGroup)
def node() -> None:
    """Nodes: add them, empty them, say that one is dead."""


node.add_command(list_command("node"))
node.add_command(info_command("node"))

_group_option = click.option("-g", "--group", metavar="GROUP", help="The group it joins.", shell_complete=complete("group"))


_rejoin_option = click.option(
    "--rejoin", is_flag=True, help="A node of the cluster comes back: it lost its certificate, or was away when the CA was changed."
)


def _token(name: str, group: str | None, rejoin: bool) -> dict[str, Any]:
    more: dict[str, Any] = {**({"group": group} if group else {}), **({"rejoin": True} if rejoin else {})}
    made: dict[str, Any] = Client().send("POST", "/v1/nodes/token", {"name": name, **more})
    return made


@node.command()
@click.argument("name")
@_group_option
@_rejoin_option
@format_option
def token(name: str, group: str | None, rejoin: bool, format: str) -> None:
    """Print a token with which the node NAME may join: once, within 15 minutes."""
    made = _token(name, group, rejoin)
    print_data(made, format) if format != "table" else click.echo(made["token"])


@node.command()
@click.argument("name")
@_group_option
@click.option("--address", metavar="IP", help="The node's address.")
@click.option("--master", metavar="URL", help="This master's address as the node sees it.")
@click.option("--ssh", metavar="[USER@]HOST", help="Let it join right now, over ssh.")
@_rejoin_option
@click.option("--readd", is_flag=True, help="A node that was offline is back: its part of a storage cluster is started, too.")
@set_option
def add(
    name: str,
    group: str | None,
    address: str | None,
    master: str | None,
    ssh: str | None,
    rejoin: bool,
    readd: bool,
    overrides: tuple[str, ...],
) -> None:
    """Add a node: prints a token and what to type there; with --ssh does it."""
    if readd:
        work.run("node", "modify", name, {"offline": False})
        return
    url = master or _master_url()
    address = address or (ssh.rpartition("@")[2] if ssh else None)
    if rejoin and not address:
        address = Client().get(path_of("node", name))["address"]
    command = ["atoll", "node", "join", "--master", url, "--name", name, "--address", address or "ADDRESS", "--token-file", "-"]
    for text in overrides:
        command += ["--set", text]
    made = _token(name, group, rejoin)["token"]
    if ssh:
        _over_ssh(ssh, command, made)
        click.echo(f"{name} has joined.")
        click.echo("Next: atoll node list", err=True)
        return
    click.echo(f"On {name}, within 15 minutes, type\n\n  {shlex.join(command)}\n\nand give it this token, which works once:\n\n  {made}")


def _master_url() -> str:
    urls = settings.masters()
    if urls:
        return urls[0]
    config = settings.local_config()
    port = config.get("master_port", 7770)
    address = config.get("address")
    if not address:
        raise InvalidInput("this node's configuration does not tell its address", hint="give --master https://ADDRESS:7770")
    return f"https://{f'[{address}]' if ':' in address else address}:{port}"


def _over_ssh(host: str, command: list[str], token: str) -> None:
    """The token goes in through stdin: the command line is visible to everybody on both machines."""
    if host.startswith("-"):
        raise InvalidInput(f"{host!r} is not a host")
    try:
        # There it is where it is here, if its own PATH does not know it.
        there = f'PATH="$PATH:{Path(sys.executable).parent}" {shlex.join(command)}'
        done = subprocess.run(["ssh", "--", host, there], input=token + "\n", text=True, timeout=SSH_DEADLINE, check=False)
    except FileNotFoundError:
        raise HostError("there is no ssh on this machine", hint="install openssh-client, or leave --ssh away") from None
    except subprocess.TimeoutExpired:
        raise HostError(f"ssh {host} took longer than {SSH_DEADLINE:.0f} s", hint=f"ssh {host}") from None
    if done.returncode:
        raise HostError(f"ssh {host} ended with exit code {done.returncode}", hint="look at what it said above")


@node.command()
@click.option("--master", required=True, metavar="URL", help="Such as https://node1:7770.")
@click.option("--name", required=True, metavar="NAME", help="The name for which the token was made.")
@click.option("--address", required=True, metavar="IP", help="Where other nodes reach this one.")
@click.option("--token-file", required=True, metavar="PATH", help="A file with the token; - reads stdin, or asks.")
@config_option
@set_option
def join(master: str, name: str, address: str, token_file: str, config: str, overrides: tuple[str, ...]) -> None:
    """Let this machine join a cluster."""
    secret = settings.read_secret(token_file)
    joining = import_module("atoll.agent.join")
    done = joining.join(master, name, address, secret, Path(config), pairs(overrides, "--set"))
    click.echo(f"{name} has joined the cluster.")
    for line in done:
        click.echo(line)
    if not any(line.startswith("started") for line in done):
        click.echo("Next: start atoll-agent here", err=True)


@node.command()
@target("node")
@click.option("--offline", type=bool, is_flag=False, flag_value="yes", metavar="[yes|no]", help="Nothing is asked of an offline node.")
@click.option("--drained", type=bool, is_flag=False, flag_value="yes", metavar="[yes|no]", help="A drained node gets nothing new.")
@drain_option
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="Its roles; replaces all.")
@io_may_stop_option
@storage_option
@job_options
def modify(
    target: str,
    offline: bool | None,
    drained: bool | None,
    drain: bool,
    roles: tuple[str, ...],
    io_may_stop: bool,
    storage_texts: tuple[str, ...],
    **options: Any,
) -> None:
    """Set a node offline or drained, change its roles or its options for storage clusters, or take it out of its storage cluster."""
    change(target, offline, drained, list(roles) or None, storage_texts, options, io_may_stop, drain)


def change(
    name: str,
    offline: bool | None,
    drained: bool | None,
    roles: list[str] | None,
    storage_texts: tuple[str, ...],
    options: dict[str, Any],
    io_may_stop: bool = False,
    drain: bool = False,
) -> None:
    """Ask for the change; refuses one that changes nothing."""
    if drain:
        if offline is not None or drained is not None or roles is not None or storage_texts or io_may_stop:
            raise InvalidInput("--drain is a job of its own", hint=f"atoll node modify {name} --drain, and the rest after it")
        work.run("node", "leave-storage", name, {}, **options)
        return
    if offline is None and drained is None and roles is None and not storage_texts:
        raise InvalidInput("nothing to change is given", hint="--offline yes|no, --drained yes|no, --drain, --role or -S")
    body: dict[str, Any] = {"offline": offline, "drained": drained, "roles": roles, "io_may_stop": True if io_may_stop else None}
    if storage_texts:
        body["storage_options"] = by_driver(storage_texts, "-S")
    work.run("node", "modify", name, body, **options)


_dead_option = click.option("--node-is-dead", is_flag=True, help="Your word that the node is off, for this moment.")


@node.command()
@target("node")
@on_node("Where to; default: the best place for each.")
@unasked_option
@job_options
def migrate(target: str, node: str | None, **options: Any) -> None:
    """Move all instances of a node alive."""
    work.run("node", "migrate", target, {"target": node}, **options)


@node.command()
@target("node")
@on_node("Where to; default: the best place for each.")
@_dead_option
@unasked_option
@job_options
def failover(target: str, node: str | None, node_is_dead: bool, **options: Any) -> None:
    """Start all instances of a node elsewhere; if it does not answer, only with --node-is-dead."""
    work.run("node", "failover", target, {"target": node, "node_is_dead": node_is_dead}, **options)


@node.command()
@target("node")
@on_node("Where to; default: the best place for each.")
@_dead_option
@unasked_option
@job_options
def evacuate(target: str, node: str | None, node_is_dead: bool, **options: Any) -> None:
    """Empty a node: migrate what runs, move or start elsewhere the rest."""
    work.run("node", "evacuate", target, {"target": node, "node_is_dead": node_is_dead}, **options)


@node.command("declare-dead")
@target("node")
@click.option("--disks-are-lost", is_flag=True, help="What is on its own disks will never come back: jobs may forget it.")
@force_option
@job_options
def declare_dead(target: str, disks_are_lost: bool, force: bool, **options: Any) -> None:
    """Say that a node is off, for this moment. If it still runs, disks may be written by two machines."""
    question = f"Are you sure that {target} is off? If it still runs its guests, their disks will be destroyed."
    confirm(question, force or options["dry_run"])
    work.run("node", "declare-dead", target, {"disks_are_lost": True} if disks_are_lost else {}, **options)


@node.command()
@target("node", nargs=-1, required=True)
@job_options
def renew(targets: tuple[str, ...], **options: Any) -> None:
    """Give nodes new keys and certificates now. It is done by itself long before they end; guests notice nothing."""
    work.run_many("node", "renew", targets, {}, **options)


@node.command()
@target("node")
@click.option("--keys-are-lost", is_flag=True, help="A lost master candidate: it may still hold the keys of a master.")
@click.option(
    "--dead", is_flag=True, help="A node of a storage cluster that died for good: what it had is given up, if there are other copies."
)
@force_option
@job_options
def remove(target: str, keys_are_lost: bool, dead: bool, force: bool, **options: Any) -> None:
    """Take a node out of the cluster for good; its certificate is refused from then on."""
    confirm(f"Remove the node {target} from the cluster?", force or options["dry_run"])
    body = {**({"keys_are_lost": True} if keys_are_lost else {}), **({"dead": True} if dead else {})}
    work.run("node", "remove", target, body, **options)


tags.ours(node, "node")
