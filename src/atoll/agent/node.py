"""An agent put together: memory, storage, hypervisor and the handlers of all orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll import __version__
from atoll.agent.certificates import CertificateOrders
from atoll.agent.contact import Contact, since_boot
from atoll.agent.disks import Attachments, StorageOrders
from atoll.agent.guests import GuestOrders
from atoll.agent.memory import Memory
from atoll.agent.report import Reporter
from atoll.agent.service import Handler, Service
from atoll.agent.standby import StandbyOrders
from atoll.hypervisor.contract import Hypervisor
from atoll.model.messages import Recalled, ReplicaState
from atoll.rpc.contract import Report
from atoll.storage.contract import StorageAccess


class Agent:
    """One node's agent. ``run_dir`` None: attachments are remembered in ``kept`` (simulations). ``more``: handlers of further orders;
    ``standby``: what makes this node fit to become the master."""

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
        standby: StandbyOrders | None = None,
        certificates: CertificateOrders | None = None,
    ) -> None:
        attachments = Attachments(storage, run_dir, kept)
        self.contact = Contact(memory, now)
        handlers = {
            **StorageOrders(storage, attachments, memory).handlers(),
            **GuestOrders(hypervisor, memory, attachments, storage, self.contact).handlers(),
            **(certificates.handlers() if certificates else {}),
            **(more or {}),
            **(standby.handlers() if standby else {}),
            "recall": self._recall,
        }
        self._node, self._standby, self.attachments = node, standby, attachments
        self.hypervisor, self.storage, self.memory, self.certificates = hypervisor, storage, memory, certificates
        self.reporter = Reporter(node, hypervisor, memory, storage, self.contact, attachments, standby, certificates)
        if standby:
            standby.told = self.reporter.news
        self.service = Service(node, memory, handlers, self.contact, self.reporter.news)

    async def _recall(self, args: dict[str, Any], report: Report) -> Any:
        """Everything that a master must know which begins from a copy of the store."""
        standby = self._standby
        return Recalled(
            node=self._node,
            term=self.memory.term,
            job=self.memory.highest_job(),
            refused=self.memory.all_refused(),
            guests=await self.hypervisor.guests(),
            running=self.service.running,
            heard=self.contact.silence(),
            master_pid=standby.master_pid() if standby else None,
            masters=list(standby.masters) if standby else [],
            replica=standby.state if standby else ReplicaState(),
            version=__version__,
        ).model_dump(mode="json")

    async def close(self) -> None:
        """End the agent; guests go on."""
        await self.service.stop()
        await self.storage.close()
        self.memory.close()
