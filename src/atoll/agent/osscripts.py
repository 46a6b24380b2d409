"""Orders that run the scripts of OS definitions on mapped disks.

A script writes the disks, so it is a writer as a guest is: it runs under a generation of the claim, ends with this agent, and ``os.unrun``
says that it is gone only when no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.agent import osdefs
from atoll.agent.memory import Memory
from atoll.agent.service import Handler
from atoll.model.errors import DeadlineExceeded, HostError, InvalidInput, StaleGeneration
from atoll.model.messages import Progress
from atoll.rpc.contract import Report
from atoll.runtime import scripts

#: Seconds to look at the definitions (their directory may be a share that hangs), and for a ``verify`` script.
_LOOK, _VERIFY = 20.0, 60.0
#: Logs of scripts that are kept on a node.
_LOGS = 200


class OsOrders:
    """Handlers of ``os.*``."""

    def __init__(self, directories: tuple[Path, ...], memory: Memory, run_dir: Path, log_dir: Path, node: str) -> None:
        self._directories, self._memory, self._node = directories, memory, node
        self._run_dir, self._log_dir = run_dir / "os", log_dir / "os"
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        #: Called with an order's name just before a script begins; raises when this node is not counted on any more.
        self.still: Callable[[str], None] = lambda order: None

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {"os.list": self.list_all, "os.check": self.check, "os.run": self.run, "os.unrun": self.unrun}

    async def _threaded(self, function: Any, *args: Any) -> Any:
        try:
            return await asyncio.wait_for(asyncio.to_thread(function, *args), _LOOK)
        except TimeoutError:
            raise DeadlineExceeded(f"the OS definitions could not be read within {_LOOK:g} s") from None

    async def list_all(self, args: dict[str, Any], report: Report) -> Any:
        """The definitions of this node."""
        return [found.model_dump(mode="json") for found in await self._threaded(osdefs.find_all, self._directories)]

    async def _found(self, args: dict[str, Any]) -> tuple[osdefs.Definition, str]:
        name, variant = osdefs.split(args["os"])
        found: osdefs.Definition = await self._threaded(osdefs.find, self._directories, name)
        osdefs.check(found, variant, args["parameters"])
        return found, variant

    async def check(self, args: dict[str, Any], report: Report) -> Any:
        """Refuse a definition, variant or parameters that are not good here, by the definition's own ``verify`` script, too.

        Errors: NotFound, InvalidInput.
        """
        found, variant = await self._found(args)
        if "verify" in found.scripts:
            token = f"verify-{args['instance']}"
            env = osdefs.environment(found, variant, args["parameters"])
            ended, log = await self._script(found, ["verify", "parameters"], env, token, _VERIFY, report)
            if ended.code:
                said = ended.stderr or ended.stdout or f"it ended with code {ended.code}"
                raise InvalidInput(f"OS definition {found.name} refuses its parameters: {said}", hint=f"atoll os info {found.name}; {log}")
            with contextlib.suppress(OSError):
                log.unlink()
        return {"version": found.version}

    async def run(self, args: dict[str, Any], report: Report) -> Any:
        """Run ``action`` (create, rename) on disks that are mapped. Errors: HostError with the end of the script's words,
        InUse (an earlier one hangs), StaleGeneration."""
        spec = args["spec"]
        refused = self._memory.refused(spec["instance"])
        if args["generation"] <= refused:
            raise StaleGeneration(f"this node has promised to refuse generation {args['generation']} (and all up to {refused})")
        found, variant = await self._found(args)
        env = {**osdefs.environment(found, variant, args["parameters"]), **osdefs.instance_environment({**spec, "node": self._node})}
        action = args["action"]
        await scripts.gone(self._lock(spec["instance"]))
        # That may have taken long: the instance may be somebody else's by now.
        self.still("os.run")
        task = asyncio.current_task()
        assert task is not None
        self._tasks[spec["instance"]] = task
        try:
            ended, log = await self._script(found, [action], env, spec["instance"], args["timeout"], report, about=spec["name"])
        finally:
            del self._tasks[spec["instance"]]
        if ended.code:
            how = f"was killed by signal {-ended.code}" if ended.code < 0 else f"failed with code {ended.code}"
            said = ended.stderr or ended.stdout
            raise HostError(
                f"the {action} script of OS {args['os']} {how}" + (f": {said}" if said else ""), hint=f"on {self._node}: less {log}"
            )
        return {"log": str(log)}

    async def _script(
        self, found: osdefs.Definition, argv: list[str], env: dict[str, str], token: str, deadline: float, report: Report, about: str = ""
    ) -> tuple[scripts.Ended, Path]:
        stamp = time.strftime("%Y-%m-%d_%H_%M_%S")
        log = scripts.Log(self._log_dir / f"{argv[0]}-{found.name}-{about or token}-{stamp}.log")
        self._prune()
        try:
            ended = await scripts.run(
                [f"{found.path}/{argv[0]}", *argv[1:]],
                deadline=deadline,
                env=env,
                cwd=Path(found.path),
                lock=self._lock(token),
                log=log,
                said=lambda line: report(Progress(text=f"{argv[0]}: {line}")),
            )
        finally:
            log.close()
        with contextlib.suppress(OSError):
            self._lock(token).unlink()
        return ended, log.path

    def _lock(self, token: str) -> Path:
        return self._run_dir / f"{token}.lock"

    def _prune(self) -> None:
        with contextlib.suppress(OSError):
            for old in sorted(self._log_dir.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-_LOGS]:
                old.unlink()

    async def unrun(self, args: dict[str, Any], report: Report) -> Any:
        """The script is gone: the order that ran it was cancelled, or died with an earlier agent. What it wrote stays. ``kill``: it may run
        still. Errors: InUse (something of it hangs)."""
        task = self._tasks.get(args["instance"])
        if task is not None and args.get("kill"):
            task.cancel()
            await asyncio.wait([task])
        lock = self._lock(args["instance"])
        await scripts.gone(lock)
        with contextlib.suppress(OSError):
            lock.unlink()
