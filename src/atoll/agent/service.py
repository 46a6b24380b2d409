"""An agent's answer to orders: terms, late copies, joining a running step, and refusing a ``do`` after its ``undo``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from atoll import __version__
from atoll.agent import contact as contacts
from atoll.agent.contact import HARMLESS, Contact
from atoll.agent.memory import Memory
from atoll.model.errors import AtollError, DeadlineExceeded, NotFound, StepUndone, Unreachable, VersionMismatch
from atoll.model.messages import PROTOCOL, Call, Hello, Progress, compatible
from atoll.rpc.contract import Report
from atoll.runtime import faults

log = structlog.get_logger()
Handler = Callable[[dict[str, Any], Report], Awaitable[Any]]


#: Steps after which a report says nothing new.
QUIET = ("volume.",)
#: Questions that a master may put before it has a term: they change nothing.
TIMELESS = frozenset({"recall"})


class _Running:
    """A step that is being carried out: its task, and those who want to hear of its progress."""

    def __init__(self, term: int) -> None:
        #: Of the newest master that has asked for it.
        self.term = term
        self.task: asyncio.Task[Any] | None = None
        self.listeners: list[Report] = []

    def report(self, progress: Progress) -> None:
        for listener in list(self.listeners):
            listener(progress)


class Service:
    """Dispatches orders to handlers. ``handlers`` maps a method's name to what does it; ``news`` is called after each step."""

    def __init__(
        self, node: str, memory: Memory, handlers: dict[str, Handler], contact: Contact, news: Callable[[], None] = lambda: None
    ) -> None:
        self.node, self.memory, self._contact, self._news = node, memory, contact, news
        self._handlers = handlers
        self._running: dict[tuple[int, str], _Running] = {}
        self._stopped = False

    async def handle(self, call: Call, report: Report) -> Any:
        """See ``AgentService.handle``."""
        if call.method in TIMELESS and call.method in self._handlers:
            return await self._bounded(asyncio.ensure_future(self._handlers[call.method](call.args, report)), call, keep=False)
        self.memory.see_term(call.term, call.master)
        if call.method == "hello":
            self.memory.see_oldest_job(call.oldest_job)
            return self._hello().model_dump(mode="json")
        if not compatible(call.protocol):
            raise VersionMismatch(
                f"the master speaks protocol {call.protocol}, this agent (version {__version__}) protocol {PROTOCOL}",
                hint=f"upgrade {'the master' if call.protocol < PROTOCOL else 'this agent'}, one version at a time: docs/howto/upgrade.md",
            )
        if call.job and call.job < self.memory.oldest_job:
            raise StepUndone(f"job {call.job} has ended; this order ({call.method}) is a late copy")
        self.memory.see_oldest_job(call.oldest_job)
        if call.turn and call.instance:
            self.memory.see_turn(call.instance, call.term, call.turn)
        handler = self._handlers.get(call.method)
        if handler is None:
            raise NotFound(f"this agent (version {__version__}) does not know the order {call.method!r}", hint="upgrade the agent")
        if call.job and call.method not in HARMLESS:
            self._contact.check(call.method)
        if not call.job:
            return await self._bounded(asyncio.ensure_future(handler(call.args, report)), call, keep=False)
        if call.undo:
            return await self._undo(call, handler, report)
        return await self._do(call, handler, report)

    @property
    def running(self) -> list[tuple[int, str]]:
        """The steps that are being carried out now: job and step."""
        return sorted(self._running)

    def _hello(self) -> Hello:
        return Hello(node=self.node, term=self.memory.term, running=self.running, version=__version__, protocol=PROTOCOL)

    async def _do(self, call: Call, handler: Handler, report: Report) -> Any:
        name = (call.job, call.step)
        known = self.memory.step(*name)
        if known and known[0] == "done":
            return known[1]
        if known and known[0] in ("undoing", "undone"):
            raise StepUndone(f"step {call.step!r} of job {call.job} was undone; this order is a late copy")
        running = self._running.get(name)
        if running is None:
            running = self._running[name] = _Running(call.term)
            running.task = asyncio.ensure_future(self._carry_out(call, handler, running))
        assert running.task is not None
        running.term = max(running.term, call.term)
        running.listeners.append(report)
        try:
            return await self._bounded(running.task, call, keep=True)
        finally:
            running.listeners.remove(report)

    async def _carry_out(self, call: Call, handler: Handler, running: _Running) -> Any:
        name = (call.job, call.step)
        contacts.step.set(running)
        begun = False
        try:
            # Nothing is done that is not remembered. If that fails, a repeat must not join this attempt for ever.
            self.memory.begin(*name)
            begun = True
            await faults.point(f"agent:{call.method}:before")
            result = await handler(call.args, running.report)
            await faults.point(f"agent:{call.method}:after")
            self.memory.set_step(*name, "done", result)
            if not call.method.startswith(QUIET):
                self._news()
            return result
        except AtollError:
            if begun and not self._stopped:
                self.memory.drop_step(*name)
            raise
        finally:
            self._running.pop(name, None)

    async def _undo(self, call: Call, handler: Handler, report: Report) -> Any:
        name = (call.job, call.step)
        known = self.memory.step(*name)
        if known and known[0] == "undone":
            return known[1]
        # First the promise, then the effect: a late copy of the order must find it whatever happens now.
        self.memory.begin(*name, "undoing")
        running = self._running.get(name)
        if running is not None and running.task is not None:
            running.task.cancel()
            await asyncio.wait([running.task])
        self.memory.set_step(*name, "undoing")
        undo_name = (call.job, f"undo {call.step}")
        active = self._running.get(undo_name)
        if active is None:
            active = self._running[undo_name] = _Running(call.term)
            active.task = asyncio.ensure_future(self._carry_out_undo(call, handler, active, undo_name))
        assert active.task is not None
        active.listeners.append(report)
        return await self._bounded(active.task, call, keep=True)

    async def _carry_out_undo(self, call: Call, handler: Handler, running: _Running, undo_name: tuple[int, str]) -> Any:
        try:
            await faults.point(f"agent:{call.method}:before-undo")
            result = await handler(call.args, running.report)
            await faults.point(f"agent:{call.method}:after-undo")
            self.memory.set_step(call.job, call.step, "undone", result)
            return result
        finally:
            self._running.pop(undo_name, None)

    async def _bounded(self, task: asyncio.Task[Any], call: Call, *, keep: bool) -> Any:
        """Wait for the task within the order's deadline; ``keep``: it goes on, and a repeat of the order joins it."""
        try:
            done, _ = await asyncio.wait([task], timeout=call.deadline)
        except asyncio.CancelledError:
            if not keep:
                task.cancel()
            raise
        if not done:
            if keep:
                task.add_done_callback(_look)
            else:
                task.cancel()
            raise DeadlineExceeded(f"{call.method} on {self.node} took longer than {call.deadline:g} s")
        if task.cancelled():
            if self._stopped:
                raise Unreachable(f"the agent on {self.node} ends; whoever comes next carries out {call.method} again")
            raise StepUndone(f"{call.method} on {self.node} was cancelled by its undo")
        return task.result()

    async def stop(self) -> None:
        """The agent ends: running steps are left to the next one."""
        self._stopped = True
        tasks = [running.task for running in self._running.values() if running.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _look(task: asyncio.Task[Any]) -> None:
    """Nobody may wait for it any more; its error was, or will be, told to the repeat of the order."""
    if not task.cancelled():
        task.exception()
