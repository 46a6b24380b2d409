"""The agents as one master's term sees them: who has acknowledged it, and how orders are repeated until their outcome is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from atoll import __version__
from atoll.model.errors import UNKNOWN_OUTCOME, AtollError, DeadlineExceeded, NodeUnavailable, StaleTerm, Unreachable, VersionMismatch
from atoll.model.messages import PROTOCOL, Call, Hello, Progress, compatible
from atoll.model.objects import DeathProof, Node
from atoll.rpc.contract import Report, Transport
from atoll.store.cache import LeaderStore

#: Pauses between repeats of an order whose outcome is unknown, in seconds; the last one repeats.
PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
#: Seconds that one attempt may take before it is repeated; a repeat joins the running one, so a long order loses nothing.
ATTEMPT = 30.0
#: Seconds for which a node may not even answer a greeting before an order to it, however long that may take, is given up.
SILENCE = 120.0


def quiet(_: Progress) -> None:
    """For orders whose progress nobody watches."""


class Agents:
    """Orders to agents, in the name of one term."""

    def __init__(self, store: LeaderStore, transport: Transport, oldest_job: Callable[[], int], me: str = "") -> None:
        """``me``: the id of the node that this master leads from; empty where nobody has said."""
        self._store, self._transport, self._oldest_job, self._me = store, transport, oldest_job, me
        #: Nodes that may have become the master before this term began: until each has acknowledged it, nothing is begun anywhere.
        self._rivals = {node.id for node in store.all(Node) if node.holds_keys and node.id != me}
        self._greeted: dict[str, Hello] = {}
        self._greeting: dict[str, asyncio.Lock] = {}

    def node(self, node_id: str) -> Node:
        """The node's record. Errors: NotFound."""
        return self._store.require(Node, node_id)

    def forget(self, node_id: str) -> None:
        """The agent may be another process now: greet it again before the next order."""
        self._greeted.pop(node_id, None)

    async def greet(self, node_id: str, deadline: float = 5.0) -> Hello:
        """Tell the agent this term, once; it answers with the steps that it is still carrying out.

        Errors: Unreachable, StaleTerm; VersionMismatch when it is more than one version behind or ahead.
        """
        async with self._greeting.setdefault(node_id, asyncio.Lock()):
            hello = self._greeted.get(node_id)
            if hello is None:
                hello = Hello(**await self._send(node_id, self._call("hello", deadline=deadline), quiet))
                self._check_version(node_id, hello)
                self._greeted[node_id] = hello
                self._rivals.discard(node_id)
            return hello

    def _check_version(self, node_id: str, hello: Hello) -> None:
        if compatible(hello.protocol):
            return
        name = self.node(node_id).name
        who = "the agent" if hello.protocol < PROTOCOL else "this master"
        raise VersionMismatch(
            f"the agent on {name} has version {hello.version or 'unknown'} (protocol {hello.protocol}), this master {__version__} "
            f"(protocol {PROTOCOL}): more than one step apart",
            hint=f"upgrade {who}{f' on {name}' if who == 'the agent' else ''}, one version at a time: docs/howto/upgrade.md",
        )

    async def acknowledged(self, node_ids: set[str], tell: Callable[[str], None] = lambda text: None) -> None:
        """Wait, for as long as it takes, until each of these agents has acknowledged this term or is proved dead."""
        for node_id in sorted(node_ids):
            pause = 0.1
            while self._store.get(Node, node_id) is not None and self._store.get(DeathProof, node_id) is None:
                try:
                    await self.greet(node_id)
                    break
                except (*UNKNOWN_OUTCOME, VersionMismatch) as error:
                    tell(f"waiting for node {self.node(node_id).name}: {error.message}")
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 5.0)

    async def ask(self, node_id: str, method: str, args: dict[str, Any] | None = None, *, deadline: float = 10.0) -> Any:
        """A question that changes nothing; one attempt. Errors: the agent's, Unreachable, DeadlineExceeded."""
        await self.greet(node_id, min(deadline, 5.0))
        return await self._attempt(node_id, self._call(method, args=args or {}, deadline=deadline), quiet)

    async def order(
        self,
        node_id: str,
        job: int,
        step: str,
        method: str,
        args: dict[str, Any],
        *,
        undo: bool = False,
        deadline: float,
        report: Report = quiet,
        even_dead: bool = False,
        turn: int = 0,
    ) -> Any:
        """An order of a job, repeated until its outcome is known or the deadline (seconds) has passed.

        ``even_dead``: the node is back, and this order readmits it. Errors: the agent's; NodeUnavailable for a node that is proved
        dead; Unreachable = outcome not known: the deadline has passed, or the node has been silent for ``SILENCE`` seconds.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        end = began + deadline
        attempt = 0
        silent_since: float | None = None
        while True:
            if not even_dead and self._store.get(DeathProof, node_id) is not None:
                raise NodeUnavailable(f"node {self.node(node_id).name} is proved dead")
            left = end - loop.time()
            call = self._call(method, job=job, step=step, args=args, undo=undo, turn=turn, deadline=max(0.05, min(left, ATTEMPT)))
            try:
                await self._ask_rivals()
                await self.greet(node_id)
                silent_since = None
                return await self._attempt(node_id, call, report)
            except UNKNOWN_OUTCOME as error:
                pause = PAUSES[min(attempt, len(PAUSES) - 1)]
                attempt += 1
                now = loop.time()
                silent_since = now if silent_since is None else silent_since
                if now + pause >= min(end, silent_since + SILENCE):
                    raise Unreachable(
                        f"node {self.node(node_id).name} gave no answer to {method} within {now - began:.0f} s: {error.message}"
                    ) from error
                report(Progress(text=_goes_on(error, method, now - began)))
                await asyncio.sleep(pause)

    async def _ask_rivals(self) -> None:
        """Make sure that no candidate has taken over: an old master that comes back alone must not start what runs elsewhere by now.

        Errors: StaleTerm when one has; Unreachable while one can be neither asked nor is proved dead.
        """
        for node_id in sorted(self._rivals):
            node = self._store.get(Node, node_id)
            if node is None or self._store.get(DeathProof, node_id) is not None:
                continue
            try:
                await self.greet(node_id, 2.0)
            except UNKNOWN_OUTCOME as error:
                raise Unreachable(
                    f"waiting for the master candidate {node.name} to say that it has not taken over ({error.message}); "
                    f"if it is off: atoll node declare-dead {node.name}",
                    hint=f"atoll node declare-dead {node.name}",
                ) from error

    def rivals(self) -> list[str]:
        """The nodes (ids) that may have become the master, have not acknowledged this term and are not proved dead."""
        return [n for n in sorted(self._rivals) if self._store.get(Node, n) and self._store.get(DeathProof, n) is None]

    def _call(self, method: str, **more: Any) -> Call:
        return Call(term=self._store.term, protocol=PROTOCOL, method=method, master=self._me, oldest_job=self._oldest_job(), **more)

    async def _send(self, node_id: str, call: Call, report: Report) -> Any:
        try:
            return await self._transport.call(self.node(node_id), call, report)
        except StaleTerm as error:
            # Another master has begun: whatever this one does from here on would be refused, and be wrong.
            self._store.supersede(error.message)
            raise

    async def _attempt(self, node_id: str, call: Call, report: Report) -> Any:
        try:
            return await self._send(node_id, call, report)
        except UNKNOWN_OUTCOME:
            self.forget(node_id)
            raise

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()


def _goes_on(error: AtollError, method: str, seconds: float) -> str:
    """What is said while an order is repeated. An agent that works on it for longer than one attempt has met no trouble."""
    if isinstance(error, DeadlineExceeded):
        return f"{method} is still at work after {seconds:.0f} s"
    return f"{error.message}; trying again"


def refused(error: AtollError) -> bool:
    """Whether the agent refused the order without any effect."""
    return error.code in ("stale_term", "stale_generation", "stale_turn", "step_undone")
