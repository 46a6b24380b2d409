"""An agent put together: memory, storage, hypervisor and the handlers of all orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.agent.contact import Contact, since_boot
from atoll.agent.disks import Attachments, StorageOrders
from atoll.agent.guests import GuestOrders
from atoll.agent.memory import Memory
from atoll.agent.report import Reporter
from atoll.agent.service import Handler, Service
from atoll.hypervisor.contract import Hypervisor
from atoll.storage.contract import StorageAccess


class Agent:
    """One node's agent. ``run_dir`` None: attachments are remembered in ``kept`` (simulations). ``more``: handlers of further orders."""

    def __init__(
        self,
        node: str,
        hypervisor: Hypervisor,
        storage: StorageAccess,
        memory: Memory,
        run_dir: Path | None,
        more: dict[str, Handler] | None = None,
        kept: dict[str, Any] | None = None,
        now: Callable[[], float] = since_boot,
    ) -> None:
        attachments = Attachments(storage, run_dir, kept)
        self.contact = Contact(memory, now)
        handlers = {
            **StorageOrders(storage, attachments).handlers(),
            **GuestOrders(hypervisor, memory, attachments, storage, self.contact).handlers(),
            **(more or {}),
        }
        self.hypervisor, self.storage, self.memory = hypervisor, storage, memory
        self.reporter = Reporter(node, hypervisor, memory, storage, self.contact)
        self.service = Service(node, memory, handlers, self.contact, self.reporter.news)

    async def close(self) -> None:
        """End the agent; guests go on."""
        await self.service.stop()
        await self.storage.close()
        self.memory.close()
