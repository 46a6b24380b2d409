"""The drivers of one node, each pool in its own worker: a share that hangs stops neither the agent nor other pools.

A pool whose storage gave no answer to a call is *stalled*: calls to it are refused at once instead of waiting, each, for their deadlines.
It is asked how it is until it answers; then it is as before. Calls that are under way are left alone meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from atoll.model.errors import UNKNOWN_OUTCOME, AtollError, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.runtime.worker import LONG, STALLED_HINT, Told, Worker, nobody

log = structlog.get_logger()
_MODULE = "atoll.storage.calls"
#: Methods whose effect lives in the process that carried them out: they always go to the same child.
_STICKY = frozenset({"probe_writers"})
#: Methods that are asked also while the pool is stalled, and say nothing of whether it is: they have a child of their own.
_WATCHING = frozenset({"health"})
#: Seconds without an answer that make a pool stalled; seconds between questions to it, for the first of them, and for each at most.
SILENT, PROBE, PATIENCE, LONGEST = 5.0, 5.0, 5.0, 30.0


def _silence(error: AtollError) -> bool:
    """Whether a driver says by it that it waited for its storage in vain."""
    return bool(error.details.get("silent"))


class _Pool:
    """One pool's workers, and since when it is silent."""

    def __init__(self, ident: str, environment: dict[str, str]) -> None:
        self.ident, self.name, self.ref = ident, ident, {}  # type: str, str, dict[str, Any]
        self.worker = Worker(f"pool {ident}", _MODULE, environment=environment, key=ident)
        self.sticky = Worker(f"pool {ident}", _MODULE, lanes=1, environment=environment, key=f"{ident}/sticky", beside=self.worker)
        self.watch = Worker(f"pool {ident}", _MODULE, lanes=1, environment=environment, key=f"{ident}/watch")
        self._since: float | None = None
        self._silent_in = ""
        self._probing: asyncio.Task[None] | None = None

    def know(self, ref: PoolRef) -> None:
        self.name, self.ref = ref.name, ref.model_dump(mode="json")
        self.worker.name = self.sticky.name = self.watch.name = f"pool {ref.name}"

    async def call(self, function: str, what: str, deadline: float, told: Told = nobody, **args: Any) -> Any:
        if what in _WATCHING:
            return await self.watch.call(function, deadline, method=what, **args)
        if why := self.stalled():
            raise PoolUnavailable(f"pool {self.name} is stalled: {why[0]}", hint=STALLED_HINT.replace("POOL", self.name))
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def begun() -> None:
            # From here on the storage is asked; a place in a long queue says nothing of it. Nor does a call that may write for an hour.
            nonlocal timer
            if deadline <= LONG:
                timer = loop.call_later(SILENT, self._silent, loop.time(), what)

        try:
            worker = self.sticky if what in _STICKY else self.worker
            result = await worker.call(function, deadline, told, begun=begun, method=what, **args)
        except UNKNOWN_OUTCOME:
            raise
        except AtollError as error:
            if not _silence(error):
                self._answered()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._answered()
        return result

    def stalled(self) -> tuple[str, float] | None:
        """Why it is stalled, and for how many seconds; None if it is not."""
        hanging, seconds = self.worker.hanging()
        if self._since is not None:
            words = f"no answer to {self._silent_in}" + (f"; {hanging}" if hanging else "")
            return words, asyncio.get_running_loop().time() - self._since
        return (hanging, seconds) if self.worker.stalled() else None

    def _silent(self, began: float, what: str) -> None:
        if self._since is None:
            self._since, self._silent_in = began, what
            log.error("pool is stalled", pool=self.name, no_answer_to=what)
            self._probing = asyncio.get_running_loop().create_task(self._probe())

    def _answered(self) -> None:
        if self._since is not None:
            log.warning("pool answers again", pool=self.name, after=round(asyncio.get_running_loop().time() - self._since))
        self._since = None

    async def _probe(self) -> None:
        """Ask until it answers. Where all lanes are lost, there is nobody to ask until one comes back.

        Each question gets more time: whom it was put to is ended with it, and the next one may have to begin anew, with a connection, on
        a machine that is busy or with a storage that is only coming back.
        """
        patience = PATIENCE
        while self._since is not None:
            if not self.worker.stalled() and await self._speaks(patience):
                self._answered()
            else:
                patience = min(2 * patience, LONGEST)
                await asyncio.sleep(PROBE)

    async def _speaks(self, patience: float) -> bool:
        try:
            if self.ref:  # else: nobody has said yet what it is; the next call will show
                await self.worker.call("pool", patience, ref=self.ref, method="space", args={})
        except UNKNOWN_OUTCOME:
            return False
        except AtollError as error:
            return not _silence(error)
        return True

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        await asyncio.gather(self.worker.close(), self.sticky.close(), self.watch.close())


class StorageHost:
    """See ``StorageAccess``. ``guest_user``: the user that new images are given to, as guests run as it. ``run_dir``: for what is there
    while a volume is attached."""

    def __init__(self, guest_user: str = "", run_dir: str = "") -> None:
        self._environment = {"ATOLL_GUEST_USER": guest_user, "ATOLL_RUN_DIR": run_dir}
        self._pools: dict[str, _Pool] = {}

    def _pool(self, ident: str) -> _Pool:
        if ident not in self._pools:
            self._pools[ident] = _Pool(ident, self._environment)
        return self._pools[ident]

    async def pool(self, ref: PoolRef, method: str, deadline: float, told: Told = nobody, **args: Any) -> Any:
        """See ``StorageAccess``."""
        pool = self._pool(ref.id)
        pool.know(ref)
        result = await pool.call("pool", method, deadline, told, ref=pool.ref, args=args)
        if method == "forget" and self._pools.pop(ref.id, None) is not None:
            await pool.close()
        return result

    async def connector(self, pool: str, driver: str, method: str, deadline: float, **args: Any) -> Any:
        """See ``StorageAccess``."""
        return await self._pool(pool).call("connector", method, deadline, driver=driver, args=args)

    def stalled(self) -> dict[str, str]:
        """See ``StorageAccess``."""
        return {ident: why[0] for ident, pool in self._pools.items() if (why := pool.stalled())}

    def stalled_for(self) -> dict[str, float]:
        """See ``StorageAccess``."""
        return {ident: why[1] for ident, pool in self._pools.items() if (why := pool.stalled())}

    async def close(self) -> None:
        """See ``StorageAccess``."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))
