"""The network of a lab: a switch (a bridge in a namespace of its own) and a cable from it to each node.

A node's cable is a pair of virtual interfaces: ``eth0`` in the node, an interface with the node's name on the switch. The machine
itself has no address in it, so labs cannot disturb it or one another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from zlib import crc32

from atoll.lab.host import run
from atoll.lab.layout import netns_name, node_number, parse_netns
from atoll.model.errors import HostError

NETNS_DIR = "/run/netns"
BRIDGE = "br0"


def subnet(lab: str, taken: Sequence[str]) -> str:
    """The first three numbers of a lab's addresses, such as ``10.77.3``; always the same for a name unless taken."""
    start = crc32(lab.encode())
    for step in range(64 * 256):
        number = (start + step) % (64 * 256)
        candidate = f"10.{64 + number // 256}.{number % 256}"
        if candidate not in taken:
            return candidate
    raise HostError("every subnet from 10.64.0 to 10.127.255 is taken by a lab", hint="atoll lab list; atoll lab down NAME")


def address(net: str, node: str) -> str:
    """The address of a node in its lab."""
    return f"{net}.{10 + node_number(node)}"


def mac(net: str, node: str) -> str:
    """The hardware address of a node: the same after each boot, as peers remember it."""
    return "02:61:" + ":".join(f"{int(part):02x}" for part in address(net, node).split("."))


def namespaces(lab: str | None = None) -> dict[str, tuple[str, str]]:
    """Every network namespace of labs, or of one: name -> (lab, node or ``switch``)."""
    try:
        names = os.listdir(NETNS_DIR)
    except FileNotFoundError:
        return {}
    found = {name: parsed for name in names if (parsed := parse_netns(name))}
    return {name: parsed for name, parsed in found.items() if lab is None or parsed[0] == lab}


def make_switch(lab: str, keep: Sequence[int] = ()) -> None:
    """The switch, without cables."""
    switch = netns_name(lab, "switch")
    _batch(["netns add " + switch], keep)
    _batch([f"link add {BRIDGE} type bridge forward_delay 0", f"link set {BRIDGE} up", "link set lo up"], keep, switch)


def plug(lab: str, node: str, net: str, keep: Sequence[int] = ()) -> None:
    """A node's namespace and its cable to the switch."""
    switch, name = netns_name(lab, "switch"), netns_name(lab, node)
    _batch([f"netns add {name}"], keep)
    _batch(
        [
            f"link add {node} type veth peer name eth0 address {mac(net, node)} netns {name}",
            f"link set {node} master {BRIDGE}",
            f"link set {node} up",
        ],
        keep,
        switch,
    )
    _batch([f"addr add {address(net, node)}/24 dev eth0", "link set lo up", "link set eth0 up"], keep, name)


def plug_tap(lab: str, node: str, keep: Sequence[int] = ()) -> None:
    """The cable of a kernel node: an emulated machine is at its other end."""
    lines = [f"tuntap add dev {node} mode tap", f"link set {node} master {BRIDGE}", f"link set {node} up"]
    _batch(lines, keep, netns_name(lab, "switch"))


def unplug(lab: str, node: str) -> None:
    """Take a node's cable and namespace away; fine when they are gone. The node's processes must have ended."""
    switch = netns_name(lab, "switch")
    if switch in namespaces(lab) and node in links(lab):
        run(["ip", "-n", switch, "link", "del", node])
    remove(netns_name(lab, node))


def set_link(lab: str, node: str, up: bool) -> None:
    """Connect or cut a node at the switch. The node sees its carrier go, as with a cable pulled."""
    run(["ip", "-n", netns_name(lab, "switch"), "link", "set", node, "up" if up else "down"])


def links(lab: str) -> dict[str, bool]:
    """node -> whether its cable is connected; nodes without power have none."""
    switch = netns_name(lab, "switch")
    if switch not in namespaces(lab):
        return {}
    shown = json.loads(run(["ip", "-j", "-n", switch, "link", "show", "master", BRIDGE]) or "[]")
    return {link["ifname"]: "UP" in link["flags"] for link in shown if link}


def remove(name: str) -> None:
    """Remove a network namespace by name; fine when it is gone."""
    if os.path.exists(f"{NETNS_DIR}/{name}"):
        run(["ip", "netns", "del", name])


def _batch(lines: Sequence[str], keep: Sequence[int], namespace: str = "") -> None:
    where = ["-n", namespace] if namespace else []
    run(["ip", *where, "-batch", "-"], stdin="\n".join(lines) + "\n", keep=keep)
