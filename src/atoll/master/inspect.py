"""Questions to all nodes about themselves: what a doctor finds there, and their logs. And what a node is told for its own look."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from atoll import __version__
from atoll.model.errors import AtollError, NotFound
from atoll.model.messages import PROTOCOL
from atoll.model.objects import Node, Pool

if TYPE_CHECKING:
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents

#: Seconds for an agent to look at everything, and to read its logs.
LOOK, LOGS = 90.0, 60.0
_LEVELS = {"error": 0, "warning": 1, "ok": 2}


def finding(level: str, about: str, what: str, why: str = "", *commands: str) -> dict[str, Any]:
    """A finding as agents give them (see ``monitor.checks``)."""
    return {"level": level, "about": about, "what": what, "why": why, "commands": list(commands)}


class Inspector:
    """Asks agents. A node that does not answer, or is too old for the question, is a finding itself."""

    def __init__(self, state: State, agents: Agents) -> None:
        self._state, self._agents = state, agents

    def facts(self, node_id: str) -> dict[str, Any]:
        """What a node needs to look at itself: who leads, the time, its pools, and where the other nodes are."""
        state = self._state
        node = state.store.require(Node, node_id)
        report = state.health.report(node_id)
        pools = [p for p in state.store.all(Pool) if node.group in p.groups]
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "term": state.store.term,
            "clock": state.clock.now(),
            "node": node.name,
            "reported": report.version if report and state.health.alive(node_id) else "",
            "pools": [state.ref(p, node).model_dump(mode="json") for p in pools],
            "peers": [{"name": n.name, "address": n.address, "port": n.port} for n in state.store.all(Node) if not n.offline],
        }

    async def look(self) -> list[dict[str, Any]]:
        """What each node's doctor finds, and what only shows when nodes are compared. Findings have ``node`` besides; the worst first."""
        nodes = [n for n in self._state.store.all(Node) if not n.offline]
        answers = await asyncio.gather(*(self._look(n) for n in nodes))
        found = []
        for node, answer in zip(nodes, answers, strict=True):
            found += [{"node": node.name, **item} for item in answer["findings"]]
        found += self._compare({n.name: answer["pools"] for n, answer in zip(nodes, answers, strict=True)})
        return sorted(found, key=lambda item: (_LEVELS.get(item["level"], 0), item["node"], item["about"]))

    async def _look(self, node: Node) -> dict[str, Any]:
        try:
            answer = await self._agents.ask(node.id, "node.look", {}, deadline=LOOK)
            return {"findings": list(answer["findings"]), "pools": dict(answer["pools"])}
        except NotFound:
            why = "its version cannot look at itself for others"
            one = finding("warning", "agent", "it was not looked at", why, f"on {node.name}: atoll doctor; then upgrade the agent")
        except AtollError as error:
            why = "what does not answer cannot be looked at from here"
            one = finding("error", "agent", f"no answer: {error.message}", why, f"on {node.name}: atoll doctor")
        return {"findings": [one], "pools": {}}

    def _compare(self, seen: dict[str, dict[str, dict[str, str]]]) -> list[dict[str, Any]]:
        found = []
        for pool in self._state.store.all(Pool):
            if self._state.driver(pool).node_local:
                continue
            kinds = {node: pools[pool.id].get("file system", "") for node, pools in seen.items() if pool.id in pools}
            if differ := differing(kinds):
                why = "it is not the same directory everywhere, or not mounted the same way: images and locks may not be seen by all"
                command = f"findmnt -T {pool.options.get('path', '')}"
                found.append({"node": "all", **finding("error", f"pool {pool.name}", differ, why, command)})
        return found

    async def logs(self, node_id: str) -> dict[str, str]:
        """The end of a node's logs, by name. Errors: Unreachable, DeadlineExceeded, NotFound (its version cannot)."""
        answer = await self._agents.ask(node_id, "node.logs", {}, deadline=LOGS)
        return {str(name): str(text) for name, text in answer.items()}


def differing(kinds: dict[str, str]) -> str:
    """In words how nodes (name -> what each sees) differ; empty if they do not. What a node did not tell counts as equal."""
    told = {node: kind for node, kind in kinds.items() if kind}
    if len(set(told.values())) < 2:
        return ""
    by_kind: dict[str, list[str]] = {}
    for node, kind in sorted(told.items()):
        by_kind.setdefault(kind, []).append(node)
    return "; ".join(f"{kind} on {', '.join(nodes)}" for kind, nodes in sorted(by_kind.items()))
