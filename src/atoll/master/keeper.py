"""Renews certificates long before they end: those of nodes by jobs, the master's own at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from atoll.api.leader import Finding
from atoll.master.authority import DAY, due
from atoll.model.errors import AtollError, HostError, NotLeader
from atoll.model.objects import Authority, Cluster, Node, Stored
from atoll.operations.state import State
from atoll.runtime import certs

log = structlog.get_logger()
#: Seconds between looks; and how many nodes are renewed after one look, so that they do not all come at once.
PERIOD, AT_ONCE = 30.0, 5
#: Seconds before another attempt for a node whose renewal failed.
PAUSE = 3600.0
#: Days before the end at which people are told.
TELL, TELL_CA = 30, 365


class CertificateKeeper:
    """Looks now and then. ``submit`` makes a job of the master's own: operation and target."""

    def __init__(self, state: State, submit: Callable[[str, str], Awaitable[int]], busy: Callable[[str], bool]) -> None:
        self._state, self._submit, self._busy = state, submit, busy
        self._tried: dict[str, float] = {}
        self._soon = asyncio.Event()
        #: Why this master's own files do not follow the store; empty: they do.
        self.trouble = ""

    def noticed(self, before: Stored | None, after: Stored | None) -> None:
        """Something in the store has changed."""
        if isinstance(after or before, (Authority, Cluster)):
            self._soon.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            self.settle()
            try:
                await self._nodes()
            except NotLeader:
                return
            except AtollError as error:
                log.warning("certificates of nodes could not be renewed", error=error.message)
            self._soon.clear()
            try:
                await asyncio.wait_for(self._soon.wait(), PERIOD)
            except TimeoutError:
                continue

    def settle(self) -> None:
        """Let the master's own files follow the store."""
        try:
            if self._state.signer is not None:
                self._state.signer.settle()
            self.trouble = ""
        except HostError as error:
            if not self.trouble:
                log.error("the master's own certificate cannot be kept fresh", error=error.message)
            self.trouble = error.message

    async def _nodes(self) -> None:
        state = self._state
        now, moment = state.clock.now(), state.clock.monotonic()
        begun = 0
        for node in state.store.all(Node):
            report = state.health.report(node.id)
            if begun >= AT_ONCE or report is None or not report.certificate or not state.answers(node.id) or node.offline:
                continue
            if not due(now, report.certificate_issued, report.certificate_expires) or self._busy(f"certificate:{node.id}"):
                continue
            if moment - self._tried.get(node.id, -PAUSE) >= PAUSE:
                self._tried[node.id] = moment
                begun += 1
                await self._submit("node.renew", node.id)

    def findings(self) -> list[Finding]:
        """What ``cluster verify`` tells of certificates."""
        state = self._state
        now = state.clock.now()
        found = []
        if self.trouble:
            found.append(Finding("error", "the master's certificate cannot be kept fresh", "master", self.trouble, None, ("df -h /etc",)))
        for node in state.store.all(Node):
            report = state.health.report(node.id)
            expires = (report.certificate_expires if report else 0.0) or node.certificate_expires
            if not node.offline and expires and expires - now < TELL * DAY:
                fix = f"atoll node renew {node.name}" if state.answers(node.id) else f"atoll node token {node.name} --rejoin"
                what = "certificate has ended" if expires < now else f"certificate ends in {(expires - now) / DAY:.0f} days"
                found.append(Finding("error" if expires < now else "warning", what, node.name, "it is not renewed by itself", None, (fix,)))
            elif report and report.trusts and state.answers(node.id) and not self._busy("certificates:cluster"):
                found += self._trust(node, report.trusts)
        for authority in state.store.all(Authority):
            if authority.state != "current" and not self._busy("certificates:cluster"):
                why = "a change of the CA was begun and has not ended"
                found.append(Finding("warning", f"a CA is {authority.state}", authority.id, why, None, ("atoll job list",)))
            elif authority.state == "current" and certs.expires(authority.certificate) - now < TELL_CA * DAY:
                left = f"the CA ends in {(certs.expires(authority.certificate) - now) / DAY:.0f} days"
                why = "no node can speak to another after that"
                found.append(Finding("warning", left, state.cluster.name, why, None, ("atoll cluster rotate-ca",)))
        return found

    def _trust(self, node: Node, trusts: tuple[str, ...]) -> list[Finding]:
        known = {certs.fingerprint(authority.certificate) for authority in self._state.store.all(Authority)}
        if not known or set(trusts) <= known:
            return []
        why = "it was away when the CA was changed"
        return [Finding("warning", "node trusts a CA that is no more", node.name, why, None, (f"atoll node renew {node.name}",))]
