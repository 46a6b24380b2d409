"""qemu_dying_agent.py CALL: bring a guest to the pause of its migration, and die there as an agent may, with SIGKILL."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from atoll.hypervisor.qemu import QemuHypervisor
from atoll.model.messages import Endpoint


async def main() -> None:
    """Never comes back."""
    call = json.loads(sys.argv[1])
    hypervisor = QemuHypervisor(call["run_dir"], call["tls_dir"], "127.0.0.1", "a")
    hypervisor.tuning.watchdog = call["watchdog"]
    await hypervisor.migrate_out(call["guest"], Endpoint(**call["to"]), [], lambda progress: None)
    os.kill(os.getpid(), signal.SIGKILL)


asyncio.run(main())
