"""The hypervisor contract, kept by QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from atoll.hypervisor.contract import Report
from atoll.hypervisor.qemu import command, devices, incoming, migrate, network, probe, process, status
from atoll.hypervisor.qemu.files import GuestFiles, account, hand_over
from atoll.hypervisor.qemu.qmp import Closed, Monitors, Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.errors import Conflict, DeadlineExceeded, DiskInUse, GuestError
from atoll.model.messages import Endpoint, GuestDisk, GuestSpec, GuestStatus, MigrationFigures, Progress


class QemuHypervisor:
    """Guests of one node. Holds nothing that cannot be found again from ``run_dir`` and the processes of the node.

    ``run_dir``: for run-time files, empty after a reboot; short, because Unix sockets lie below it. ``tls_dir``: ``ca.pem``, ``cert.pem``,
    ``key.pem`` of the node, needed for migrations only; the certificate's subject must be ``CN=<node>``. ``address``: where migrations
    listen. ``user``: who guests run as; empty = who we are.
    """

    name = "qemu"

    def __init__(self, run_dir: Path | str, tls_dir: Path | str, address: str, node: str, user: str = "") -> None:
        self.run_dir = Path(run_dir).absolute()
        self.tls_dir = Path(tls_dir).absolute()
        self.address = address
        self.node = node
        self.user = user
        self.tuning = Tuning()
        self._monitors = Monitors()
        self._starting: dict[str, asyncio.Lock] = {}
        #: Guests that we have told to power off in order to boot them again.
        self._rebooting: set[str] = set()
        #: What stopped which process of which guest; asked once for each stop.
        self._disk_errors: dict[str, tuple[int, dict[str, str]]] = {}

    # --- looking ---

    async def probe(self) -> str:
        """The accelerator that really works here: ``kvm``, ``tcg`` or ``none``. At most ten seconds, once per boot."""
        return await probe.accelerator(self.run_dir, account(self.user))

    async def guests(self) -> list[GuestStatus]:
        """Every guest that has a process here."""
        below = str(self.run_dir / "guests") + "/"
        mine = {Path(pidfile).parent.name for _, pidfile in process.scan() if pidfile.startswith(below)}
        for guest in mine:
            self._files(guest).limit_logs()
        return list(await asyncio.gather(*(self.status(guest) for guest in sorted(mine))))

    async def status(self, guest: str) -> GuestStatus:
        """One guest, within about a second; three if it is busy."""
        found = await status.look(self._files(guest), self._monitors, self.tuning, self._disk_errors)
        if found.state == "shutdown" and guest in self._rebooting:
            return found.model_copy(update={"state": "running", "reason": "rebooting"})
        return found

    def console(self, guest: str) -> str:
        """Path of the Unix socket of its serial console."""
        return str(self._files(guest).serial)

    def console_log(self, guest: str) -> Path:
        """What its serial console has said lately (up to 4 MiB); kept for a week after the guest has ended."""
        return self._files(guest).console_log

    # --- life ---

    async def start(self, spec: GuestSpec, report: Report) -> None:
        """See the contract. A guest that has powered itself off is started anew; a start that stopped halfway is finished."""
        async with self._starting.setdefault(spec.instance, asyncio.Lock()):
            now = await self.status(spec.instance)
            if now.state == "shutdown":
                await self.kill(spec.instance)
            elif now.state != "gone":
                _must_match(now, spec)
                if now.state == "hung":
                    hint = f"atoll instance stop {spec.name} --timeout 0"
                    raise GuestError(f"guest {spec.instance} has a process here that does not answer", hint=hint)
                if now.state in ("incoming", "migrated") or now.migration in (migrate.PAUSED, *migrate.BEYOND):
                    raise Conflict(f"guest {spec.instance} cannot be started: it is {now.state} {now.migration}".strip())
                if now.state == "running":
                    return
            if now.state in ("gone", "shutdown"):
                report(Progress(text="opening disks"))
                await self._launch(spec, arriving=False)
            async with self._session(spec.instance) as session:
                await session.execute("cont", limit=self.tuning.disk_command)
            report(Progress(percent=100, text="running"))

    async def stop(self, guest: str, grace: float, report: Report) -> bool:
        """See the contract. Only a running guest is asked; one that stands still for any reason is ended at once."""
        files = self._files(guest)
        now = (await self.status(guest)).state
        if now == "gone":
            await self.kill(guest)  # its files may be left
            return True
        itself = now == "shutdown"
        if grace > 0 and now == "running":
            with contextlib.suppress(Closed, Refused, TimeoutError):
                async with self._monitors.session(files.qmp, command=self.tuning.command) as session:
                    itself = await status.power_off(session, grace, self.tuning, report)
        report(Progress(text="ending the process"))
        # Politely first: QEMU finishes what it has begun to write.
        if now != "hung":
            with contextlib.suppress(Closed, Refused, TimeoutError):
                async with self._monitors.session(files.qmp, command=self.tuning.answer) as session:
                    await session.execute("quit")
            await process.gone(files, self.tuning.quit)
        await self.kill(guest)
        report(Progress(percent=100, text="stopped"))
        return itself

    async def kill(self, guest: str) -> None:
        """End its process at once and wait until it is gone, then remove its files and taps."""
        files = self._files(guest)
        await process.end(files, self.tuning.kill, number=signal.SIGKILL)
        spec = files.spec()
        if spec:
            await network.remove(self.node, spec)
        files.remove()

    async def reboot(self, guest: str, hard: bool) -> None:
        """See the contract. A soft reboot is a power-off by the guest itself and a reset: every guest that knows ACPI can do that."""
        async with self._session(guest) as session:
            if (await session.execute("query-status"))["status"] not in ("running", "shutdown"):
                raise GuestError(f"guest {guest} does not run, so that it cannot reboot")
            self._rebooting.add(guest)
            try:
                if not hard and not await status.power_off(session, self.tuning.reboot, self.tuning, lambda progress: None):
                    raise DeadlineExceeded(
                        f"guest {guest} did not shut down within {self.tuning.reboot:.0f} s",
                        hint=f"atoll instance reboot --type hard {guest}",
                    )
                await session.execute("system_reset")
                await session.execute("cont", limit=self.tuning.disk_command)
            finally:
                self._rebooting.discard(guest)

    async def resume(self, guest: str) -> None:
        """See the contract. Errors also: DiskInUse. Success too where a guest has arrived that had powered itself off on its way."""
        async with self._session(guest) as session:
            runstate = (await session.execute("query-status"))["status"]
            if runstate == "running" or (runstate == "shutdown" and self._files(guest).load("endpoint")):
                return
            if runstate in ("inmigrate", "postmigrate", "finish-migrate", "shutdown"):
                # QEMU itself would let a guest run that has been handed over: two writers.
                raise GuestError(f"guest {guest} cannot be resumed: {status.REASONS[runstate]}")
            self._disk_errors.pop(guest, None)
            await incoming.let_run(session, self.tuning)

    # --- disks ---

    async def plug(self, guest: str, disk: GuestDisk) -> None:
        """See the contract. Errors: GuestError, DiskInUse, Conflict (it is in another slot)."""
        async with self._session(guest) as session:
            hand_over(command.disk_path(disk), account(self.user))
            await devices.plug(session, disk, self.tuning)

    async def unplug(self, guest: str, volume: str, timeout: float) -> None:
        """See the contract; ``timeout`` in seconds."""
        async with self._session(guest) as session:
            await devices.unplug(session, guest, volume, timeout, self.tuning)

    async def resize(self, guest: str, volume: str, size: int) -> None:
        """See the contract. Errors: GuestError."""
        async with self._session(guest) as session:
            await session.execute("block_resize", {"node-name": volume, "size": size}, limit=self.tuning.disk_command)

    # --- movement ---

    async def incoming(self, spec: GuestSpec, copy: list[str], peer: str, report: Report) -> Endpoint:
        """See the contract. Errors: HostError (no certificate), GuestError, Conflict."""
        files = self._files(spec.instance)
        async with self._starting.setdefault(spec.instance, asyncio.Lock()):
            now = await self.status(spec.instance)
            if now.state != "gone":
                _must_match(now, spec)
                kept = files.load("endpoint")
                if kept:
                    return Endpoint(**kept)
                if now.state != "incoming":
                    raise Conflict(f"guest {spec.instance} is here already: {now.state}")
                await self.kill(spec.instance)  # an earlier call got no further than this; nobody knows its port
            report(Progress(text="opening disks"))
            await self._launch(spec, arriving=True)
            try:
                async with self._session(spec.instance) as session:
                    target = incoming.Target(session, files, self.tls_dir, account(self.user), self.tuning, self.node, self.address)
                    return await incoming.listen(target, copy, peer)
            except BaseException:
                await self.kill(spec.instance)
                raise

    async def migrate_out(self, guest: str, to: Endpoint, copy: list[str], report: Report) -> None:
        """See the contract."""
        async with self._source(guest) as source:
            await migrate.out(source, to, copy, report)

    async def migrate_continue(self, guest: str, report: Report) -> MigrationFigures:
        """See the contract."""
        async with self._source(guest) as source:
            return await migrate.proceed(source, report)

    async def migrate_cancel(self, guest: str) -> GuestStatus:
        """See the contract. No process = state ``gone``."""
        if (await self.status(guest)).state != "gone":
            async with self._source(guest) as source:
                await migrate.back(source)
        return await self.status(guest)

    async def await_incoming(self, guest: str, timeout: float) -> GuestStatus:
        """See the contract; still ``incoming`` when ``timeout`` seconds were not enough."""
        files = self._files(guest)
        try:
            async with self._monitors.session(files.qmp, command=self.tuning.command) as session:
                await incoming.loaded(session, timeout)
        except (Closed, TimeoutError):
            await process.gone(files, self.tuning.answer)
        return await self.status(guest)

    # --- within ---

    def _files(self, guest: str) -> GuestFiles:
        return GuestFiles(self.run_dir, guest)

    @contextlib.asynccontextmanager
    async def _session(self, guest: str) -> AsyncIterator[Session]:
        """A conversation with a guest, whose failures come out as our own errors."""
        files = self._files(guest)
        try:
            async with self._monitors.session(files.qmp, command=self.tuning.command) as session:
                yield session
        except Refused as error:
            if process.is_lock_failure(str(error)):
                raise DiskInUse(f"a disk of guest {guest} is open for writing elsewhere: {error}") from None
            raise GuestError(f"QEMU of guest {guest} refused: {error}") from None
        except Closed:
            words = files.last_words()
            raise GuestError(f"guest {guest} has no process here" + (f"; QEMU's last words: {words}" if words else "")) from None
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU of guest {guest} does not answer", hint=f"atoll instance info {guest}") from None

    @contextlib.asynccontextmanager
    async def _source(self, guest: str) -> AsyncIterator[migrate.Source]:
        async with self._session(guest) as session:
            yield migrate.Source(session, self._files(guest), self.tls_dir, account(self.user), self.tuning)

    async def _launch(self, spec: GuestSpec, *, arriving: bool) -> None:
        files, owner = self._files(spec.instance), account(self.user)
        command.command(spec, files, [None] * len(spec.nics), incoming=arriving)  # refuses a wrong spec before anything is made
        files.prepare(spec, owner)
        try:
            for disk in spec.disks:
                hand_over(command.disk_path(disk), owner)
            with network.opened(await network.make(self.node, spec)) as taps:
                argv = command.command(spec, files, taps, incoming=arriving)
                inherited = [tap for tap in taps if tap is not None]
                await process.launch(argv, files, owner, self._monitors, self.tuning.launch, inherited)
        except BaseException:
            # Also when we are told to give up: nothing may be left that nobody knows of. It is stopped, so that nothing is lost.
            await self.kill(spec.instance)
            raise


def _must_match(now: GuestStatus, spec: GuestSpec) -> None:
    if now.generation != spec.generation:
        raise Conflict(
            f"guest {spec.instance} is {now.state} here with generation {now.generation}, not {spec.generation}",
            hint="atoll cluster verify",
        )
