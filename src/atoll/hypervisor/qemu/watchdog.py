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
        self._line()
        self.ask("qmp_capabilities")

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command; raises EOFError when QEMU is gone, TimeoutError when it does not answer for 5 seconds."""
        self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            said: dict[str, Any] = json.loads(self._line())
            if "return" in said or "error" in said:
                answer = said.get("return")
                return answer if isinstance(answer, dict) else {}

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
    begun, since, last = False, time.monotonic(), ""
    while True:
        try:
            status = str(monitor.ask("query-migrate").get("status", "none"))
        except TimeoutError:
            raise SystemExit("QEMU does not answer; its answers would be out of step from here on") from None
        now = time.monotonic()
        if status != last:
            last, since = status, now
        begun = begun or status not in ENDED
        if begun and status in ENDED:
            return
        if not begun and now - since > _BEGIN:
            return
        if status in STOPPED and now - since > seconds:
            monitor.ask("migrate_cancel")
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
