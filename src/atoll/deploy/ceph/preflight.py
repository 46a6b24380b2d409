"""What stands against Ceph on this node: everything that is found, at once, before anything is changed."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.deploy.ceph import daemons, disks
from atoll.deploy.contract import Facts
from atoll.model.errors import AtollError
from atoll.runtime import process

CONF = Path("/etc/ceph/ceph.conf")
#: Program -> Debian's package.
PROGRAMS = {
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph-mgr": "ceph-mgr",
    "monmaptool": "ceph-common",
    "flock": "util-linux",
    "blkid": "util-linux",
}
#: Older ones are not tried.
OLDEST = 16


async def look(args: Mapping[str, Any]) -> Facts:
    """``args``: fsid (of the cluster that is joined; empty: a new one), address, disks, ports, networks, osds (uuids that may be here).

    ``there``: it has a part in the cluster already."""
    facts = Facts(hostname=socket.gethostname().split(".")[0])
    version = await _packages(facts)
    facts.version = version
    if not args.get("there"):
        _leftovers(facts, args["fsid"])
    await _networks(facts, args)
    for port in args["ports"]:
        if not _free(args["address"], port):
            facts.problems.append(f"port {port} of {args['address']} is in use (ss -ltnp shows by whom)")
    if not facts.hostname or facts.hostname == "localhost":
        facts.problems.append("it has no hostname of its own (hostnamectl hostname NAME)")
    ours = frozenset(args.get("osds", ()))
    for path, (why, size) in zip(
        args["disks"], await asyncio.gather(*(disks.objection(path, ours) for path in args["disks"])), strict=True
    ):
        facts.disks[path] = size
        if why:
            facts.problems.append(f"disk {path} {why}")
    facts.clock = time.time()
    return facts


async def _packages(facts: Facts) -> str:
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    bindings = await process.run([sys.executable, "-c", "import rados, rbd"], deadline=30, check=False)
    missing += ["python3-rados", "python3-rbd"] if bindings.rc else []
    if missing:
        words = " ".join(missing)
        facts.problems.append(f"packages are missing (apt-get install --no-install-recommends {words})")
    if shutil.which("ceph-osd") is None:
        return ""
    try:
        said = (await process.run(["ceph-osd", "--version"], deadline=30)).stdout
    except AtollError as error:
        facts.problems.append(f"ceph-osd cannot be run: {error.message}")
        return ""
    found = re.search(r"version (\d+)(\.[\d.]+)?", said)
    if found is None:
        facts.problems.append(f"ceph-osd tells no version: {said.strip()[:80]}")
        return ""
    if int(found[1]) < OLDEST:
        facts.problems.append(f"Ceph {found[1]} is older than {OLDEST}, the first that is supported")
    return found[0].removeprefix("version ")


def _leftovers(facts: Facts, fsid: str) -> None:
    """Signs of a Ceph cluster that is not the one that is joined."""
    if CONF.exists() and (not fsid or fsid_of(CONF) != fsid):
        facts.problems.append(
            f"{CONF} exists: the node belongs to a Ceph cluster already, or did (remove the file if it is nothing to you)"
        )
    else:
        # A node is looked at before it has any part in the cluster, so these are somebody else's.
        for kind in ("mon", "mgr", "osd"):
            found = sorted((daemons.DATA / kind).glob("*"))
            if found:
                facts.problems.append(f"{found[0]} exists: a Ceph cluster has left it (move it away if it is nothing to you)")


def fsid_of(path: Path) -> str:
    """The cluster that a configuration file is of; empty: it does not say."""
    try:
        found = re.search(r"^\s*fsid\s*=\s*(\S+)", path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


async def _networks(facts: Facts, args: Mapping[str, Any]) -> None:
    try:
        said = json.loads((await process.run(["ip", "-j", "addr"], deadline=30)).stdout)
    except (AtollError, ValueError) as error:
        facts.problems.append(f"its addresses are not known: {error}")
        return
    facts.addresses = [info["local"] for link in said for info in link.get("addr_info", ()) if info.get("scope") == "global"]
    if args["address"] not in facts.addresses and not ipaddress.ip_address(args["address"]).is_loopback:
        facts.problems.append(f"it has no address {args['address']}, which is its own in the cluster (ip addr)")
    for name, text in args["networks"].items():
        network = ipaddress.ip_network(text)
        if not any(ipaddress.ip_address(address) in network for address in facts.addresses):
            facts.problems.append(f"it has no address in {text}, the {name} (ip addr)")


def _free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
