"""Runs programs in a kernel node for callers outside: a process per virtio-serial port, one caller at a time on each.

A request is a line, ``\\nLAB NONCE LENGTH\\n``, and LENGTH bytes of JSON: ``{"argv": [...], "environment": {...}, "terminal": [rows,
columns]}``, or ``{"order": {...}}`` for the node's first process. The reply begins with ``\\0LAB NONCE\\n``: what comes before it was meant
for a caller who has gone. Then frames go both ways, a letter and four bytes of length before each:

    in   i  standard input (empty: its end)
    out  o  standard output    e  standard error    x  the exit status, in digits    r  the reply to an order, JSON

A caller who hangs up takes the program with him. No heavy imports: an emulated processor needs a second for them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time

_PREAMBLE = b"\nLAB "
_CHUNK = 32768
_PORTS = "/sys/class/virtio-ports"
_CONTROL = "/run/atoll-lab/control.sock"
#: Seconds that a program's output is read after its end: a daemon that it left may keep it open.
_LINGER = 0.3


class Gone(Exception):
    """The caller has hung up, or another one is there already."""

    def __init__(self, begun: bytes = b"") -> None:
        super().__init__()
        #: What the new one has said so far.
        self.begun = begun


class Port:
    """One port."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def read(self, count: int) -> bytes:
        """Exactly so much. Raises Gone."""
        data = b""
        while len(data) < count:
            try:
                part = os.read(self.fd, count - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not part:
                raise Gone
            data += part
        return data

    def write(self, data: bytes) -> None:
        """All of it. Raises Gone."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def frame(self, kind: bytes, data: bytes) -> None:
        """Send one."""
        self.write(kind + len(data).to_bytes(4, "big") + data)

    def _wait(self, what: int) -> None:
        poll = select.poll()
        poll.register(self.fd, what)
        events = poll.poll()[0][1]
        if events & select.POLLHUP and not events & select.POLLIN:
            raise Gone

    def serve(self) -> None:
        """Callers, for ever."""
        changes = select.epoll()
        changes.register(self.fd, select.EPOLLIN | select.EPOLLET)
        begun = b""
        while True:
            while not begun and not self._readable():
                changes.poll()
            try:
                self._request(begun)
                begun = b""
            except Gone as gone:
                begun = gone.begun

    def _readable(self) -> bool:
        """Somebody is there and has said something. Where nobody is, the port's end can be read, besides."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return [what for _, what in poll.poll(0)] == [select.POLLIN]

    def _request(self, begun: bytes) -> None:
        while not begun.endswith(_PREAMBLE):
            begun = (begun + self.read(1))[-len(_PREAMBLE) :]
        line = b""
        while not line.endswith(b"\n"):
            line += self.read(1)
        nonce, length = line.split()
        request = json.loads(self.read(int(length)))
        self.write(b"\0LAB " + nonce + b"\n")
        if "order" in request:
            self.frame(b"r", _order(request))
        else:
            self.frame(b"x", str(Program(self, request).run()).encode())


def _order(request: dict[str, object]) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(_CONTROL)
        connection.send(json.dumps(request["order"]).encode())
        return connection.recv(1 << 18)


class Program:
    """One program, run for a caller."""

    def __init__(self, port: Port, request: dict[str, object]) -> None:
        self.port = port
        self.poll = select.poll()
        #: What it is given but has not read yet; None after its end.
        self.given: bytearray | None = bytearray()
        self.outputs: dict[int, bytes] = {}
        #: It gets no more after that. A terminal has no end.
        self.last = False
        self.terminal = bool(terminal := request.get("terminal"))
        if terminal:
            master, slave = os.openpty()
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *terminal, 0, 0))  # type: ignore[misc]
            self.stdin, ends = os.dup(master), [slave] * 3
            self.outputs[master] = b"o"
        else:
            (first, self.stdin), (out, second), (err, third) = os.pipe(), os.pipe(), os.pipe()
            ends = [first, second, third]
            self.outputs = {out: b"o", err: b"e"}
        os.set_blocking(self.stdin, False)
        self.pid = self._start(request, ends, self.terminal)
        for fd in set(ends):
            os.close(fd)
        self.ended = os.pidfd_open(self.pid)
        for fd in (*self.outputs, self.ended):
            self.poll.register(fd, select.POLLIN)

    @staticmethod
    def _start(request: dict[str, object], ends: list[int], terminal: bool) -> int:
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            if terminal:
                fcntl.ioctl(ends[0], termios.TIOCSCTTY, 0)
            for number, fd in enumerate(ends):
                os.dup2(fd, number)
            os.closerange(3, 256)
            os.chdir("/")
            argv: list[str] = request["argv"]  # type: ignore[assignment]
            os.execvpe(argv[0], argv, request["environment"])  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - a child may only end, and must say why
            os.write(2, f"{getattr(error, 'strerror', error)}: {request['argv'][0]}\n".encode())  # type: ignore[index]
        os._exit(127)

    def run(self) -> int:
        """Until it has ended; its exit status, as a shell tells it. Raises Gone, when it has been killed."""
        try:
            self._pass_on()
        except Gone:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            raise
        finally:
            for fd in (*self.outputs, self.ended, self.stdin):
                if fd >= 0:
                    os.close(fd)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code if code >= 0 else 128 - code

    def _pass_on(self) -> None:
        over = False
        while self.outputs:
            self._listen()
            events = self.poll.poll(_LINGER * 1000 if over else None)
            if over and not events:
                return
            for fd, what in events:
                if fd in self.outputs:
                    self._output(fd)
                elif fd == self.ended:
                    over = True
                    self.poll.unregister(fd)
                elif fd == self.port.fd:
                    self._input(what)
                elif fd == self.stdin:
                    self._feed()
        if not over:
            select.select([self.ended], [], [])

    def _listen(self) -> None:
        """To the caller while there is room for more input; always to his going."""
        full = self.given is not None and len(self.given) > 4 * _CHUNK
        self.poll.register(self.port.fd, 0 if full else select.POLLIN)
        if self.stdin >= 0 and self.given:
            self.poll.register(self.stdin, select.POLLOUT)

    def _output(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except OSError as error:
            # A terminal whose program has gone.
            if error.errno != errno.EIO:
                raise
            data = b""
        if data:
            self.port.frame(self.outputs[fd], data)
        else:
            self.poll.unregister(fd)
            del self.outputs[fd]
            os.close(fd)

    def _input(self, what: int) -> None:
        if not what & select.POLLIN:
            raise Gone
        head = self.port.read(5)
        if head == _PREAMBLE:
            raise Gone(head)
        data = self.port.read(int.from_bytes(head[1:], "big"))
        if self.given is None:
            return
        self.given += data
        self.last = self.last or (not data and not self.terminal)
        self._feed()

    def _feed(self) -> None:
        if self.given and self.stdin >= 0:
            try:
                del self.given[: os.write(self.stdin, self.given)]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._close()
                return
        if not self.given:
            self._forget()
            if self.last:
                self._close()

    def _forget(self) -> None:
        try:
            self.poll.unregister(self.stdin)
        except KeyError:
            pass

    def _close(self) -> None:
        if self.stdin >= 0:
            self._forget()
            os.close(self.stdin)
            self.stdin = -1
        self.given = None


def main() -> None:
    """A process per port; one that ends is started again."""
    running: dict[int, str] = {}
    waiting = sorted(entry.name for entry in os.scandir(_PORTS) if _name(entry.path).startswith("lab.port"))
    while True:
        for name in waiting:
            pid = os.fork()
            if not pid:
                Port(f"/dev/{name}").serve()
            running[pid] = name
        ended, status = os.wait()
        waiting = [running.pop(ended)]
        print(f"the server of {waiting[0]} ended: {status}", file=sys.stderr, flush=True)
        time.sleep(0.1)


def _name(path: str) -> str:
    with open(f"{path}/name") as file:
        return file.read().strip()


if __name__ == "__main__":
    main()
