"""OS definitions of the whole cluster, as the nodes tell of them."""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.model.errors import AtollError
from atoll.model.objects import Node
from atoll.operations.state import State
from atoll.rpc.agents import Agents

_DEADLINE = 30.0


async def collect(state: State, agents: Agents) -> list[dict[str, Any]]:
    """One row for each definition: its nodes, and ``problems`` (node -> what is wrong there). ``valid``: every node that runs guests
    has it, alike. A node that does not answer is told as a problem of each."""
    nodes = sorted((node for node in state.store.all(Node) if not node.offline and "vm" in node.roles), key=lambda node: node.name)

    async def one(node: Node) -> Any:
        try:
            return await agents.ask(node.id, "os.list", {}, deadline=_DEADLINE)
        except AtollError as error:
            return error.message

    answers = dict(zip([node.name for node in nodes], await asyncio.gather(*(one(node) for node in nodes)), strict=True))
    names = sorted({found["name"] for told in answers.values() if isinstance(told, list) for found in told})
    return [_row(name, answers) for name in names]


def _row(name: str, answers: dict[str, Any]) -> dict[str, Any]:
    problems: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for node, told in answers.items():
        if not isinstance(told, list):
            problems[node] = f"does not tell: {told}"
            continue
        here = next((one for one in told if one["name"] == name), None)
        if here is None:
            problems[node] = "it is not there"
            continue
        found[node] = here
        if here["problems"]:
            problems[node] = "; ".join(here["problems"])
    first = next(iter(found.values()))
    for node, here in found.items():
        different = [what for what in ("versions", "variants", "parameters") if here[what] != first[what]]
        if different and node not in problems:
            problems[node] = f"its {', '.join(different)} differ from those on {next(iter(found))}"
    return {
        "name": name,
        "valid": not problems,
        "variants": first["variants"],
        "parameters": first["parameters"],
        "versions": first["versions"],
        "scripts": first["scripts"],
        "paths": {node: here["path"] for node, here in found.items()},
        "problems": problems,
    }
