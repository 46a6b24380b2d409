"""Runs jobs: grants locks, replays, finishes or undoes them, and holds what cannot be decided."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from heapq import heappop, heappush
from typing import Any

import structlog

from atoll.jobs.context import JobContext, unbroken
from atoll.jobs.locks import LockTable
from atoll.jobs.steps import Attention, Settled
from atoll.jobs.submit import Submitter
from atoll.jobs.undo import UndoFailed, undo_steps
from atoll.model.errors import (
    AtollError,
    Cancelled,
    DeadlineExceeded,
    NodeUnavailable,
    NotFound,
    NotLeader,
    PoolUnavailable,
    StoreError,
    WrongState,
)
from atoll.model.messages import Progress, instance_of
from atoll.model.objects import Hold, IdempotencyKey, Job, JobState, Locks, Step
from atoll.rpc.agents import Agents
from atoll.runtime.clock import Clock
from atoll.store.cache import LeaderStore

log = structlog.get_logger()
#: Pauses between attempts of a committed job that failed, in seconds.
FORWARD_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)
#: Seconds that a job waits when the store has failed.
STORE_PAUSE = 1.0


class Engine:
    """All jobs of one term. ``operation`` finds an operation by name; ``state`` is what operations see of the cluster."""

    def __init__(self, store: LeaderStore, clock: Clock, operation: Callable[[str], Any], state: Any) -> None:
        self.store, self.clock, self.state = store, clock, state
        self.operation = operation
        self.agents: Agents
        self.stopping = False
        #: Called with each progress of a job.
        self.on_progress: Callable[[int, Progress], None] | None = None
        self._locks = LockTable()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._progress: dict[int, Progress] = {}
        self._changed: dict[int, asyncio.Event] = {}
        self._recovering: set[int] = set()
        #: Jobs that must queue again, for more locks.
        self._again: set[int] = set()
        self._records: dict[int, asyncio.Lock] = {}
        #: When each job got its locks; a job that a new leader takes up has its turn anew, in the new term.
        self._turns: dict[int, int] = {}
        self._last_turn = 0
        self._open = {job.number for job in store.active(Job)}
        #: The same as a heap, with some that have ended meanwhile: only its least one is asked for, and that with each order.
        self._oldest = sorted(self._open)
        self.submitter = Submitter(self)

    # --- life ---

    async def start(self, agents: Agents) -> None:
        """Take up every job that has not ended. Jobs that were under way wait for the agents in their journals."""
        self.agents = agents
        await self._drop_old_holds()
        for job in self.store.active(Job):
            if job.state.active:
                granted = job.state is not JobState.QUEUED
                if granted or job.started is not None:
                    self._recovering.add(job.number)
                self._locks.add(job.number, job.locks, parent=job.parent, granted=granted)
                if granted:
                    self._take_turn(job.number)
                    self._spawn(job.number)
        self._grant()

    async def _drop_old_holds(self) -> None:
        """A hold whose job has ended can be released by nobody else."""
        jobs = {job.number for job in self.store.active(Job)}
        old = [hold for hold in self.store.all(Hold) if hold.job not in jobs]
        if old:
            log.error("holds have outlived their jobs; they are dropped", holds=[hold.id for hold in old])
            await self.store.write(delete=old)

    async def stop(self) -> None:
        """Stop working; jobs stay as they are and are taken up by the next start."""
        self.stopping = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def oldest_job(self) -> int:
        """The oldest job that has not ended; orders of older ones are late copies."""
        while self._oldest and self._oldest[0] not in self._open:
            heappop(self._oldest)
        return min([self.submitter.not_before(), *self._oldest[:1]])

    # --- asking ---

    def job(self, number: int) -> Job:
        """A job by number. Errors: NotFound."""
        job = self.store.get(Job, f"{number:010d}")
        if job is None:
            raise NotFound(f"there is no job {number}", hint="atoll job list")
        return job

    def steps(self, number: int) -> list[Step]:
        """The journal of a job that has not ended, in order."""
        return self.store.prefix(Step, f"{number:010d}/")

    def progress(self, number: int) -> Progress:
        """How far a job is."""
        return self._progress.get(number, Progress())

    def set_progress(self, number: int, progress: Progress) -> None:
        """Remember it, and wake those who watch."""
        self._progress[number] = progress
        self._wake(number)
        if self.on_progress is not None:
            self.on_progress(number, progress)

    async def wait(self, number: int, seconds: float) -> Job:
        """The job when it has changed or made progress, or after ``seconds``."""
        job = self.job(number)
        if not job.state.ended and job.state is not JobState.NEEDS_ATTENTION:
            event = self._changed.setdefault(number, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), seconds)
            except TimeoutError:
                pass
        return self.job(number)

    async def ended(self, number: int) -> Job:
        """The job when it has ended or needs attention."""
        while True:
            job = self.job(number)
            if job.state.ended or job.state is JobState.NEEDS_ATTENTION:
                return job
            await self._changed.setdefault(number, asyncio.Event()).wait()

    def busy(self, resource: str) -> bool:
        """Whether a job holds a lock on the resource now."""
        return bool(self._locks.holders(resource))

    def turn(self, number: int, args: dict[str, Any]) -> int:
        """When the job got its locks, counted in this term: for an order about an instance that it has for itself; 0 for others. Jobs
        that share an instance have no order among themselves."""
        instance = instance_of(args)
        alone = instance and f"instance:{instance}" in self.job(number).locks.exclusive
        return self._turns[number] if alone else 0

    def _take_turn(self, number: int) -> None:
        self._last_turn += 1
        self._turns[number] = self._last_turn

    # --- submitting (see submit.py) ---

    def new_job(self, operation: str, target: str, request: dict[str, Any], *, who: str, parent: int) -> Job:
        """Prepare a child's job; the caller writes it by ``submitter.write``."""
        return self.submitter.prepare(operation, target, request, who=who, parent=parent)

    def admit(self, job: Job) -> None:
        """A submitted job is durable: let it ask for its locks."""
        if job.number not in self._open:
            self._open.add(job.number)
            heappush(self._oldest, job.number)
        self._locks.add(job.number, job.locks, parent=job.parent)
        self._grant()

    async def update(
        self,
        number: int,
        fields: dict[str, Any],
        *,
        put: Sequence[Any] = (),
        delete: Sequence[Any] = (),
        check: Callable[[Job], None] = lambda job: None,
    ) -> Job:
        """Change a job's record, one change after the other, together with other objects. Errors: those of ``check``, which sees the
        record that is changed."""

        async def change() -> Job:
            async with self._records.setdefault(number, asyncio.Lock()):
                job = self.job(number)
                check(job)
                job = job.model_copy(update=fields)
                await self.store.write(put=[job, *put], delete=delete)
                return job

        job = await unbroken(change())
        self._wake(number)
        return job

    # --- steering ---

    async def cancel(self, number: int) -> None:
        """Ask a job to stop. Errors: WrongState when it has ended or is past its commit."""
        job = self.job(number)
        _check_cancel(job)
        if job.state is JobState.UNDOING or job.cancel_asked:
            return

        async def ask() -> None:
            await self.update(number, {"cancel_asked": True}, check=_check_cancel)
            task = self._tasks.get(number)
            if task is not None:
                task.cancel()
            elif job.started is None:
                self._spawn(number)  # it has touched nothing yet, so it needs no locks to end

        await unbroken(ask())

    async def resume(self, number: int, *, undo: bool = False) -> None:
        """Let a job that needs attention try again, or undo it. It queues for its locks; its holds stay until it has them."""
        job = self.job(number)
        if job.state is not JobState.NEEDS_ATTENTION:
            raise WrongState(f"job {number} is {job.state}, not needs-attention", hint=f"atoll job info {number}")
        if undo and job.committed:
            raise WrongState(f"job {number} has passed its commit and cannot be undone", hint=f"atoll job resume {number}")
        fields = {"state": JobState.QUEUED, "undoing": job.undoing or undo, "cancel_asked": False, "reason": "", "commands": ()}

        def check(now: Job) -> None:
            if now.state is not JobState.NEEDS_ATTENTION:
                raise WrongState(f"job {number} is {now.state}, not needs-attention", hint=f"atoll job info {number}")

        async def again() -> None:
            queued = await self.update(number, fields, check=check)
            self._recovering.add(number)
            self.admit(queued)

        await unbroken(again())

    async def forget(self, job: Job) -> None:
        """Delete an ended job with its journal and key."""
        keys = [key] if (key := self.store.get(IdempotencyKey, job.key)) is not None else []
        await self.store.forget(job, keys)
        self._progress.pop(job.number, None)

    # --- running ---

    def _grant(self) -> None:
        for number in self._locks.grantable():
            self._take_turn(number)
            if number not in self._tasks:
                self._spawn(number)

    def _spawn(self, number: int) -> None:
        task = asyncio.get_running_loop().create_task(self._live(number), name=f"job {number}")
        self._tasks[number] = task

    async def _live(self, number: int) -> None:
        """Run a job to one of its ends. Whatever happens, it ends or the whole term does."""
        try:
            with structlog.contextvars.bound_contextvars(job=number):
                while not await self._try(number):
                    continue
        except NotLeader as error:
            # Deposed: the next leader takes the job up from its journal.
            log.warning("job left to the next leader", job=number, error=error.message)
        finally:
            if self._tasks.get(number) is asyncio.current_task():
                del self._tasks[number]
            job = self.store.get(Job, f"{number:010d}")
            if not self.stopping and (job is None or not job.state.active):
                if job is None or job.state.ended:
                    self._open.discard(number)
                    self._records.pop(number, None)
                    self._turns.pop(number, None)
                    self._progress.pop(number, None)
                self._locks.remove(number)
                self._wake(number)
                self._grant()
            elif job is not None and number in self._again and not self.stopping:
                self._again.discard(number)
                self._locks.remove(number)
                self._locks.add(number, job.locks, parent=job.parent)
                self._grant()

    async def _try(self, number: int) -> bool:
        """One attempt; False: look at the job's record again."""
        try:
            try:
                await self._work(number)
            except StoreError as error:
                # The store is ill, but nobody else leads: go on from the journal once it is better.
                log.warning("job waits for the store", job=number, error=error.message)
                await asyncio.sleep(STORE_PAUSE)
                return False
            except NotLeader:
                raise
            except Exception as bug:  # whatever happens, a job must not stay without an end
                log.exception("job failed", job=number)
                await self._attend(self.job(number), f"it failed unexpectedly: {type(bug).__name__}: {bug}", ())
        except asyncio.CancelledError:
            # A cancel request. At the end of the term the job stays as it is.
            return self.stopping
        return True

    async def _work(self, number: int) -> None:
        if not self.job(number).state.active:
            return
        if number in self._recovering:
            try:
                await self._interruptible(number, self._recover(number))
            except NodeUnavailable as error:
                await self._attend(self.job(number), error.message, ())
                return
            self._recovering.discard(number)
        job = self.job(number)
        if job.undoing or (job.cancel_asked and not job.committed):
            await self._undo(job, Cancelled(f"job {number} was cancelled"))
            return
        if job.started is None:
            try:
                self.submitter.check_holds(job)
                more = self.submitter.check_again(job)
            except AtollError as error:
                await self._undo(job, error)
                return
            shared = tuple(resource for resource in job.locks.shared if resource not in more)
            locks = Locks(shared=shared, exclusive=tuple(sorted({*job.locks.exclusive, *more})))
            if not self._locks.extend(number, more):
                # Somebody works on what it got meanwhile, such as a disk of its instance: it waits for that, too.
                await self.update(number, {"locks": locks})
                self._again.add(number)
                return
            job = job.model_copy(update={"locks": locks})
        fields = {"state": JobState.RUNNING, "started": job.started or self.clock.now(), "locks": job.locks}
        await self._run(await self.update(number, fields, delete=self._own_holds(job)))

    async def _recover(self, number: int) -> None:
        """Nothing is repeated or undone before every agent in the journal has told what it still does. Errors: NodeUnavailable."""
        nodes = {step.node for step in self.steps(number) if step.node}
        try:
            async with asyncio.timeout(self.job(number).deadline):
                await self.agents.acknowledged(nodes, lambda text: self.set_progress(number, Progress(text=text)))
        except TimeoutError:
            raise NodeUnavailable(f"a node that has worked for it does not answer: {self.progress(number).text}") from None

    async def _run(self, job: Job) -> None:
        operation = self.operation(job.operation)
        attempt = 0
        loop = asyncio.get_running_loop()
        # Counted anew after a restart: the wall clock, which alone spans it, may have jumped.
        end = loop.time() + job.deadline
        while True:
            context = JobContext(self, self.job(job.number), self.steps(job.number))
            try:
                if operation.version != job.version:
                    raise WrongState(f"job {job.number} was begun by another version of {job.operation}")
                async with asyncio.timeout_at(end):
                    result = await operation.run(context, job.request)
                await context.finish({"state": JobState.DONE, "ended": self.clock.now(), "result": result, "error": None})
                return
            except Attention as attention:
                await self._attend(self.job(job.number), attention.message, attention.commands)
                return
            except Settled as settled:
                await context.finish({"state": JobState.UNDONE, "ended": self.clock.now(), "error": settled.cause.to_wire()})
                return
            except asyncio.CancelledError:
                job = self.job(job.number)
                if self.stopping or not job.cancel_asked or not job.state.active:
                    raise
                error: AtollError = Cancelled(f"job {job.number} was cancelled")
            except TimeoutError:
                error = DeadlineExceeded(f"job {job.number} was not done within {job.deadline:g} s")
            except (NotLeader, StoreError):
                raise
            except AtollError as caught:
                error = caught
            except Exception as caught:  # a bug in an operation must not leave its job without an end
                log.exception("operation failed", job=job.number, operation=job.operation)
                error = AtollError(f"{job.operation} failed unexpectedly: {type(caught).__name__}: {caught}")
            job = self.job(job.number)
            if not job.committed:
                await self._undo(job, error)
                return
            pause = FORWARD_PAUSES[min(attempt, len(FORWARD_PAUSES) - 1)]
            attempt += 1
            # A person could only mend the storage, and then the job goes on by itself: it is not asked for anything else.
            waits = isinstance(error, PoolUnavailable)
            if waits:
                self.set_progress(job.number, Progress(text=f"waits for the storage: {error.message}"))
            if (attempt > 5 and not waits) or loop.time() + pause >= end:
                again = f"atoll job resume {job.number}"
                await self._attend(job, f"past its commit, and {error.message}", (again, *error.details.get("commands", ())))
                return
            log.warning("committed job tries again", job=job.number, error=error.message, pause=pause)
            await asyncio.sleep(pause)

    async def _undo(self, job: Job, error: AtollError) -> None:
        update: dict[str, Any] = {"state": JobState.UNDOING, "undoing": True, "started": job.started or self.clock.now()}
        if job.error is None:
            update["error"] = error.to_wire()
        job = await self.update(job.number, update, delete=self._own_holds(job))
        try:
            await self._interruptible(job.number, undo_steps(self, job))
        except UndoFailed as failed:
            await self._attend(self.job(job.number), f"it failed ({error.message}) and cannot be undone: {failed.message}", failed.commands)
            return
        await self.update(job.number, {"state": JobState.UNDONE, "ended": self.clock.now()})

    async def _interruptible(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        """A cancel request must not break off an undo or a recovery: only the end of the term may."""
        task = asyncio.ensure_future(work)
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                if self.stopping or not self.job(number).cancel_asked:
                    task.cancel()
                    raise
        task.result()

    async def _attend(self, job: Job, reason: str, commands: tuple[str, ...]) -> None:
        commands = commands or (f"atoll job resume {job.number}", f"atoll job undo {job.number}")
        holds = [Hold(id=resource, job=job.number, reason=reason, commands=commands) for resource in job.locks.exclusive]
        await self.update(job.number, {"state": JobState.NEEDS_ATTENTION, "reason": reason, "commands": commands}, put=holds)
        log.error("job needs attention", job=job.number, reason=reason, commands=commands)

    def _own_holds(self, job: Job) -> list[Hold]:
        return [hold for hold in self.store.all(Hold) if hold.job == job.number]

    def _wake(self, number: int) -> None:
        event = self._changed.pop(number, None)
        if event is not None:
            event.set()


def _check_cancel(job: Job) -> None:
    if not job.state.active:
        raise WrongState(f"job {job.number} is {job.state}; it cannot be cancelled", hint=f"atoll job info {job.number}")
    if job.committed:
        raise WrongState(f"job {job.number} has passed its commit and only goes forward", hint=f"atoll job watch {job.number}")
