"""``python -I -S .../pid1/__main__.py MARKER NODE_DIR READY_FD LOCK_FD``: becomes the first process of a node.

READY_FD is the writing end of a pipe: it gets ``ready``, or what went wrong. LOCK_FD is the lab's lock, held until then, so that nobody
clears the lab away while a node is half made.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.lab.pid1.supervisor import Supervisor, listen


def main() -> None:
    """Namespaces, root, services."""
    directory, ready, lock = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # They were inherited, but services must not inherit them.
    os.set_inheritable(ready, False)
    os.set_inheritable(lock, False)
    try:
        spec = NodeSpec.read(directory)
        run = _carry(spec, directory) if spec.kernel else _supervise(spec, directory)
    except Exception as error:  # noqa: BLE001 - whatever it is, the one who waits must hear of it
        traceback.print_exc()
        os.write(ready, f"{error}".encode())
        sys.exit(1)
    os.close(lock)
    os.write(ready, b"ready")
    os.close(ready)
    run()


def _supervise(spec: NodeSpec, directory: Path) -> Callable[[], None]:
    os.umask(0o022)
    server = listen(directory)
    definitions = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    log = os.open(directory / "log", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # Imported only now: a node that is plain processes needs neither.
    from atoll.lab.pid1 import rootfs, syscalls

    _fork(spec, syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC)
    if spec.namespaces:
        rootfs.build(spec, directory)
    else:
        syscalls.become_subreaper()
        os.chdir(directory)
    supervisor = Supervisor(spec, server, definitions, log)
    supervisor.load()
    return supervisor.run


def _carry(spec: NodeSpec, directory: Path) -> Callable[[], None]:
    from atoll.lab.pid1 import carrier

    _fork(spec)
    machine = carrier.carry(spec, directory)
    return lambda: carrier.end_with(machine)


def _fork(spec: NodeSpec, more: int = 0) -> None:
    """Go on as a child; where nodes have them, as the first process of fresh namespaces."""
    from atoll.lab.pid1 import syscalls

    if spec.namespaces:
        network = os.open(spec.netns, os.O_RDONLY | os.O_CLOEXEC)
        syscalls.setns(network, syscalls.CLONE_NEWNET)
        os.close(network)
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | more)
    if os.fork():
        # The caller waits for the pipe, not for us.
        os._exit(0)
    os.setsid()


if __name__ == "__main__":
    main()
