"""From a request to a durable job: job, lock request and idempotency key in one transaction."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atoll.jobs.steps import args_hash
from atoll.model.errors import Held, InvalidInput, KeyReused
from atoll.model.objects import Hold, IdempotencyKey, Job

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine


class Submitter:
    """Makes jobs. ``next_number`` is the number of the next one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.next_number = max((job.number for job in engine.store.all(Job)), default=0) + 1

    def prepare(self, operation: str, target: str, request: dict[str, Any], *, who: str, parent: int | None = None, key: str = "") -> Job:
        """Check the request against the present state and make the job's record; nothing is written.

        Errors: those of the operation's ``prepare``; InvalidInput; Held.
        """
        found = self._engine.operation(operation)
        try:
            parsed = found.request.model_validate(request)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "request"
            raise InvalidInput(f"{where}: {first['msg']}") from None
        prepared = found.prepare(self._engine.state, target, parsed)
        for resource in (*prepared.locks.exclusive, *prepared.locks.shared):
            hold = self._engine.store.get(Hold, resource)
            if hold is not None:
                raise Held(
                    f"{resource} is held by job {hold.job}: {hold.reason}", hint="; ".join(hold.commands), job=hold.job, resource=resource
                )
        number = self.next_number
        self.next_number += 1
        return Job(
            id=f"{number:010d}",
            operation=operation,
            version=found.version,
            request=prepared.frozen,
            locks=prepared.locks,
            key=key,
            who=who,
            parent=parent,
            created=self._engine.clock.now(),
            deadline=found.deadline,
            summary=prepared.summary,
        )

    async def submit(self, operation: str, target: str, request: dict[str, Any], *, who: str, key: str = "") -> tuple[Job, bool]:
        """Make it a job, durably. True: the same key came before, and this is its job. Errors: KeyReused, those of ``prepare``."""
        store = self._engine.store
        digest = args_hash(operation, target, request)
        key_id = hashlib.sha256(key.encode()).hexdigest() if key else ""
        if key:
            before = store.get(IdempotencyKey, key_id)
            if before is not None:
                if before.digest != digest:
                    raise KeyReused(f"the idempotency key was used for job {before.job}, with another request")
                return self._engine.job(before.job), True
        job = self.prepare(operation, target, request, who=who, key=key_id)
        await store.write(put=[job, *([IdempotencyKey(id=key_id, job=job.number, digest=digest)] if key else [])])
        self._engine.admit(job)
        return job, False
