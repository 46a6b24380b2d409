"""Questions about the node itself: what a doctor finds, what was left behind, and the end of the logs. They change nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.agent.service import Handler
from atoll.monitor import doctor, logs
from atoll.rpc.contract import Report
from atoll.runtime.config import Config
from atoll.runtime.worker import Worker
from atoll.storage.contract import StorageAccess

#: Seconds to look through /proc.
_QUICK = 10.0


class LookOrders:
    """Handlers of ``node.look``, ``node.remains`` and ``node.logs``."""

    def __init__(self, config: Config, storage: StorageAccess, path: str = "") -> None:
        self._config, self._storage, self._path = config, storage, path

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"node.look": self.look, "node.remains": self.remains, "node.logs": self.logs}

    async def look(self, args: dict[str, Any], report: Report) -> Any:
        """See ``doctor.examine``."""
        return await doctor.examine(self._config, self._path, storage=self._storage)

    async def remains(self, args: dict[str, Any], report: Report) -> Any:
        """See ``residue.found``."""
        worker = Worker("remains", "atoll.monitor.residue", lanes=1)
        try:
            return await worker.call("remaining", _QUICK, run_dir=str(self._config.run_dir))
        finally:
            await worker.close()

    async def logs(self, args: dict[str, Any], report: Report) -> Any:
        """See ``logs.collect``."""
        return await asyncio.to_thread(logs.collect, self._config, int(args.get("limit", logs.LIMIT)))
