"""From a request to a durable job: job, lock request and idempotency key in one transaction."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atoll.jobs.context import unbroken
from atoll.jobs.steps import args_hash
from atoll.model.errors import UNKNOWN_OUTCOME, AtollError, Held, InvalidInput, KeyReused
from atoll.model.objects import KINDS, Hold, IdempotencyKey, Instance, Job

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine


class Submitter:
    """Makes jobs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._durable = max((int(ident) for ident in engine.store.ids(Job)[-1:]), default=0)
        self._next = self._durable + 1
        #: Numbers whose jobs are being written now.
        self._writing: set[int] = set()
        #: Idempotency keys whose jobs are being written now.
        self._keys: dict[str, asyncio.Event] = {}

    def not_before(self) -> int:
        """No job with a smaller number will begin any more. The next leader gives numbers again whose jobs never became durable."""
        return min(self._writing, default=self._durable + 1)

    async def write(self, job: Job, work: Awaitable[None]) -> None:
        """Let ``work`` make a job with a new number durable, then admit it: both or neither, even if the waiting task is cancelled."""
        number = job.number
        self._next = max(self._next, number + 1)
        self._writing.add(number)

        async def land() -> None:
            try:
                await work
            except UNKNOWN_OUTCOME:
                raise  # it may be durable: its number stays open until the next leader knows
            except AtollError:
                self._writing.discard(number)
                raise
            self._durable = max(self._durable, number)
            self._engine.admit(job)
            self._writing.discard(number)

        await unbroken(land())

    def prepare(self, operation: str, target: str, request: dict[str, Any], *, who: str, parent: int | None = None, key: str = "") -> Job:
        """Check the request against the present state and make the job's record; nothing is written. Its number is taken by ``write``.

        Errors: those of the operation's ``prepare``; InvalidInput; Held.
        """
        found = self._engine.operation(operation)
        try:
            parsed = found.request.model_validate(request)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "request"
            raise InvalidInput(f"{where}: {first['msg']}") from None
        # First of all: whatever else stands against the request, a job that holds its object is what the person must hear of.
        self._refuse_held(self._resources_of(operation.split(".")[0], target))
        prepared = found.prepare(self._engine.state, target, parsed)
        self._refuse_held((*prepared.locks.exclusive, *prepared.locks.shared))
        return Job(
            id=f"{self._next:010d}",
            operation=operation,
            version=found.version,
            request=prepared.frozen,
            locks=prepared.locks,
            key=key,
            who=who,
            parent=parent,
            created=self._engine.clock.now(),
            deadline=prepared.deadline or found.deadline,
            summary=prepared.summary,
        )

    def _resources_of(self, noun: str, target: str) -> list[str]:
        """The resource that the target names, if it exists."""
        store = self._engine.store
        found = [store.get(cls, target) or store.by_name(cls, target) for cls in KINDS if cls.noun == noun]
        return [item.resource for item in found if item is not None]

    def _refuse_held(self, resources: Iterable[str], but: int = 0) -> None:
        for resource in resources:
            hold = self._engine.store.get(Hold, resource)
            if hold is not None and hold.job != but:
                raise Held(
                    f"{resource} is held by job {hold.job}: {hold.reason}", hint="; ".join(hold.commands), job=hold.job, resource=resource
                )

    async def submit(self, operation: str, target: str, request: dict[str, Any], *, who: str, key: str = "") -> tuple[Job, bool]:
        """Make it a job, durably. True: the same key came before, and this is its job. Errors: KeyReused, those of ``prepare``."""
        digest = args_hash(operation, target, request)
        if not key:
            return await self._new(operation, target, request, digest, who, ""), False
        key_id = hashlib.sha256(key.encode()).hexdigest()
        while key_id in self._keys:
            await self._keys[key_id].wait()
        before = self._engine.store.get(IdempotencyKey, key_id)
        if before is not None:
            if before.digest != digest:
                raise KeyReused(f"the idempotency key was used for job {before.job}, with another request")
            return self._engine.job(before.job), True
        done = self._keys[key_id] = asyncio.Event()
        try:
            return await self._new(operation, target, request, digest, who, key_id), False
        finally:
            del self._keys[key_id]
            done.set()

    async def _new(self, operation: str, target: str, request: dict[str, Any], digest: str, who: str, key: str) -> Job:
        job = self.prepare(operation, target, request, who=who, key=key)
        keys = [IdempotencyKey(id=key, job=job.number, digest=digest)] if key else []
        await self.write(job, self._engine.store.write(put=[job, *keys]))
        return job

    # --- when the locks are granted ---

    def check_holds(self, job: Job) -> None:
        """Its turn has come: does another job that needs attention hold what it needs? Errors: Held."""
        self._refuse_held((*job.locks.exclusive, *job.locks.shared), but=job.number)

    def check_again(self, job: Job) -> tuple[str, ...]:
        """The job has waited for its locks: does its request still fit? Gives the locks that it needs, too, by now, such as on a disk that
        its instance got meanwhile. Errors: those of the operation's ``prepare``.
        """
        operation = self._engine.operation(job.operation)
        if not operation.public or operation.version != job.version:
            return ()
        fields = {name: value for name, value in job.request.items() if name in operation.request.model_fields}
        prepared = operation.prepare(self._engine.state, job.request.get("id", ""), operation.request.model_validate(fields))
        # Names that are chosen anew are checked where they are given; an instance that is not there yet has got another id now.
        new = [name for name in prepared.locks.exclusive if not name.startswith("name:") and name not in job.locks.exclusive]
        return tuple(name for name in new if not name.startswith("instance:") or self._engine.store.get(Instance, name[9:]))
