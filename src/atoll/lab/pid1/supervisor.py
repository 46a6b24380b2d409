"""Keeps a node's services running. One thread, one event loop; it may never block, because it is also the reaper of all orphans.

Orders come over ``control.sock`` in the node's directory: one JSON object per packet, one in reply.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.lab.pid1.nodespec import NodeSpec

#: Seconds before a service that ended is started again: doubles from the first to the last, starts anew after it ran for STEADY seconds.
FIRST_PAUSE, LAST_PAUSE, STEADY = 0.1, 5.0, 10.0
_PACKET = 1 << 18


@dataclass
class Service:
    """One service and what became of it. ``pid`` is as the node sees it."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    wanted: bool = True
    pid: int = 0
    restarts: int = -1
    pause: float = FIRST_PAUSE
    started: float = 0.0
    #: When to start it (again) or, if it is not wanted, to kill it.
    due: float | None = None
    last: str = ""
    waiting: list[socket.socket] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """As told over the socket."""
        state = "running" if self.pid else "restarting" if self.wanted else "stopped"
        return {"name": self.name, "argv": self.argv, "pid": self.pid, "state": state, "restarts": max(self.restarts, 0), "last": self.last}


def listen(directory: Path) -> socket.socket:
    """The control socket. Bound from within its directory: a socket's whole path may have 107 bytes only."""
    here = os.getcwd()
    os.chdir(directory)
    try:
        Path("control.sock").unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind("control.sock")
        os.chmod("control.sock", 0o600)
        server.listen(16)
        server.setblocking(False)
    finally:
        os.chdir(here)
    return server


class Supervisor:
    """Started once, after the node's root is in place. ``definitions`` and ``log`` are open directories: their paths are out of sight."""

    def __init__(self, spec: NodeSpec, server: socket.socket, definitions: int, log: int) -> None:
        self.spec = spec
        self.server = server
        self.definitions = definitions
        self.log = log
        self.services: dict[str, Service] = {}
        self.selector = selectors.DefaultSelector()
        self.wake, wake = socket.socketpair()
        self.wake.setblocking(False)
        wake.setblocking(False)
        self._wake_writer = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.selector.register(self.wake, selectors.EVENT_READ)
        self.selector.register(server, selectors.EVENT_READ)

    def load(self) -> None:
        """Read ``services.json``: start what is new, stop what is no longer there; a changed command counts from the next start."""
        try:
            with open(os.open("services.json", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.definitions)) as file:
                wanted = json.load(file)
        except FileNotFoundError:
            wanted = {}
        for name, entry in wanted.items():
            known = self.services.get(name)
            if known:
                known.argv, known.environment = entry["argv"], entry["environment"]
            else:
                self.services[name] = Service(name, entry["argv"], entry["environment"], due=time.monotonic())
        for name in set(self.services) - set(wanted):
            self._stop(self.services[name], 5.0)
        self._timers()

    def run(self) -> None:
        """For ever."""
        while True:
            for key, _ in self.selector.select(self._timers()):
                if key.fileobj is self.wake:
                    while self._drain():
                        pass
                elif key.fileobj is self.server:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._answer(key.fileobj)
            self._reap()

    def _drain(self) -> bool:
        try:
            return bool(self.wake.recv(4096))
        except BlockingIOError:
            return False

    def _accept(self) -> None:
        try:
            connection, _ = self.server.accept()
        except OSError:
            return
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ)

    def _answer(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        try:
            request = json.loads(connection.recv(_PACKET) or b"{}")
            reply = self._order(request, connection)
        except (OSError, KeyError, TypeError, ValueError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        if reply is not None:
            self._reply(connection, reply)

    def _reply(self, connection: socket.socket, reply: dict[str, Any]) -> None:
        try:
            connection.send(json.dumps(reply).encode())
        except OSError:
            pass
        connection.close()

    def _order(self, request: dict[str, Any], connection: socket.socket) -> dict[str, Any] | None:
        """Carry it out; None when the reply comes later."""
        order = request["order"]
        if order == "load":
            self.load()
        elif order == "start":
            service = self.services[request["name"]]
            if not service.wanted or not service.pid:
                service.wanted, service.due, service.pause = True, None if service.pid else time.monotonic(), FIRST_PAUSE
                self._timers()
        elif order == "stop":
            service = self.services[request["name"]]
            self._stop(service, float(request["grace"]))
            if service.pid:
                service.waiting.append(connection)
                return None
        elif order in ("mount-shared", "unmount-shared"):
            # Only here, because most nodes never need it and it brings in ctypes.
            from atoll.lab.pid1 import rootfs, syscalls

            if order == "mount-shared":
                rootfs.mount_shared(self.spec)
            else:
                syscalls.umount(f"/{rootfs.SHARED}", syscalls.MNT_DETACH if request.get("lazy") else 0)
        elif order != "status":
            raise ValueError(f"unknown order {order}")
        return {"services": [service.describe() for service in self.services.values()]}

    def _stop(self, service: Service, grace: float) -> None:
        service.wanted = False
        service.due = time.monotonic() + grace if service.pid else None
        if service.pid:
            os.kill(service.pid, signal.SIGTERM)

    def _timers(self) -> float | None:
        """Do what is due; seconds until something is due again."""
        now = time.monotonic()
        for service in self.services.values():
            if service.due is not None and service.due <= now:
                service.due = None
                if service.pid:
                    os.kill(service.pid, signal.SIGKILL)
                elif service.wanted:
                    self._start(service)
        dues = [service.due for service in self.services.values() if service.due is not None]
        return max(0.0, min(dues) - now) if dues else None

    def _start(self, service: Service) -> None:
        environment = self.spec.environment | service.environment
        os.environ["PATH"] = environment.get("PATH", os.defpath)
        output = os.open(f"{service.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640, dir_fd=self.log)
        try:
            service.pid = os.posix_spawnp(
                service.argv[0],
                service.argv,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        except OSError as error:
            self._ended(service, f"cannot start: {error}")
        else:
            service.started = time.monotonic()
            service.restarts += 1
        finally:
            os.close(output)

    def _reap(self) -> None:
        by_pid = {service.pid: service for service in self.services.values() if service.pid}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            service = by_pid.get(pid)
            if service:
                code = os.waitstatus_to_exitcode(status)
                self._ended(service, f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}")

    def _ended(self, service: Service, how: str) -> None:
        now = time.monotonic()
        if service.started and now - service.started >= STEADY:
            service.pause = FIRST_PAUSE
        service.pid, service.last, service.due = 0, how, None
        print(time.strftime("%Y-%m-%dT%H:%M:%S"), f"{service.name}: {how}", flush=True)
        if service.wanted:
            service.due = now + service.pause
            service.pause = min(service.pause * 2, LAST_PAUSE)
        for connection in service.waiting:
            self._reply(connection, {"services": [known.describe() for known in self.services.values()]})
        service.waiting.clear()
