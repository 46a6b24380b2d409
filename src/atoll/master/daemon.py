"""The master as a daemon."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import structlog

from atoll.api.rest.app import create_app
from atoll.master.admission import Admission
from atoll.master.auditing import ends_of_jobs, findings
from atoll.master.authority import CertificateAuthority
from atoll.master.leader import MasterLeader
from atoll.master.recall import check_leads, note_deposed, refuse_deposed
from atoll.master.setup import own_url, read_keyring, store_dir
from atoll.model.errors import AtollError, HostError, InvalidInput
from atoll.model.objects import Cluster
from atoll.rpc.https import HttpsTransport
from atoll.runtime.audit import AuditLog
from atoll.runtime.clock import SystemClock
from atoll.runtime.config import Config, load
from atoll.runtime.httpserver import listening
from atoll.runtime.logs import configure
from atoll.runtime.secrets import SecretBox
from atoll.runtime.systemd import notify_ready
from atoll.runtime.tls import fresh_client
from atoll.store.cache import LeaderStore
from atoll.store.sqlite import SqliteStore

log = structlog.get_logger()
#: Seconds after which a thread that computes lets another one go on. Python's own 5 ms would be added to each of the store's transactions
#: while the event loop is busy: its thread needs the interpreter again after each call into SQLite.
SWITCH = 0.0005


async def run(config: Config) -> None:
    """Lead until SIGTERM or SIGINT, or until deposed. Errors: Deposed when another master has taken over."""
    if not store_dir(config).is_dir():
        raise InvalidInput("this machine is no master", hint="atoll cluster init NAME; on a candidate: atoll cluster master-failover")
    store = await SqliteStore.open(store_dir(config))
    transport = HttpsTransport(fresh_client(config.master_tls_dir))
    try:
        await check_leads(store, store_dir(config), transport)
        leading = await LeaderStore.open(store, before_upgrade=lambda _, new: store.backup(store_dir(config) / f"before-layout-{new}.db"))
        if leading.get(Cluster, "cluster") is None:
            raise InvalidInput("the cluster was not made completely", hint="atoll cluster init NAME, again")
        await _lead(config, leading, transport)
    finally:
        await transport.close()
        await store.close()


async def _lead(config: Config, leading: LeaderStore, transport: HttpsTransport) -> None:
    clock = SystemClock()
    authority = await CertificateAuthority.load(leading, config, clock)
    try:
        # First of all: what this master shows and trusts may be from before the CA was changed.
        authority.settle()
    except HostError as error:
        # It may be good enough, and the keeper tries again.
        log.error("the master's own certificate cannot be kept fresh", error=error.message)
    audit = AuditLog(config.log_dir / "audit.jsonl", clock.now)
    leader = MasterLeader(
        leading,
        transport,
        clock,
        admission=Admission(authority, (own_url(config),)),
        secrets=SecretBox.load_or_create(config.etc_dir / "master.key"),
        node=config.node,
        url=own_url(config),
        keyring=lambda: read_keyring(config),
    )
    leading.listeners.append(ends_of_jobs(audit))
    leader.more_findings.append(lambda: findings(audit))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await leader.start()
    async with listening(
        create_app(leader, log=audit),
        socket_path=config.api_socket,
        host=config.address,
        port=config.master_port,
        tls_dir=config.master_tls_dir,
    ):
        notify_ready()
        log.info("master serves", node=config.node, port=config.master_port, term=leading.term)
        waits = {asyncio.create_task(stop.wait()), asyncio.create_task(leading.deposed_event.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await leader.stop()
    audit.close()
    if leading.superseded:
        note_deposed(store_dir(config), leading.why_deposed)
        refuse_deposed(store_dir(config))


def main() -> None:
    """``atoll-master [--config PATH]``."""
    parser = argparse.ArgumentParser(prog="atoll-master", description="The master of an Atoll cluster.")
    parser.add_argument("--config", help="configuration file (default /etc/atoll/atoll.toml)")
    options = parser.parse_args()
    try:
        config = load(options.config)
        configure(config.log_level)
        sys.setswitchinterval(SWITCH)
        asyncio.run(run(config))
    except AtollError as error:
        print(f"Error: {error.message}\nNext: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
