"""The fake hypervisor: guests are small processes that do to storage what real ones do (see fakeguest). Needs no root and no KVM.

Under its run directory each guest has a folder with its instance id; ``console.log`` there stays when the guest has gone. Migration
streams are plain TCP: it is a fake, and its endpoints say so (``tls`` False).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from atoll.hypervisor import fakeguest
from atoll.hypervisor.contract import Report
from atoll.hypervisor.fakerules import WATCHDOG, admit
from atoll.model.errors import DeadlineExceeded, GuestError, from_wire
from atoll.model.messages import Endpoint, GuestDisk, GuestSpec, GuestStatus, MigrationFigures, Progress

#: Seconds within which a guest that is well answers; one that does not is ``hung``.
ANSWER = 1.0
#: Seconds of silence after which a call gives up: a guest that works on something gives a sign of life every second.
SILENCE = 10.0
#: Seconds for a killed process to go, and for a new one to come up.
PATIENCE = 30.0


class FakeHypervisor:
    """Guests as processes; nothing of them is kept in memory, so a new object (or a restarted agent) finds them all.

    ``user``: whom guests become once their disks are open, when started by root; '' = nobody else.
    ``tls_dir`` is accepted for the sake of the factory; nothing is encrypted.
    """

    name = "fake"

    def __init__(self, run_dir: Path, tls_dir: Path, address: str, node: str, user: str = "") -> None:
        self.run_dir, self.tls_dir, self.address, self.node, self.user = Path(run_dir), Path(tls_dir), address, node, user
        self.watchdog = WATCHDOG
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # --- what is there ---

    async def probe(self) -> str:
        """Nothing is accelerated: ``tcg``, so that pins of groups fit."""
        return "tcg"

    async def guests(self) -> list[GuestStatus]:
        try:
            names = sorted(os.listdir(self.run_dir))
        except FileNotFoundError:
            return []
        return list(await asyncio.gather(*(self._status(name, pid) for name in names if (pid := self._pid(name)))))

    async def status(self, guest: str) -> GuestStatus:
        pid = self._pid(guest)
        return await self._status(guest, pid) if pid else GuestStatus(instance=guest, state="gone")

    async def _status(self, guest: str, pid: int) -> GuestStatus:
        try:
            return GuestStatus.model_validate(await self._tell(guest, "status", silence=ANSWER))
        except (GuestError, DeadlineExceeded) as error:
            # Its sockets go a moment before its process does: only one that stays without answering hangs.
            if isinstance(error, GuestError) and await self._goes(guest, pid, ANSWER):
                return GuestStatus(instance=guest, state="gone")
            spec = self._spec(guest)
            return GuestStatus(
                instance=guest, name=spec.get("name", ""), generation=spec.get("generation", 0), state="hung", reason=error.message,
                pid=pid, memory=spec.get("memory", 0), vcpus=spec.get("vcpus", 0),
            )  # fmt: skip

    def console(self, guest: str) -> str:
        return str(self._dir(guest) / "console.sock")

    # --- life ---

    async def start(self, spec: GuestSpec, report: Report) -> None:
        async with self._making[spec.instance]:
            match admit(await self.status(spec.instance), spec, incoming=False):
                case "done":
                    return
                case "resume":
                    await self._ask(spec.instance, "cont")
                    return
                case "replace":
                    await self._end(spec.instance)
            report(Progress(percent=0, text="starting"))
            await self._make(spec, incoming=False, peer="", copy=[])
            report(Progress(percent=100, text="running"))

    async def stop(self, guest: str, grace: float, report: Report) -> bool:
        state = (await self.status(guest)).state
        ended = state in ("gone", "shutdown")
        if state in ("running", "paused") and grace > 0:
            report(Progress(text="waiting for the guest to power off"))
            with contextlib.suppress(GuestError, DeadlineExceeded):  # hung or gone meanwhile: the kill below settles both
                ended = bool(await self._ask(guest, "powerdown", silence=grace + ANSWER, wait=grace))
        async with self._making[guest]:
            await self._end(guest)
        return ended

    async def kill(self, guest: str) -> None:
        async with self._making[guest]:
            await self._end(guest)

    async def reboot(self, guest: str, hard: bool) -> None:
        await self._ask(guest, "reboot", hard=hard)

    async def resume(self, guest: str) -> None:
        await self._ask(guest, "cont")

    # --- disks ---

    async def plug(self, guest: str, disk: GuestDisk) -> None:
        await self._ask(guest, "plug", disk=disk.model_dump(mode="json"))

    async def unplug(self, guest: str, volume: str, timeout: float) -> None:
        await self._ask(guest, "unplug", silence=timeout + SILENCE, volume=volume, timeout=timeout)

    async def resize(self, guest: str, volume: str, size: int) -> None:
        await self._ask(guest, "resize", volume=volume, size=size)

    # --- migration ---

    async def incoming(self, spec: GuestSpec, copy: list[str], peer: str, report: Report) -> Endpoint:
        async with self._making[spec.instance]:
            what = admit(await self.status(spec.instance), spec, incoming=True)
            if what == "replace":
                await self._end(spec.instance)
            if what != "done":
                report(Progress(percent=0, text="waiting for the guest"))
                await self._make(spec, incoming=True, peer=peer, copy=copy)
            port = (await self._ask(spec.instance, "status"))["port"]
        return Endpoint(node=self.node, host=self.address or "127.0.0.1", port=port, tls=False)

    async def migrate_out(self, guest: str, to: Endpoint, copy: list[str], report: Report) -> None:
        await self._ask(guest, "migrate", report=report, host=to.host, port=to.port, to=to.node, copy=copy, watchdog=self.watchdog)

    async def migrate_continue(self, guest: str, report: Report) -> MigrationFigures:
        return MigrationFigures.model_validate(await self._ask(guest, "migrate_continue", report=report))

    async def migrate_cancel(self, guest: str) -> GuestStatus:
        if self._pid(guest):
            with contextlib.suppress(GuestError, DeadlineExceeded):  # hung or gone: its status says it
                await self._ask(guest, "migrate_cancel")
        return await self.status(guest)

    async def await_incoming(self, guest: str, timeout: float) -> GuestStatus:
        if self._pid(guest):
            with contextlib.suppress(GuestError, DeadlineExceeded):  # it ends when loading fails: its status says it
                await asyncio.wait_for(self._ask(guest, "await_incoming", timeout=timeout), timeout + SILENCE)
        return await self.status(guest)

    # --- processes ---

    def _dir(self, guest: str) -> Path:
        return self.run_dir / guest

    def _spec(self, guest: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self._dir(guest) / "spec.json").read_text()))
        except (OSError, ValueError):
            return {}

    def _pid(self, guest: str) -> int:
        """The process of a guest, 0 if there is none. A pid alone is not believed: pids come round again."""
        try:
            with open(f"{self.run_dir}/{guest}/pid") as file:
                pid, began = file.read().split()
        except (OSError, ValueError):
            return 0
        return int(pid) if fakeguest.start_time(int(pid)) == began else 0

    async def _make(self, spec: GuestSpec, incoming: bool, peer: str, copy: list[str]) -> None:
        """Start a guest's process and let it go on. If this process dies before that, the guest ends instead of running unseen."""
        where = self._dir(spec.instance)
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        extra = {"node": self.node, "address": self.address, "user": self.user, "incoming": incoming, "peer": peer, "copy": copy}
        text = json.dumps({**spec.model_dump(mode="json"), **extra})
        with open(where / "spec.json", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", fakeguest.__file__, str(where),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert child.stdin
        assert child.stdout
        try:
            async with asyncio.timeout(PATIENCE):
                said = await child.stdout.readline()
                if said == b"ready\n":
                    child.stdin.write(b"go\n")
                    await child.stdin.drain()
                rest = await child.stdout.read()
                await child.wait()
        except TimeoutError:
            raise GuestError(f"the process of {spec.instance} did not come up within {PATIENCE:g} s") from None
        finally:
            child.stdin.close()  # whatever has not got its ``go`` by now ends
        if said != b"ready\n" or rest:
            raise self._why(spec, said + rest)

    @staticmethod
    def _why(spec: GuestSpec, said: bytes) -> Exception:
        try:
            data = json.loads(said)
            return from_wire({"code": data["error"], "message": f"{spec.name or spec.instance}: {data['message']}"})
        except (ValueError, KeyError, TypeError):
            return GuestError(f"{spec.name or spec.instance}: {said.decode(errors='replace').strip() or 'its process ended at once'}")

    async def _end(self, guest: str) -> None:
        """Kill the process, if there is one, wait until it has gone, and remove what only a living guest needs."""
        pid = self._pid(guest)
        if pid and not await self._goes(guest, pid, PATIENCE, kill=True):
            raise DeadlineExceeded(f"pid {pid} of {guest} has been killed but does not go", hint="its storage may hang")
        for name in ("control.sock", "console.sock", "pid", "spec.json"):
            (self._dir(guest) / name).unlink(missing_ok=True)

    async def _goes(self, guest: str, pid: int, seconds: float, kill: bool = False) -> bool:
        """Whether a guest's process has gone (killed first, if so wanted) within that time."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        gone, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(handle, gone.set)
        try:
            if self._pid(guest) != pid:  # looked again with the handle in hand: it cannot be somebody else's now
                return True
            if kill:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            await asyncio.wait_for(gone.wait(), seconds)
        except TimeoutError:
            return False
        except ProcessLookupError:
            return True
        finally:
            loop.remove_reader(handle)
            os.close(handle)
        return True

    # --- talking to a guest ---

    @contextlib.asynccontextmanager
    async def _line(self, guest: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        # By way of the directory's descriptor: a Unix socket's path must be shorter than 108 bytes, ours need not be.
        where = os.open(self._dir(guest), os.O_PATH)
        try:
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{where}/control.sock", limit=1 << 20)
        finally:
            os.close(where)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _ask(self, guest: str, do: str, *, silence: float = SILENCE, report: Report | None = None, **order: Any) -> Any:
        """Give an order to a guest and wait for its answer. Errors: what the guest says; GuestError when it has no process;
        DeadlineExceeded when it says nothing for ``silence`` seconds."""
        if not self._pid(guest):
            raise GuestError(f"{guest} does not run on {self.node}")
        return await self._tell(guest, do, silence=silence, report=report, **order)

    async def _tell(self, guest: str, do: str, *, silence: float, report: Report | None = None, **order: Any) -> Any:
        """The same, of a guest that has a process."""
        try:
            async with asyncio.timeout(silence) as limit, self._line(guest) as (reader, writer):
                writer.write(json.dumps({"do": do, **order}).encode() + b"\n")
                while line := await reader.readline():
                    limit.reschedule(asyncio.get_running_loop().time() + silence)
                    answer = json.loads(line)
                    if "ok" in answer:
                        return answer["ok"]
                    if "error" in answer:
                        raise from_wire({"code": answer["error"], "message": f"{guest}: {answer['message']}"})
                    if report:
                        report(Progress(percent=answer["progress"][0], text=answer["progress"][1]))
        except TimeoutError:
            raise DeadlineExceeded(f"{guest} on {self.node} says nothing for {silence:g} s", hint="kill the guest if it hangs") from None
        except OSError as error:
            raise GuestError(f"{guest} on {self.node} cannot be spoken to: {error.strerror or error}") from None
        raise GuestError(f"the process of {guest} on {self.node} ended while it was asked to {do}")
