"""A client of the REST API that costs little itself: the machine that is measured also runs it."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

#: Seconds after which a kept connection is not used again: the master closes those that are idle.
KEEP = 30.0


class Refused(Exception):
    """The master answered with a problem."""


class Api:
    """One kept connection to the master's Unix socket. Not for several threads at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._rest = b""
        self._used = 0.0

    def _connect(self) -> socket.socket:
        if time.monotonic() - self._used > KEEP:
            self.close()
        self._used = time.monotonic()
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(60)
            # By way of the directory's descriptor: the whole path may be longer than a socket's may be.
            handle = os.open(self._path.parent, os.O_PATH)
            try:
                sock.connect(f"/proc/self/fd/{handle}/{self._path.name}")
            finally:
                os.close(handle)
            self._sock, self._rest = sock, b""
        return self._sock

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def request(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """Status and JSON. Errors: OSError."""
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
        if key:
            head += f"Idempotency-Key: {key}\r\n"
        sock = self._connect()
        try:
            sock.sendall(head.encode() + b"\r\n" + raw)
            return self._answer(sock)
        except OSError:
            self.close()
            raise

    def _answer(self, sock: socket.socket) -> tuple[int, Any]:
        data = self._rest
        while b"\r\n\r\n" not in data:
            data += self._more(sock)
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
        parts, have = [rest], len(rest)
        while have < length:
            part = self._more(sock)
            parts.append(part)
            have += len(part)
        everything = b"".join(parts)
        self._rest = everything[length:]
        return int(lines[0].split()[1]), json.loads(everything[:length] or b"null")

    @staticmethod
    def _more(sock: socket.socket) -> bytes:
        part = sock.recv(1 << 18)
        if not part:
            raise ConnectionResetError("the master hung up")
        return part

    def get(self, path: str) -> Any:
        """Read something. Errors: Refused."""
        status, data = self.request("GET", path)
        if status != 200:
            raise Refused(f"GET {path}: {data}")
        return data

    def submit(self, method: str, path: str, body: Any) -> int:
        """The number of the new job. Errors: Refused."""
        status, data = self.request(method, path, body, str(uuid.uuid4()))
        if status != 202:
            raise Refused(f"{method} {path}: {data}")
        return int(data["job"])

    def ended(self, job: int, seconds: float = 300.0) -> dict[str, Any]:
        """The job when it is done. Errors: Refused when it ended otherwise."""
        found = self.over(job, seconds)
        if found["state"] == "done":
            return found
        raise Refused(f"job {job}: {found['state']} {found['error']} {found['reason']}")

    def over(self, job: int, seconds: float = 300.0) -> dict[str, Any]:
        """The job when it is done or undone. Errors: Refused when a person must look at it, and when it does not end."""
        end = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.get(f"/v1/jobs/{job}?wait=20")
            if found["state"] in ("done", "undone"):
                return found
            if found["state"] == "needs-attention" or time.monotonic() > end:
                raise Refused(f"job {job}: {found['state']} {found['error']} {found['reason']}")

    def do(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """Submit and wait, as the command line does: with one request where the job ends soon."""
        status, data = self.request(method, f"{path}?wait=20", body, str(uuid.uuid4()))
        if status != 202:
            raise Refused(f"{method} {path}: {data}")
        found: dict[str, Any] | None = data["ended"]
        return found if found and found["state"] == "done" else self.ended(int(data["job"]))
