"""What an operation works with: journaled steps.

Every effect is a step with an explicit, unique key. Its intent (with its undo) is durable before the effect, its result after it.
On replay a finished step gives its result again, one in flight is repeated (agents join or repeat it safely).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.jobs.steps import Changes, Order, ReplayMismatch, Undo, args_hash
from atoll.model.errors import Cancelled
from atoll.model.messages import Progress
from atoll.model.objects import Job, Step, StepState, Stored
from atoll.runtime import faults
from atoll.store.contract import CompareFailed

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine

T = TypeVar("T")
#: Seconds between attempts of a write that met another one of the same object.
COMPARE_PAUSES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


async def unbroken(work: Awaitable[T]) -> T:
    """Let the work end even if the waiting task is cancelled meanwhile, then let the cancellation through."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        raise


def unless_cancelled(job: Job) -> None:
    """Errors: Cancelled when somebody has asked for that, and the job can still be undone."""
    if job.cancel_asked and not job.committed:
        raise Cancelled(f"job {job.number} was cancelled")


class JobContext:
    """One run of one job. Made by the engine."""

    def __init__(self, engine: Engine, job: Job, journal: list[Step]) -> None:
        self._engine, self._job = engine, job
        self._journal = {step.key: step for step in journal}
        self._next = len(journal)
        self._seen: set[str] = set()
        #: Results that are known but not yet durable; they go with the next transaction.
        self._pending: list[Stored] = []

    @property
    def id(self) -> int:
        """The job's number."""
        return self._job.number

    @property
    def state(self) -> Any:
        """The cluster as it is now; only for the functions given to ``read`` and ``write``."""
        return self._engine.state

    @property
    def committed(self) -> bool:
        """Whether ``commit`` has passed."""
        return self._job.committed

    def journaled(self, key: str) -> bool:
        """Whether this step is in the journal already: then what led to it must not be asked again."""
        return key in self._journal

    def progress(self, percent: float | None, text: str) -> None:
        """Tell how far the job is."""
        self._engine.set_progress(self.id, Progress(percent=percent, text=text))

    async def read(self, key: str, function: Callable[[], Any]) -> Any:
        """Fix a value: clock, random, ids, anything read from the store. JSON-able; read again only if it never became durable."""
        step = self._replayed(key, "read", "")
        if step is not None:
            return step.result
        result = function()
        record = self._record(key, "read", state=StepState.DONE, result=result)
        self._pending.append(record)
        self._add(record)
        return result

    async def write(self, key: str, function: Callable[[], Changes], undo: Undo | None = None) -> Any:
        """Change the store; the journal record is in the same transaction, so it is done exactly once."""
        step = self._replayed(key, "write", "")
        if step is not None:
            return step.result
        await self._point("before-write")

        async def attempt() -> Step:
            # Nothing is awaited between what the function reads and the transaction that compares it: no change gets lost in between.
            changes = function()
            record = self._record(key, "write", state=StepState.DONE, result=changes.result, undo=undo)
            await self._transact([*changes.put, record], changes.delete)
            return record

        for pause in COMPARE_PAUSES:
            try:
                record = await unbroken(attempt())
                break
            except CompareFailed:
                # Somebody changed the same object at the same moment: look again.
                await asyncio.sleep(pause)
        else:
            record = await unbroken(attempt())
        self._add(record)
        await self._point("after-write")
        return record.result

    async def call(
        self,
        key: str,
        node: str,
        method: str,
        args: dict[str, Any] | None = None,
        *,
        undo: Undo | None = None,
        deadline: float = 60.0,
        span: tuple[float, float] | None = None,
        even_dead: bool = False,
    ) -> Any:
        """Order a node to do something. ``span`` maps the order's own percent onto the job's. ``even_dead``: the node is being readmitted.

        Errors: the agent's; Unreachable or DeadlineExceeded when the outcome is not known after ``deadline`` seconds.
        """
        args = args or {}
        digest = args_hash(node, method, args, undo.to_json() if undo else None)
        step = self._replayed(key, "call", digest)
        if step is not None and step.state is StepState.DONE:
            return step.result
        if step is None:
            await self._point("before-intent")
            step = self._record(key, "call", node=node, method=method, args_hash=digest, undo=undo)
            await unbroken(self._transact([step], []))
            self._add(step)
        await self._point("after-intent")
        report, turn = self._reporter(key, span), self._engine.turn(self.id, args)
        result = await self._engine.agents.order(
            node, self.id, key, method, args, deadline=deadline, report=report, even_dead=even_dead, turn=turn
        )
        await self._point("after-effect")
        done = step.model_copy(update={"state": StepState.DONE, "result": result})
        self._journal[key] = done
        self._pending.append(done)
        return result

    async def together(self, orders: Sequence[Order], *, span: tuple[float, float] | None = None) -> list[Any]:
        """Several orders at the same time: all intents are journaled in one transaction, and each result when it comes.

        Returns the results in order when all have ended. Errors: the first of theirs, when none is under way any more.
        """
        intents: list[Step] = []
        for order in orders:
            undo = order.undo.to_json() if order.undo else None
            digest = args_hash(order.node, order.method, order.args, undo)
            if self._replayed(order.key, "call", digest) is None:
                record = self._record(order.key, "call", node=order.node, method=order.method, args_hash=digest, undo=order.undo)
                intents.append(record.model_copy(update={"id": f"{self._job.id}/{self._next + len(intents):04d}"}))
        if intents:
            await self._point("before-intent")
            await unbroken(self._transact([*intents], []))
            for step in intents:
                self._add(step)
        await self._point("after-intent")
        ended = await asyncio.gather(*(self._one(order, span) for order in orders), return_exceptions=True)
        for result in ended:
            if isinstance(result, BaseException):
                raise result
        await self._point("after-effect")
        return list(ended)

    async def _one(self, order: Order, span: tuple[float, float] | None) -> Any:
        step = self._journal[order.key]
        if step.state is StepState.DONE:
            return step.result
        report = self._reporter(order.key, span)
        result = await self._engine.agents.order(
            order.node, self.id, order.key, order.method, order.args, deadline=order.deadline, report=report
        )
        done = step.model_copy(update={"state": StepState.DONE, "result": result})
        self._journal[order.key] = done
        self._pending.append(done)
        return result

    async def ask(self, node: str, method: str, args: dict[str, Any] | None = None, deadline: float = 10.0) -> Any:
        """A question to a node whose answer is not journaled: only for decisions that a later ``read`` or ``write`` fixes."""
        return await self._engine.agents.ask(node, method, args, deadline=deadline)

    async def look(
        self,
        key: str,
        node: str,
        method: str,
        args: dict[str, Any],
        *,
        accept: Callable[[Any], None],
        deadline: float = 60.0,
        even_dead: bool = False,
    ) -> Any:
        """A question to a node, repeated until it is answered. The answer is fixed only if ``accept`` takes it; it raises to refuse it,
        and then another attempt asks again, while the agent would remember its answer to an order.

        Errors: those of ``accept``, the agent's; Unreachable after ``deadline`` seconds.
        """
        answer: Any = None
        if not self.journaled(key):
            answer = await self._engine.agents.order(node, 0, "", method, args, deadline=deadline, even_dead=even_dead)
            accept(answer)
        return await self.read(key, lambda: answer)

    async def commit(self) -> None:
        """From here on the job only goes forward: failure and cancel no longer undo it."""
        if not self._job.committed:
            self._job = await self._engine.update(self.id, {"committed": True}, put=self._take_pending(), check=unless_cancelled)

    async def child(self, key: str, operation: str, target: str, request: dict[str, Any]) -> int:
        """Submit a child job; its number. Undoing this step cancels the child if it has not ended."""
        step = self._replayed(key, "write", "")
        if step is not None:
            return int(step.result)
        child = self._engine.new_job(operation, target, request, who=self._job.who, parent=self.id)
        record = self._record(key, "write", state=StepState.DONE, result=child.number, undo=Undo("job.cancel", {"job": child.number}))
        await self._engine.submitter.write(child, self._transact([child, record], []))
        self._add(record)
        return child.number

    async def ended(self, child: int) -> Job:
        """Wait until a child job has ended, or needs attention."""
        return await self._engine.ended(child)

    async def finish(self, update: dict[str, Any]) -> None:
        """Write the job's end together with what is still pending. For the engine. Errors: Cancelled (it was, before its commit)."""
        await self._engine.update(self.id, update, put=self._take_pending(), check=unless_cancelled)

    # --- journal ---

    def _replayed(self, key: str, what: str, digest: str) -> Step | None:
        if key in self._seen:
            raise ReplayMismatch(f"step {key!r} occurs twice")
        self._seen.add(key)
        step = self._journal.get(key)
        if step is not None and (step.what != what or step.args_hash != digest):
            raise ReplayMismatch(f"step {key!r} differs from the journal")
        return step

    def _record(self, key: str, what: Any, *, undo: Undo | None = None, **fields: Any) -> Step:
        return Step(
            id=f"{self._job.id}/{self._next:04d}",
            key=key,
            what=what,
            undo=undo.to_json() if undo else None,
            at=self._engine.clock.now(),
            **fields,
        )

    def _add(self, step: Step) -> None:
        self._next += 1
        self._journal[step.key] = step

    def _take_pending(self) -> list[Stored]:
        pending, self._pending = self._pending, []
        return pending

    async def _transact(self, put: list[Stored], delete: list[Stored]) -> None:
        pending = list(self._pending)
        latest = {item.id: item for item in [*pending, *put] if isinstance(item, Step)}
        others = [item for item in put if not isinstance(item, Step)]
        await self._engine.store.write(put=[*others, *latest.values()], delete=delete)
        del self._pending[: len(pending)]

    async def _point(self, phase: str) -> None:
        await faults.point(f"master:{self._job.operation}:{self._next:02d}:{phase}")

    def _reporter(self, key: str, span: tuple[float, float] | None) -> Callable[[Progress], None]:
        low, high = span or (0.0, 100.0)

        def report(progress: Progress) -> None:
            percent = None if progress.percent is None else low + (high - low) * progress.percent / 100
            self._engine.set_progress(self.id, Progress(percent=percent, text=progress.text or key))

        return report
