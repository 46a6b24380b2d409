"""Running programs in a kernel node, over the ports of its machine: ``python -I -S channel.py NODE_DIR -- ARGV...``.

It works while the node's network is cut. The program gets our standard input, environment and, where we have one, a terminal; its exit
status becomes ours; it is killed when we are. Standard library only, and little of it. The other side is pid1/ports.py, with the protocol.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

_CHUNK = 32768


class Unreachable(Exception):
    """The node has no power, or nobody answers."""


def order(directory: str, request: dict[str, Any], deadline: float) -> bytes:
    """Give an order to the node's first process; its reply. Raises Unreachable, TimeoutError."""
    with _port(directory, time.monotonic() + deadline) as port:
        port.settimeout(deadline)
        _ask(port, {"order": request})
        head = _read(port, 5)
        return _read(port, int.from_bytes(head[1:], "big"))


@contextlib.contextmanager
def _port(directory: str, end: float) -> Iterator[socket.socket]:
    """A port of the node's for ourselves. Raises Unreachable."""
    place = os.open(f"{directory}/run", os.O_PATH | os.O_DIRECTORY)
    try:
        while True:
            names = sorted(name for name in os.listdir(f"/proc/self/fd/{place}") if name.startswith("port") and name.endswith(".sock"))
            if not names:
                raise Unreachable("it has no power")
            for name in names:
                lock = os.open(f"/proc/self/fd/{place}/{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with socket.socket(socket.AF_UNIX) as connection:
                        # By way of the open directory: the whole path may be longer than a socket's may be.
                        connection.connect(f"/proc/self/fd/{place}/{name}")
                        yield connection
                        return
                except BlockingIOError:
                    continue
                except (ConnectionRefusedError, FileNotFoundError):
                    raise Unreachable("it has no power") from None
                finally:
                    os.close(lock)
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.02)
    finally:
        os.close(place)


def _ask(port: socket.socket, request: dict[str, Any]) -> None:
    data, nonce = json.dumps(request).encode(), os.urandom(8).hex()
    port.sendall(b"\nLAB %s %d\n" % (nonce.encode(), len(data)) + data)
    mark, seen = b"\0LAB %s\n" % nonce.encode(), b""
    while not seen.endswith(mark):
        seen = (seen + _read(port, 1))[-len(mark) :]


def _read(port: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            part = port.recv(count - len(data))
        except ConnectionError:
            part = b""
        if not part:
            raise Unreachable("it lost its power")
        data += part
    return data


def _run(port: socket.socket, argv: list[str]) -> int:
    terminal = None
    if os.isatty(0) and os.isatty(1):
        size = os.get_terminal_size(1)
        terminal = [size.lines, size.columns]
    _ask(port, {"argv": argv, "environment": dict(os.environ), "terminal": terminal})
    with _raw(0) if terminal else contextlib.nullcontext():
        handles: list[Any] = [port, 0]
        while True:
            ready = select.select(handles, [], [])[0]
            if 0 in ready:
                data = os.read(0, _CHUNK)
                port.sendall(b"i" + len(data).to_bytes(4, "big") + data)
                if not data:
                    handles.remove(0)
            if port in ready:
                head = _read(port, 5)
                data = _read(port, int.from_bytes(head[1:], "big"))
                if head[:1] == b"x":
                    return int(data)
                _write(2 if head[:1] == b"e" else 1, data)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def main() -> None:
    """The program."""
    directory, argv = sys.argv[1], sys.argv[3:]
    try:
        # Whoever waits for us has a deadline of his own.
        with _port(directory, time.monotonic() + 3600) as port:
            status = _run(port, argv)
    except Unreachable as error:
        print(f"{os.path.basename(directory)}: {error}", file=sys.stderr)
        status = 125
    except BrokenPipeError:
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    main()
