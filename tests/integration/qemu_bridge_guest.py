"""qemu_bridge_guest.py PLACE: in an empty network namespace, a guest on a bridge answers, and its tap goes with it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

from qemu_support import CACHE, Authority, World, says

from atoll.lab.guest import build
from atoll.model.objects import Nic


def ip(*words: str) -> str:
    """The ip command."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


async def main() -> None:
    """The whole story."""
    world = World(Path(sys.argv[1]), build(CACHE), Authority())
    ip("link", "add", "testbr", "type", "bridge")
    ip("addr", "add", "10.99.0.1/24", "dev", "testbr")
    ip("link", "set", "testbr", "up")
    nics = [Nic(mac="52:54:00:00:00:01", mode="bridged", link="testbr"), Nic(mac="52:54:00:00:00:02")]
    a = world.hypervisor("a", user="nobody")
    spec = world.spec(more="nic=10.99.0.2/24").model_copy(update={"nics": nics})
    try:
        await a.start(spec, world.report)
        await says(a, spec, "READY")
        try:
            socket.create_connection(("10.99.0.2", 9), timeout=20).close()
        except ConnectionRefusedError:
            pass  # nothing listens there, but the guest itself said so
        assert "master testbr" in ip("link", "show", "type", "tun")
        await a.kill(spec.instance)
        assert not ip("link", "show", "type", "tun")
    finally:
        await world.end()


asyncio.run(main())
