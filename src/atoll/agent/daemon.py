"""The agent as a daemon."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import structlog

from atoll.agent.certificates import CertificateOrders
from atoll.agent.copying import CopyOrders
from atoll.agent.deploying import DeployOrders
from atoll.agent.exporting import ExportOrders
from atoll.agent.imaging import ImageOrders
from atoll.agent.looking import LookOrders
from atoll.agent.memory import Memory, open_database
from atoll.agent.node import Agent
from atoll.agent.osscripts import OsOrders
from atoll.agent.seeding import SeedOrders
from atoll.agent.server import create_app
from atoll.agent.standby import StandbyOrders
from atoll.hypervisor.contract import Hypervisor
from atoll.model.errors import AtollError, InvalidInput
from atoll.runtime import certs
from atoll.runtime.config import Config, load
from atoll.runtime.files import lock_exclusively
from atoll.runtime.httpserver import listening
from atoll.runtime.keeping import KeptInFiles
from atoll.runtime.logs import configure
from atoll.runtime.systemd import notify_ready
from atoll.storage.host import StorageHost

log = structlog.get_logger()


def make_hypervisor(config: Config) -> Hypervisor:
    """The hypervisor that the configuration names."""
    if config.hypervisor == "fake":
        from atoll.hypervisor.fake import FakeHypervisor

        return FakeHypervisor(config.run_dir / "guests", config.tls_dir, config.address, config.node)
    from atoll.hypervisor.qemu import QemuHypervisor

    qemu = QemuHypervisor(config.run_dir, config.tls_dir, config.address, config.node, config.guest_user)
    if config.migration_bandwidth:
        qemu.tuning.bandwidth = config.migration_bandwidth
    return qemu


async def tidy(agent: Agent) -> None:
    """End what nobody remembers any more. A node that cannot do that now serves all the same."""
    try:
        if gone := await agent.attachments.unmap_forgotten():
            log.warning("ended forgotten mappings", volumes=gone)
    except AtollError as error:
        log.warning("mappings that nobody remembers may be left", error=error.message)


async def run(config: Config, path: str = "") -> None:
    """Serve until SIGTERM or SIGINT. Guests are never touched by the end of the agent. ``path``: the configuration's file."""
    if not config.node or not (config.tls_dir / "cert.pem").exists():
        raise InvalidInput("this node belongs to no cluster", hint="atoll cluster init, or atoll node join")
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = lock_exclusively(config.state_dir / "agent.lock")
    storage = StorageHost(guest_user=config.guest_user, run_dir=str(config.run_dir))
    memory = Memory(open_database(config.state_dir / "agent.db"), certs.owner((config.tls_dir / "cert.pem").read_text()))
    copying = CopyOrders(storage, config.tls_dir, config.run_dir, config.address)
    looks = LookOrders(config, storage, path)
    more = {**looks.handlers(), **copying.handlers(), **ImageOrders(copying, config.tls_dir).handlers(), **SeedOrders(copying).handlers()}
    more |= ExportOrders(copying).handlers()
    scripts = OsOrders(config.os_dirs, memory, config.run_dir, config.log_dir, config.node)
    more |= scripts.handlers()
    deploying = DeployOrders(config.state_dir, config.etc_dir)
    more |= deploying.handlers()
    standby = StandbyOrders.of(config)
    certificates = CertificateOrders(KeptInFiles(config.tls_dir), config.node, config.address)
    hypervisor = make_hypervisor(config)
    agent = Agent(config.node, hypervisor, storage, memory, config.run_dir, more, standby=standby, certificates=certificates)
    scripts.still = agent.contact.check
    await tidy(agent)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with listening(
        create_app(agent.service), host=config.address, port=config.agent_port, tls_dir=config.tls_dir, need_certificate=True
    ):
        beat = asyncio.create_task(agent.reporter.send(config))
        keep = asyncio.create_task(deploying.keep())
        notify_ready()
        log.info("agent serves", node=config.node, address=config.address, port=config.agent_port, term=memory.term)
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({beat, keep, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in (beat, keep):
            if task.done():
                task.result()
            task.cancel()
    await agent.close()
    del lock


def main() -> None:
    """``atoll-agent [--config PATH]``."""
    parser = argparse.ArgumentParser(prog="atoll-agent", description="The agent of one Atoll node.")
    parser.add_argument("--config", help="configuration file (default /etc/atoll/atoll.toml)")
    options = parser.parse_args()
    try:
        config = load(options.config)
        configure(config.log_level)
        asyncio.run(run(config, options.config or os.environ.get("ATOLL_CONFIG", "")))
    except AtollError as error:
        print(f"Error: {error.message}\nNext: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
