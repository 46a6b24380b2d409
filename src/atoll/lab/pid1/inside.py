"""The first process inside of a kernel node, started by kernel/init: makes the node of the root it finds, then keeps its services running.

What it is told comes from the lab's files (``/.lab/node``); whoever waits outside for the node hears of it by the port ``lab.ready``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from atoll.lab.pid1 import rootfs
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.lab.pid1.supervisor import Supervisor, listen

#: Where the node's own programs give orders to it.
HOME = Path("/run/atoll-lab")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UDEVD = "/lib/systemd/systemd-udevd"


def main() -> None:
    """Root, network, services."""
    os.umask(0o022)
    os.environ.update(PATH=_PATH, LANG="C.UTF-8", HOME="/root")
    ready = os.open(port("lab.ready"), os.O_WRONLY | os.O_CLOEXEC)
    try:
        supervisor = _become()
    except Exception as error:
        traceback.print_exc()
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:4000])
        raise
    os.write(ready, b"ready")
    supervisor.run()


def port(name: str) -> str:
    """The device of a virtio-serial port."""
    for entry in os.scandir("/sys/class/virtio-ports"):
        if Path(entry.path, "name").read_text().strip() == name:
            return f"/dev/{entry.name}"
    raise FileNotFoundError(f"this machine has no port {name}")


def _become() -> Supervisor:
    place = Path(rootfs.LAB, "node")
    spec = NodeSpec.read(place)
    definitions = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    log = os.open(place / "log", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    rootfs.build_inside(spec)
    # `rbd map` waits for what it says of a new device.
    subprocess.run([_UDEVD, "--daemon"], stdin=subprocess.DEVNULL, check=True, timeout=60)
    lines = [f"addr add {spec.address}/24 dev eth0", "link set lo up", "link set eth0 up"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines).encode(), check=True, timeout=60)
    HOME.mkdir(mode=0o700)
    supervisor = Supervisor(spec, listen(HOME), definitions, log)
    subprocess.Popen([sys.executable, "-I", "-S", str(Path(__file__).with_name("ports.py"))], stdin=subprocess.DEVNULL)
    supervisor.load()
    return supervisor


if __name__ == "__main__":
    main()
