"""Undoing a job: in reverse, every step with a journaled intent, the one in flight and the unknown one included."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from atoll.jobs.steps import Changes, Undo, find_undo
from atoll.model.errors import AtollError, NodeUnavailable, NotLeader, PoolUnavailable, StoreError
from atoll.model.messages import Progress
from atoll.model.objects import Job, Node, Step, StepState
from atoll.runtime import faults

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine

#: Attempts of one undo before a person is asked.
ATTEMPTS = 3
#: Seconds between attempts while the storage is not there, and after which a person is asked.
STORAGE_PAUSE, STORAGE_WAIT = 10.0, 3600.0


class UndoFailed(AtollError):
    """A step cannot be undone now."""

    def __init__(self, message: str, commands: tuple[str, ...]) -> None:
        super().__init__(message)
        self.commands = commands


async def undo_steps(engine: Engine, job: Job) -> None:
    """Undo all steps that are not undone yet; storage that is not there is waited for an hour, all steps together.

    Errors: UndoFailed.
    """
    steps = engine.steps(job.number)
    end = asyncio.get_running_loop().time() + STORAGE_WAIT
    for count, step in enumerate(reversed(steps)):
        if step.undo is None or step.state is StepState.UNDONE:
            continue
        undo = Undo.from_json(step.undo)
        await faults.point(f"master:{job.operation}:{len(steps) - count:02d}:before-undo")
        await _undo_one(engine, job, step, undo, end)
        await faults.point(f"master:{job.operation}:{len(steps) - count:02d}:after-undo")


async def _undo_one(engine: Engine, job: Job, step: Step, undo: Undo, end: float) -> None:
    loop = asyncio.get_running_loop()
    attempt = 0
    while True:
        attempt += 1
        try:
            if undo.method == "job.cancel":
                await _cancel_child(engine, undo.args["job"])
                changes = Changes()
            elif undo.node is None:
                changes = find_undo(undo.method)(engine.state, undo.args)
            else:
                await _order(engine, job, step, undo)
                changes = Changes()
            await engine.store.write(put=[*changes.put, step.model_copy(update={"state": StepState.UNDONE})], delete=changes.delete)
            return
        except (NotLeader, StoreError):
            raise
        except PoolUnavailable as error:
            # Nobody can do anything about the job before the storage is back, and then it is undone by itself.
            if loop.time() + STORAGE_PAUSE >= end:
                raise UndoFailed(f"step {step.key!r}: {error.message}", (f"atoll job undo {job.number}",)) from error
            engine.set_progress(job.number, Progress(text=f"waits for the storage, to take back {step.key!r}: {error.message}"))
            await asyncio.sleep(STORAGE_PAUSE)
        except AtollError as error:
            if attempt >= ATTEMPTS:
                commands = (f"atoll job undo {job.number}", *((error.hint,) if error.hint.startswith("atoll") else ()))
                raise UndoFailed(f"step {step.key!r}: {error.message}", commands) from error
            await asyncio.sleep(0.5 * attempt)


async def _order(engine: Engine, job: Job, step: Step, undo: Undo) -> None:
    assert undo.node is not None
    try:
        turn = engine.turn(job.number, undo.args)
        await engine.agents.order(undo.node, job.number, step.key, undo.method, undo.args, undo=True, deadline=undo.deadline, turn=turn)
    except NodeUnavailable as dead:
        if undo.dies or (undo.local and engine.state.disks_are_lost(undo.node)):
            return
        # The node is proved dead, but its effect is on storage that others reach: one of them undoes it.
        here = engine.store.require(Node, undo.node)
        others = [n for n in engine.store.all(Node) if n.group == here.group and n.id != here.id and engine.state.answers(n.id)]
        if undo.local:
            raise NodeUnavailable(dead.message, hint=f"atoll node declare-dead {here.name} --disks-are-lost") from dead
        if not others:
            raise
        args = {**undo.args, "ref": {**undo.args["ref"], "node": others[0].name}} if "ref" in undo.args else undo.args
        await engine.agents.order(others[0].id, job.number, step.key, undo.method, args, undo=True, deadline=undo.deadline)


async def _cancel_child(engine: Engine, number: int) -> None:
    child = engine.job(number)
    if child.state.active and not child.committed:
        await engine.cancel(number)
    await engine.ended(number)
