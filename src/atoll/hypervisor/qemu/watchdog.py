"""watchdog.py SOCKET SECONDS: resume a guest that its migration left stopped.

Between the pause before the switchover and ``completed`` the guest stands still on its source. Whoever drives the migration may die right
there; then this process cancels the migration, which lets the guest run on. It never acts after ``completed``: the guest belongs to the
target then, and QEMU itself makes cancelling and completing exclude each other. Needs nothing but Python; prints ``ready`` and detaches
once it watches; ends with the migration or with QEMU.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

#: States of a migration in which the guest stands still and the migration is not yet completed.
STOPPED = ("pre-switchover", "device")
ENDED = ("completed", "failed", "cancelled", "none")
#: For a migration that never begins, in seconds.
_BEGIN = 60.0


class Monitor:
    """QMP with nothing but a socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(5)
        self._socket.connect(path)
        self._rest = b""
        self._sent = 0
        #: Whether a migration has been under way since we listen; polling alone would miss one that ends at once.
        self.begun = False
        self._line()
        self.answer(self.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}), 5)

    def send(self, command: dict[str, Any]) -> int:
        """Send a command; gives the number by which its answer is known."""
        self._sent += 1
        self._socket.sendall(json.dumps({**command, "id": self._sent}).encode() + b"\n")
        return self._sent

    def answer(self, number: int, seconds: float) -> dict[str, Any] | None:
        """The answer to a command; None when it does not come in time. Raises EOFError when QEMU is gone."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                said: dict[str, Any] = json.loads(self._line())
            except TimeoutError:
                return None
            if said.get("event") == "MIGRATION" and said["data"]["status"] not in ENDED:
                self.begun = True
            if said.get("id") == number:
                answer = said.get("return")
                return answer if isinstance(answer, dict) else {}
        return None

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def watch(monitor: Monitor, seconds: float) -> None:
    """Until the migration ends. A state that an earlier migration left behind does not count as an end."""
    since, last = time.monotonic(), ""
    while True:
        asked = monitor.send({"execute": "query-migrate"})
        while (said := monitor.answer(asked, seconds)) is None:
            # While QEMU sends the last of a guest's state it hears nothing but this: to drop the connection if the target does not read.
            # Harmless if something else is slow: a migration that has completed has no connection left.
            if monitor.begun:
                monitor.send({"exec-oob": "yank", "arguments": {"instances": [{"type": "migration"}]}})
        status = str(said.get("status", "none"))
        now = time.monotonic()
        if status != last:
            last, since = status, now
        monitor.begun = monitor.begun or status not in ENDED
        if monitor.begun and status in ENDED:
            return
        if not monitor.begun and now - since > _BEGIN:
            return
        if status in STOPPED and now - since > seconds:
            monitor.send({"execute": "migrate_cancel"})
        time.sleep(min(0.2, seconds / 10))


def main() -> None:
    path, seconds = sys.argv[1], float(sys.argv[2])
    try:
        monitor = Monitor(path)
        if os.fork():
            # Whoever started us waits for this line: from now on the guest is guarded.
            print("ready", flush=True)
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        watch(monitor, seconds)
    except (OSError, EOFError, ValueError) as error:
        raise SystemExit(f"{path}: {error or 'closed'}") from None


if __name__ == "__main__":
    main()
