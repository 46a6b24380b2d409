"""The drivers of one node, each pool in its own worker: a share that hangs stops neither the agent nor other pools."""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.model.messages import PoolRef
from atoll.runtime.worker import Worker

_MODULE = "atoll.storage.calls"
#: Methods whose effect lives in the process that carried them out: they always go to the same child.
_STICKY = frozenset({"probe_writers"})


class StorageHost:
    """See ``StorageAccess``. ``guest_user``: the user that new images are given to, as guests run as it."""

    def __init__(self, guest_user: str = "") -> None:
        self._environment = {"ATOLL_GUEST_USER": guest_user}
        self._workers: dict[str, Worker] = {}

    def _worker(self, pool: str, method: str) -> Worker:
        key = f"{pool}/sticky" if method in _STICKY else pool
        if key not in self._workers:
            lanes = 1 if method in _STICKY else 3
            self._workers[key] = Worker(f"pool {pool}", _MODULE, lanes=lanes, environment=self._environment)
        return self._workers[key]

    async def pool(self, ref: PoolRef, method: str, deadline: float, **args: Any) -> Any:
        """See ``StorageAccess``."""
        worker = self._worker(ref.id, method)
        result = await worker.call("pool", deadline, ref=ref.model_dump(mode="json"), method=method, args=args)
        if method == "forget":
            for key in (ref.id, f"{ref.id}/sticky"):
                if key in self._workers:
                    await self._workers.pop(key).close()
        return result

    async def connector(self, pool: str, driver: str, method: str, deadline: float, **args: Any) -> Any:
        """See ``StorageAccess``."""
        return await self._worker(pool, method).call("connector", deadline, driver=driver, method=method, args=args)

    def stalled(self) -> dict[str, str]:
        """See ``StorageAccess``."""
        return {key.partition("/")[0]: why for key, worker in self._workers.items() if (why := worker.stalled())}

    async def close(self) -> None:
        """See ``StorageAccess``."""
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
