"""QMP with nothing around it."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class Qmp:
    """A conversation; calling it carries out a command."""

    def __init__(self, path: Path, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while True:
            self._sock = socket.socket(socket.AF_UNIX)
            self._sock.settimeout(seconds)
            try:
                self._sock.connect(str(path))
                break
            except OSError:
                self._sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        self._file = self._sock.makefile("rb")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        self._sock.sendall(json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})}).encode())
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._sock.close()
