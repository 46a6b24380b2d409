"""A guest of the fake hypervisor: ``python -I -S fakeguest.py RUNDIR``. A fake: it computes nothing and its streams are plain TCP.

What it shares with a real guest is what matters to storage: it opens its disks, holds the byte locks QEMU would hold, writes records
and acknowledges each one, migrates with QEMU's states, and outlives its starter. Standard library only, few imports: start is quick.

RUNDIR: ``spec.json`` (GuestSpec and node, address, user, incoming, peer, copy), ``pid`` ("PID STARTTIME", locked while it lives),
``control.sock`` (JSON lines), ``console.log``, ``console.sock``. It says ``ready`` on its standard output once the pid is recorded
and the disks are locked, and runs only after ``go`` on its standard input: a guest whose starter died early never runs unseen.

Words of the kernel command line that it knows: ``ctr=vda`` writes records, ``acpi=off`` ignores the power button,
``fake.ram=SECONDS`` is how long its memory takes to move, ``fake.unplug=off`` holds on to its disks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import select
import socket
import sys
from time import monotonic

if __name__ == "__main__":  # -I and -S leave even our own package off the path
    sys.path.insert(0, __file__.rsplit("/", 3)[0])

from atoll.hypervisor.fakedisk import RECORD, SLOTS, Disk, Refused, newest, record
from atoll.hypervisor.fakeloop import Loop, Wait, receive, receive_line, send
from atoll.hypervisor.fakestream import Migration, arrive, leave, stay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from atoll.hypervisor.fakeloop import Task

#: Seconds between two signs of life while a client waits for something.
SIGN = 1.0


def options(append: str) -> dict[str, str]:
    """The words of a kernel command line; a word without ``=`` has the value ''."""
    return {word.partition("=")[0]: word.partition("=")[2] for word in append.split()}


def start_time(pid: int) -> str:
    """When the process started, in clock ticks since boot; '' when there is none (a zombie is none). With the pid it names a process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Guest:
    """The guest: what it is, what it can be told (``do_*``), and what it does by itself."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.loop = spec, Loop()
        self.options = options(spec["boot"]["append"])
        self.disks = {disk.volume: disk for disk in map(Disk, spec["disks"])}
        self.state, self.reason = ("incoming", "") if spec["incoming"] else ("running", "")
        self.disk_errors: dict[str, str] = {}
        self.arriving, self.ending, self.recorded = "", False, False
        self.migration: Migration | None = None
        self.n, self.writer, self.port = 0, "", 0
        self.viewers: list[socket.socket] = []

    # --- life ---

    def prepare(self) -> None:
        """Everything that can fail: the pid, the disks, the sockets. Errors: Refused, OSError."""
        pid = os.open("pid", os.O_RDWR | os.O_CREAT, 0o600)  # stays open, and locked, as long as we live
        try:
            fcntl.flock(pid, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("conflict", "a guest runs in this directory already") from None
        self.recorded = True
        os.ftruncate(pid, 0)
        os.write(pid, f"{os.getpid()} {start_time(os.getpid())}\n".encode())
        self.console = os.open("console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for disk in self.disks.values():
            if self.state == "running" or disk.volume in self.spec["copy"]:
                disk.open(fill=disk.volume in self.spec["copy"])
            else:
                os.close(os.open(disk.path, os.O_RDONLY))  # a path that is not there should be known now, not at the switchover
        if self.state == "incoming":
            host = self.spec["address"] or "127.0.0.1"
            self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            self.listener.setblocking(False)
            self.port = self.listener.getsockname()[1]
        self.loop.spawn(self.accept("control.sock", self.serve))
        self.loop.spawn(self.accept("console.sock", self.show))

    def withdraw(self) -> None:
        """Let go of everything before saying why: who hears that must find neither a process recorded nor a disk locked."""
        for disk in self.disks.values():
            disk.close()
        if self.recorded:
            os.unlink("pid")

    def begin(self) -> None:
        """Run, or wait for what comes."""
        self.loop.spawn(self.write())
        if self.state == "incoming":
            self.loop.spawn(arrive(self))
        else:
            self.boot()

    def boot(self, counter: int | None = None) -> None:
        """What a kernel with the counter as its only program would do; a guest that has arrived brings its counter along."""
        name, slots = self.options.get("ctr", ""), sorted(self.disks.values(), key=lambda disk: disk.slot)
        index = ord(name[2]) - ord("a") if len(name) == 3 and name.startswith("vd") else -1
        self.writer = slots[index].volume if 0 <= index < len(slots) and slots[index].writes else ""
        self.loop.notify()
        if counter is not None:
            self.n = counter
        elif self.writer:
            self.n = newest(os.pread(self.disks[self.writer].fd, SLOTS * RECORD, 0))
            self.say(f"CTR RESUME {self.n}")

    def say(self, line: str) -> None:
        """A line on the console."""
        data = line.encode() + b"\n"
        for fd in (self.console, *(viewer.fileno() for viewer in self.viewers)):
            try:
                os.write(fd, data)
            except OSError:
                continue  # a full file system or a viewer that does not read loses lines, never the guest

    def activate(self) -> None:
        """Open and lock all disks. Errors: Refused; then none that was closed is open."""
        opened = [disk for disk in self.disks.values() if disk.fd < 0]
        try:
            for disk in opened:
                disk.open()
        except Refused:
            for disk in opened:
                disk.close()
            raise

    def become(self, state: str, reason: str = "", disk_errors: dict[str, str] | None = None) -> None:
        self.state, self.reason, self.disk_errors = state, reason, disk_errors or {}
        self.loop.notify()

    async def write(self) -> None:
        """Write the next record every 20 ms while the guest runs."""
        while True:
            disk = self.disks.get(self.writer)
            if self.state != "running" or disk is None:
                await Wait(change=True)
                continue
            n = self.n + 1
            try:
                os.pwrite(disk.fd, record(n), n % SLOTS * RECORD)
                os.fdatasync(disk.fd)
            except OSError as error:
                what = {disk.volume: "full" if error.errno == errno.ENOSPC else "failed"}
                self.become("paused", f"io-error: {disk.volume}: {error.strerror}", what)  # werror=stop: never pretend
                continue
            self.n = n
            self.say(f"ACK {n}")
            await Wait(seconds=0.02)

    # --- being talked to ---

    async def accept(self, path: str, serve: Callable[[socket.socket], Task]) -> None:
        try:
            os.unlink(path)  # of an earlier guest; we hold the lock on the directory's pid
        except FileNotFoundError:
            pass
        server = socket.socket(socket.AF_UNIX)
        server.setblocking(False)
        server.bind(path)
        server.listen(16)
        while True:
            await Wait(server.fileno(), select.POLLIN)
            try:
                client = server.accept()[0]
            except OSError:
                continue
            client.setblocking(False)
            self.loop.spawn(serve(client))

    async def show(self, client: socket.socket) -> None:
        """Somebody at the console: sees what is printed; what is typed is ignored."""
        self.viewers.append(client)
        try:
            while True:
                await receive(client, 1)
        except OSError:
            self.viewers.remove(client)
            client.close()

    async def serve(self, client: socket.socket) -> None:
        """Answer one client: ``{"do": ..., ...}`` gives ``{"progress": [percent, text]}`` lines, then ``{"ok"}`` or ``{"error"}``."""
        try:
            while True:
                order = await receive_line(client)
                try:
                    answer = {"ok": await getattr(self, "do_" + order["do"])(order, client)}
                except Refused as error:
                    answer = {"error": error.kind, "message": str(error)}
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    answer = {"error": "invalid_input", "message": f"not an order: {error!r}"}
                await send(client, json.dumps(answer).encode() + b"\n", 5)
                if self.ending:
                    os._exit(0)
        except (OSError, ValueError):
            client.close()

    async def tell(self, client: socket.socket, percent: float | None, text: str) -> None:
        await send(client, json.dumps({"progress": [percent, text]}).encode() + b"\n", 5)

    async def until(
        self, done: Callable[[], bool], client: socket.socket, percent: Callable[[], tuple[float | None, str]], over: float = 1e99
    ) -> None:
        """Wait until something has come true, or the time is ``over``, and let the client know that we live."""
        told: object = None
        while not done() and monotonic() < over:
            now = percent()
            if now != told:
                await self.tell(client, *now)
                told = now
            elif not await Wait(seconds=min(SIGN, over - monotonic()), change=True):
                await self.tell(client, *now)

    # --- orders ---

    async def do_status(self, order: dict[str, Any], client: socket.socket) -> dict[str, Any]:
        move = self.migration
        return {
            "instance": self.spec["instance"],
            "name": self.spec["name"],
            "generation": self.spec["generation"],
            "state": self.state,
            "reason": self.reason or (move.error if move else ""),
            "migration": move.status if move else self.arriving,
            "pid": os.getpid(),
            "memory": self.spec["memory"],
            "vcpus": self.spec["vcpus"],
            "disk_errors": self.disk_errors,
            "disks": sorted(self.disks),
            "port": self.port,
        }

    async def do_cont(self, order: dict[str, Any], client: socket.socket) -> None:
        if self.state == "running":
            return
        if self.state != "paused" or self.moving():
            raise Refused("guest_error", f"a guest that is {self.state} {self.moving()} cannot go on")
        self.activate()
        self.arriving = ""
        self.become("running")

    async def do_stop(self, order: dict[str, Any], client: socket.socket) -> None:
        if self.state == "running":
            self.become("paused", "stopped")

    async def do_powerdown(self, order: dict[str, Any], client: socket.socket) -> bool:
        """The power button. True if the guest has ended within ``wait`` seconds."""
        deadline = monotonic() + float(order["wait"])
        while self.state == "paused" and await Wait(seconds=deadline - monotonic(), change=True):
            continue
        if self.state == "running" and self.options.get("acpi") != "off":
            self.say("reboot: Power down")
            self.become("shutdown", "by the guest")
        while self.state != "shutdown" and await Wait(seconds=deadline - monotonic(), change=True):
            continue
        return self.state == "shutdown"

    async def do_quit(self, order: dict[str, Any], client: socket.socket) -> None:
        """The process ends after its answer."""
        self.ending = True

    async def do_reboot(self, order: dict[str, Any], client: socket.socket) -> None:
        if self.state != "running":
            raise Refused("guest_error", f"a guest that is {self.state} cannot be rebooted")
        if order["hard"] or self.options.get("acpi") != "off":
            self.say("reboot: Restarting system")
            self.boot()

    def moving(self) -> str:
        """How far a migration is that has not ended; '' when there is none."""
        return f"(migration: {self.migration.status})" if self.migration and not self.migration.ended else ""

    def settled(self) -> None:
        if self.state not in ("running", "paused") or self.moving():
            raise Refused("guest_error", f"its disks cannot change while it is {self.state} {self.moving()}")

    async def do_plug(self, order: dict[str, Any], client: socket.socket) -> None:
        disk = Disk(order["disk"])
        present = self.disks.get(disk.volume)
        if present and present.slot == disk.slot:
            return
        self.settled()
        if present:
            raise Refused("conflict", f"{disk.volume} is plugged into slot {present.slot}, not {disk.slot}")
        if any(other.slot == disk.slot for other in self.disks.values()):
            raise Refused("conflict", f"another disk is plugged into slot {disk.slot}")
        disk.open()
        self.disks[disk.volume] = disk
        self.say(f"PLUG {disk.slot} {disk.volume}")

    async def do_unplug(self, order: dict[str, Any], client: socket.socket) -> None:
        if order["volume"] not in self.disks:
            return
        self.settled()
        if self.options.get("fake.unplug") == "off":
            await Wait(seconds=float(order["timeout"]))
            raise Refused("deadline_exceeded", f"the guest has not let go of {order['volume']} within {order['timeout']:g} s")
        disk = self.disks.pop(order["volume"])
        disk.close()
        self.say(f"UNPLUG {disk.slot} {disk.volume}")

    async def do_resize(self, order: dict[str, Any], client: socket.socket) -> None:
        disk = self.disks.get(order["volume"])
        if disk is None:
            raise Refused("guest_error", f"{order['volume']} is not plugged")
        self.settled()
        size = os.lseek(disk.fd, 0, os.SEEK_END)
        if size < order["size"]:
            raise Refused("guest_error", f"{disk.path} has {size} bytes, not {order['size']}")
        disk.size = order["size"]
        self.say(f"RESIZE {disk.slot} {disk.size}")

    async def do_migrate(self, order: dict[str, Any], client: socket.socket) -> None:
        """Answers when the guest is paused before its switchover (or further)."""
        move = self.migration
        if move is None or move.status in ("failed", "cancelled"):
            if self.state != "running" and not self.disk_errors:
                raise Refused("guest_error", f"a guest that is {self.state} cannot be migrated")
            unknown = [volume for volume in order["copy"] if volume not in self.disks]
            if unknown:
                raise Refused("guest_error", f"{', '.join(unknown)} is not plugged")
            self.migration = move = Migration(order)
            move.task = leave(self, move)
            self.loop.spawn(move.task)
        elif move.target != order["to"]:
            raise Refused("conflict", f"it is being migrated to {move.target}")
        running = move
        await self.until(lambda: running.status not in ("setup", "active"), client, lambda: (round(running.percent, 1), running.text))
        self.failed(move)

    def failed(self, move: Migration) -> None:
        if move.status in ("failed", "cancelled"):
            raise Refused("migration_failed", move.error)

    async def do_migrate_continue(self, order: dict[str, Any], client: socket.socket) -> dict[str, int]:
        move = self.migration
        if move is None:
            kind = "migration_failed" if self.state == "running" else "guest_error"
            raise Refused(kind, f"there is no migration to go on with: the guest is {self.state}")
        if move.status in ("setup", "active"):
            raise Refused("guest_error", "the guest is not paused before its switchover yet")
        move.go = True
        self.loop.notify()
        await self.until(lambda: move.ended, client, lambda: (round(move.percent, 1), "switchover"))
        self.failed(move)
        return move.final

    async def do_migrate_cancel(self, order: dict[str, Any], client: socket.socket) -> None:
        move = self.migration
        if move and not move.ended and move.task:
            self.loop.end(move.task)
            stay(self, move, "cancelled", "it was cancelled")

    async def do_await_incoming(self, order: dict[str, Any], client: socket.socket) -> bool:
        over = monotonic() + float(order["timeout"])
        await self.until(lambda: self.state != "incoming", client, lambda: (None, self.arriving), over)
        return self.state != "incoming"


def main() -> None:
    """Prepare in the child, say so, and run when told; the starter goes at once."""
    os.chdir(sys.argv[1])
    os.umask(0o077)
    if os.fork():
        os._exit(0)
    os.setsid()
    guest = None
    try:
        with open("spec.json") as file:
            guest = Guest(json.load(file))
        guest.prepare()
        _drop(guest.spec["user"])
    except (Refused, OSError, KeyError, ValueError) as error:
        if guest:
            guest.withdraw()
        os.write(1, json.dumps({"error": getattr(error, "kind", "guest_error"), "message": str(error)}).encode() + b"\n")
        os._exit(1)
    os.write(1, b"ready\n")
    if not select.select([0], [], [], 30)[0] or os.read(0, 3) != b"go\n":
        os._exit(1)
    guest.begin()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(guest.console, 2)
    os.dup2(null, 0)
    os.dup2(null, 1)  # its end tells the starter's client that the guest is on its way
    guest.loop.run()


def _drop(user: str) -> None:
    """Become who guests are; disks and sockets are open already."""
    if user and os.geteuid() == 0:
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)


if __name__ == "__main__":
    main()
