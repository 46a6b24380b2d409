"""Orders that keep a master candidate fit to become the master: its copy of the store, its keys; and whom every node follows."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from atoll.agent.replica import Change, Replica
from atoll.agent.service import Handler
from atoll.model.errors import HostError, InUse, InvalidInput
from atoll.model.messages import ReplicaState
from atoll.rpc.contract import Report
from atoll.runtime.config import Config
from atoll.runtime.files import fsync_dir, lock_holder, write_durably
from atoll.runtime.masters import read_masters, write_masters

log = structlog.get_logger()
#: What a candidate is given at least: the certificate authority and the key that seals secrets. Its own master certificate it makes
#: with them.
KEY_FILES = frozenset({"ca.pem", "ca.key", "master.key"})
_NAME = re.compile(r"[a-z][a-z0-9._-]*")
Run = Callable[[Callable[[], Any]], Awaitable[Any]]


class StandbyOrders:
    """Handlers of ``replica.*`` and ``master.follow``. ``run`` carries out what waits for a disk; simulations do it at once."""

    def __init__(
        self,
        replica: Replica,
        keys: Path,
        former: tuple[Path, ...],
        state_dir: Path,
        masters: tuple[str, ...],
        run: Run = asyncio.to_thread,
    ) -> None:
        """``keys``: the directory for a candidate's keys; ``former``: what a node keeps of having been the master."""
        self._replica, self._keys, self._former, self._state_dir, self._run = replica, keys, former, state_dir, run
        self.masters = read_masters(state_dir) or masters
        self.state = replica.state.model_copy(update={"keys": self._holds_keys()})
        #: Called when the node follows another master.
        self.told: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, config: Config) -> StandbyOrders:
        """That of this node."""
        former = (config.master_tls_dir, config.etc_dir / "master.key")
        return cls(Replica(config.replica_dir), config.candidate_dir, former, config.state_dir, config.masters)

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "replica.keys": self.keys,
            "replica.part": self.part,
            "replica.append": self.append,
            "replica.forget": self.forget,
            "master.follow": self.follow,
        }

    def master_pid(self) -> int | None:
        """The process that leads on this node; None = none does."""
        return lock_holder(self._state_dir / "store" / "lock")

    def _holds_keys(self) -> bool:
        return any(path.exists() for path in (self._keys, *self._former))

    async def keys(self, args: dict[str, Any], report: Report) -> Any:
        """Take the keys (``keyring``: file name -> text). Having them already is success. Errors: InvalidInput, HostError."""
        keyring: dict[str, str] = args["keyring"]
        if not set(keyring) >= KEY_FILES or not all(_NAME.fullmatch(name) for name in keyring):
            raise InvalidInput("these are not the keys of a master", hint="upgrade this agent")
        await self._run(lambda: self._write_keys(keyring))
        self.state = self.state.model_copy(update={"keys": True})
        return self.state.model_dump(mode="json")

    def _write_keys(self, keyring: dict[str, str]) -> None:
        try:
            self._keys.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._keys.chmod(0o700)
        except OSError as error:
            raise HostError(f"cannot make {self._keys}: {error.strerror}") from None
        for name, text in keyring.items():
            path = self._keys / name
            if not path.exists() or path.read_text() != text or path.stat().st_mode & 0o077:
                write_durably(path, text)
        for path in self._keys.iterdir():
            if path.name not in keyring:
                path.unlink()

    async def part(self, args: dict[str, Any], report: Report) -> Any:
        """A part of a base copy; see ``Replica.part``."""
        data = base64.b64decode(args["data"])
        numbers = (args["stream"], args["number"], args["part"], args["parts"])
        about = {"sha256": args["sha256"], "at": args["at"], "master": args.get("master", "")}
        return await self._changed(lambda: self._replica.part(*numbers, data, about))

    async def append(self, args: dict[str, Any], report: Report) -> Any:
        """Changes; see ``Replica.append``. None of them: only a look at the state."""
        changes = [(Change(c["number"], c["after"], base64.b64decode(c["data"]), c["at"]), c["sha256"]) for c in args["changes"]]
        return await self._changed(lambda: self._replica.append(args["stream"], changes))

    async def _changed(self, work: Callable[[], ReplicaState]) -> Any:
        found: ReplicaState = await self._run(work)
        self.state = found.model_copy(update={"keys": self.state.keys})
        return self.state.model_dump(mode="json")

    async def forget(self, args: dict[str, Any], report: Report) -> Any:
        """The role was taken away: remove the keys, first of all, and the copy. Errors: InUse when a master works here, HostError."""
        pid = self.master_pid()
        if pid is not None:
            raise InUse(f"a master works on this node (process {pid})", hint="stop it: systemctl disable --now atoll-master")
        await self._run(self._remove)
        self.state = ReplicaState()
        log.info("no master candidate any more")
        return self.state.model_dump(mode="json")

    def _remove(self) -> None:
        try:
            for path in (self._keys, *self._former):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                fsync_dir(path.parent)
        except OSError as error:
            raise HostError(f"cannot remove the keys of a master: {error.strerror}") from None
        self._replica.forget()

    async def follow(self, args: dict[str, Any], report: Report) -> Any:
        """Report to these masters from now on."""
        masters = tuple(str(url) for url in args["masters"])
        if masters != self.masters:
            await self._run(lambda: write_masters(self._state_dir, masters, args["term"]))
            log.info("following another master", masters=masters, term=args["term"])
            self.masters = masters
        self.told()
