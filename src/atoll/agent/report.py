"""The agent's heartbeat: what runs here and how much room there is."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import structlog

from atoll import __version__
from atoll.agent.certificates import CertificateOrders
from atoll.agent.contact import Contact
from atoll.agent.disks import Attachments
from atoll.agent.memory import Memory
from atoll.agent.standby import StandbyOrders
from atoll.hypervisor.contract import Hypervisor
from atoll.model.errors import AtollError
from atoll.model.messages import PROTOCOL, NodeReport, ReplicaState
from atoll.runtime.config import Config
from atoll.runtime.tls import fresh_client
from atoll.storage.contract import StorageAccess

log = structlog.get_logger()


def memory() -> tuple[int, int]:
    """Total and available memory of this machine, in bytes (/proc/meminfo)."""
    values = {}
    with open("/proc/meminfo", "rb", buffering=0) as file:
        # What is wanted stands in the first three of its fifty lines.
        first = file.read(512).decode().splitlines()[:3]
    for line in first:
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values["MemTotal"], values["MemAvailable"]


class Reporter:
    """Makes reports and sends them."""

    def __init__(
        self,
        node: str,
        hypervisor: Hypervisor,
        remembered: Memory,
        storage: StorageAccess,
        contact: Contact,
        attachments: Attachments,
        standby: StandbyOrders | None = None,
        certificates: CertificateOrders | None = None,
    ) -> None:
        self._certificates = certificates
        self._node, self._hypervisor, self._memory, self._storage = node, hypervisor, remembered, storage
        self._contact, self._attachments, self._standby = contact, attachments, standby
        self._accelerator = ""
        self._boot_id = ""
        self._news = asyncio.Event()

    def news(self) -> None:
        """Something changed here: report at once."""
        self._news.set()

    async def make(self) -> NodeReport:
        """One report."""
        if not self._accelerator:
            self._accelerator = await self._hypervisor.probe()
            self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        total, free = memory()
        return NodeReport(
            node=self._node,
            term=self._memory.term,
            version=__version__,
            protocol=PROTOCOL,
            clock=time.time(),
            boot_id=self._boot_id,
            memory_total=total,
            memory_free=free,
            cpus=os.cpu_count() or 1,
            guests=[self._attachments.seen(guest) for guest in await self._hypervisor.guests()],
            stalled_pools=self._storage.stalled(),
            stalled_for=self._storage.stalled_for(),
            accelerator=self._accelerator,
            replica=self._standby.state if self._standby else ReplicaState(),
            **(self._certificates.facts() if self._certificates else {}),
        )

    async def send(self, config: Config) -> None:
        """Report to every master, for ever; a master that does not answer is tried again at the next beat."""
        silent: set[str] = set()
        context = fresh_client(config.tls_dir)
        while True:
            # A connection keeps the certificate with which it began: with a new one comes a new connection.
            version = context.refresh()
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, limit=0)) as session:
                while context.refresh() == version:
                    self._news.clear()
                    try:
                        body = (await self.make()).model_dump_json()
                        for url in self._standby.masters if self._standby else config.masters:
                            await self._post(session, url, body, silent)
                    except AtollError as error:
                        log.warning("no report", error=error.message)
                    try:
                        await asyncio.wait_for(self._news.wait(), config.heartbeat)
                    except TimeoutError:
                        continue

    async def _post(self, session: aiohttp.ClientSession, url: str, body: str, silent: set[str]) -> None:
        sent = self._contact.now()
        try:
            async with session.post(
                f"{url}/agent/v1/report",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=3.0),
            ) as answer:
                if answer.status == 200:
                    said = await answer.json()
                    self._contact.heard(sent, said["term"], said.get("dead", False))
                    silent.discard(url)
                elif url not in silent:
                    silent.add(url)
                    log.warning("the master refuses the report", master=urlsplit(url).netloc, status=answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if url not in silent:
                silent.add(url)
                log.warning("the master does not answer", master=urlsplit(url).netloc, error=str(error) or type(error).__name__)
