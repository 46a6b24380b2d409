"""Orders that make this node a part of a storage cluster: the steps of every kind, as ``KIND.STEP``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from atoll.agent.service import Handler
from atoll.deploy import registry
from atoll.model.messages import Progress

#: The step of a kind that is no order: it keeps daemons running for as long as the agent does.
KEEP = "keep"


class DeployOrders:
    """``state_dir``, ``etc_dir``: those of the agent's configuration."""

    def __init__(self, state_dir: Path, etc_dir: Path) -> None:
        self._steps = {info.name: registry.steps(info.name, state_dir, etc_dir) for info in registry.kinds()}

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {f"{kind}.{step}": run for kind, steps in self._steps.items() for step, run in steps.items() if step != KEEP}

    async def keep(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(steps[KEEP]({}, _quiet) for steps in self._steps.values() if KEEP in steps))
        await asyncio.Event().wait()


def _quiet(_: Progress) -> None:
    """Nobody watches."""
