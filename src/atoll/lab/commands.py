"""``atoll lab``: a whole cluster of nodes on this machine, for trying out, developing and testing."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from atoll.lab.find import AnyLab
    from atoll.lab.nodes import Node
    from atoll.lab.process import ProcessNode

# Everything else is imported where it is used: the command line has to start in under 200 ms, whatever was typed.

_name = click.option("--name", "-L", default="", metavar="LAB", help="The lab; not needed while there is only one.")
_format = click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)


@click.group()
def lab() -> None:
    """Real nodes on this machine: for trying out, developing and testing."""


@lab.command()
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--cloud-init", "cloud_init", is_flag=True, help="With systemd, cloud-init and an SSH server, as people run it.")
def image(path: str, cloud_init: bool) -> None:
    """Make a disk with Debian that boots by itself, from Debian's packages: for instance add --image PATH.

    The first time takes a minute or two; needs root, mmdebstrap and extlinux. Nodes of a lab see the files of this machine, but not those
    in /tmp, /var/tmp, /srv, /run and /var/lib/atoll, of which each node has its own.
    """
    import subprocess
    from pathlib import Path

    from atoll.lab import debian
    from atoll.model.errors import HostError

    click.echo("Making a disk from Debian's packages; it is kept for the next time")
    made = debian.build(cloud_init=cloud_init)
    path = os.path.abspath(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["cp", "--sparse=always", "--", made, path], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise HostError(done.stderr.strip())
    # On a machine that is no node itself, it is for those of a lab.
    where = path if Path("/etc/atoll/atoll.toml").exists() else f"node1:{path}"
    click.echo(f"{path} is ready: atoll instance add web1 -t POOL --image {where} -B maxmem=512M{' --cloud-init' if cloud_init else ''}")


@lab.command()
@click.option("--nodes", default=3, show_default=True, help="How many; the first is the master.")
@click.option("--name", "-L", default="demo", show_default=True, metavar="LAB")
@click.option("--disks", default=0, show_default=True, help="Spare disks per node, /dev/disk1 and so on.")
@click.option("--shared-size", default="8G", show_default=True, help="Size of the shared storage; files are sparse.")
@click.option("--hypervisor", type=click.Choice(["qemu", "fake"]), default="qemu", show_default=True)
@click.option(
    "--kernel",
    default="",
    is_flag=False,
    flag_value="all",
    metavar="[WHICH]",
    help="Nodes with a kernel of their own (Debian's, in an emulated machine, about ten times slower): all, so many of the last ones, or "
    "names such as node2,node3. For krbd, rbd-nbd and other clients in the kernel.",
)
@click.option("--rootless", is_flag=True, help="Plain processes instead of namespaces: no network to cut, no power cut that loses data.")
@click.option(
    "--bind", "binds", multiple=True, metavar="DIR", help="A directory below /tmp or /var/tmp that nodes are to see; may be repeated."
)
@click.option("--no-cluster", is_flag=True, help="Only nodes, without Atoll on them.")
def up(
    nodes: int,
    name: str,
    disks: int,
    shared_size: str,
    hypervisor: str,
    kernel: str,
    rootless: bool,
    binds: tuple[str, ...],
    no_cluster: bool,
) -> None:
    """Make a lab and a cluster in it."""
    from atoll.lab import layout
    from atoll.lab.lab import Lab
    from atoll.lab.process import ProcessLab
    from atoll.model.errors import NotSupported
    from atoll.model.units import parse_size

    if rootless and disks:
        raise NotSupported("spare disks are loop devices, which need root", hint="leave --disks away, or make real nodes with sudo")
    if rootless and kernel:
        raise NotSupported("kernel nodes are emulated machines on a switch, which needs root", hint="leave --kernel away, or use sudo")
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"  {time.monotonic() - began:5.1f} s  {text}")

    click.echo(f"Making the lab {name} with {nodes} {'rootless ' if rootless else ''}node{'s' if nodes > 1 else ''}")
    made: AnyLab
    if rootless:
        made = ProcessLab.create(name, nodes, say=say)
    else:
        made = Lab.create(
            name,
            nodes,
            disks=disks,
            shared_size=parse_size(shared_size),
            binds=[os.path.abspath(path) for path in binds],
            kernel=layout.kernel_nodes(kernel, layout.node_names(nodes)),
            say=say,
        )
    if not no_cluster:
        from atoll.lab.bringup import make_cluster

        make_cluster(made, hypervisor, say=say)
    click.echo(f"Shared storage is at {made.shared}. Try:")
    tries = ["exec node1 -- bash", "status", "kill node2", "boot node2", "down"]
    for words in tries if no_cluster else ["exec node1 -- atoll node list", *tries[1:]]:
        click.echo(f"  atoll lab {words}")


@lab.command("list")
@_format
def list_(form: str) -> None:
    """All labs on this machine."""
    from atoll.lab import find
    from atoll.model.errors import AtollError

    rows: list[dict[str, Any]] = []
    for name, rootless in find.names().items():
        row: dict[str, Any] = {"name": name, "kind": "rootless" if rootless else "real"}
        try:
            found = find.load(name)
        except AtollError:
            rows.append(row | {"nodes": 0, "powered": 0, "cluster": "", "state": "remains"})
            continue
        powered = sum(node.running for node in found.nodes)
        state = "up" if powered else "off"
        rows.append(row | {"nodes": len(found.nodes), "powered": powered, "cluster": found.record.cluster, "state": state})
    if form == "json":
        click.echo(json.dumps(rows, indent=1))
        return
    _table(["NAME", "KIND", "NODES", "POWERED", "CLUSTER", "STATE"], [[str(value) or "-" for value in row.values()] for row in rows])


@lab.command()
@click.argument("name", required=False, default="")
@_format
def status(name: str, form: str) -> None:
    """The nodes of a lab: power, network, services."""
    from atoll.lab import find

    found = find.load(name)
    rows = [_describe(node) for node in found.nodes]
    if form == "json":
        click.echo(json.dumps({"name": found.name, "shared": found.shared, "cluster": found.record.cluster, "nodes": rows}, indent=1))
        return
    kind = "rootless" if found.record.rootless else "real"
    own = f" ({', '.join(found.record.kernel)} with a kernel of their own)" if found.record.kernel else ""
    click.echo(f"lab {found.name}: {len(rows)} {kind} nodes{own}, shared storage {found.shared}, logs {found.directory}/nodes/NODE/log")
    lines = []
    for row in rows:
        services = ", ".join(_service(known) for known in row["services"])
        power, link = ("on" if row["powered"] else "off"), ("up" if row["connected"] else "down")
        lines.append([row["name"], power, str(row["pid"] or "-"), row["address"], link, services or "-"])
    _table(["NODE", "POWER", "PID", "ADDRESS", "LINK", "SERVICES"], lines)


def _service(known: dict[str, Any]) -> str:
    pid = f" {known['pid']}" if known["pid"] else ""
    again = f" ({known['restarts']} restarts, last: {known['last']})" if known["restarts"] else ""
    return f"{known['name']} {known['state']}{pid}{again}"


def _describe(node: Node | ProcessNode) -> dict[str, Any]:
    from atoll.model.errors import AtollError

    row: dict[str, Any] = {"name": node.name, "address": node.address, "powered": False, "pid": 0, "connected": False, "services": []}
    row["kernel"] = node.own_kernel
    try:
        row |= {"pid": node.pid, "powered": True, "connected": node.connected}
        row["services"] = [dataclasses.asdict(known) for known in node.services()]
    except AtollError as error:
        # A node may lose its power while we look.
        row["reason"] = error.message
    return row


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name
@click.argument("node")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec(name: str, node: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a node (a shell, if none is given); its exit status becomes ours.

    Write -- before it: atoll lab exec node1 -- ls -l
    """
    from atoll.lab import find

    target = find.load(name).node(node)
    if command[:1] == ("--",):
        command = command[1:]
    argv = target.command(command or ("bash", "-i"), bound=False)
    environment = target.environ()
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], argv, environment)
    except FileNotFoundError:
        raise click.ClickException(f"{argv[0]} is not installed") from None


def _power(verb: str, text: str, done: str) -> None:
    @lab.command(verb, help=text)
    @_name
    @click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
    def command(name: str, nodes: tuple[str, ...]) -> None:
        from atoll.lab import find

        found = find.load(name)
        for target in [found.node(node) for node in nodes]:
            getattr(target, verb)()
            click.echo(f"{target.name} {done}")


_power("kill", "Cut a node's power: what was not fsynced is gone.", "has lost its power")
_power("boot", "Give a node power again.", "is up")
_power("cut", "Pull a node's network cable.", "is cut off")
_power("heal", "Plug a node's network cable in again.", "is connected")


@lab.command()
@click.argument("name", required=False, default="")
@click.option("--all", "all_", is_flag=True, help="Every lab on this machine.")
def down(name: str, all_: bool) -> None:
    """Remove a lab: its nodes, their guests, disks and network. Fine when it is gone already, or half made."""
    from atoll.lab import find

    known = list(find.names())
    if not name and not all_ and len(known) > 1:
        raise click.UsageError(f"there are several labs: {', '.join(known)}; name one, or give --all")
    for each in known if all_ or not name else [name]:
        find.remove(each)
        click.echo(f"the lab {each} is gone")
    if not known and not name:
        click.echo("there is no lab")


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
