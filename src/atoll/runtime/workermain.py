"""A worker process: ``python -m atoll.runtime.workermain FD MODULE``. Carries out calls one after the other, JSON lines over a socket.

It ends when its parent does: the socket closes. A call that hangs is ended from outside, by SIGKILL.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
from typing import Any

from atoll.model.errors import AtollError, HostError


def carry_out(functions: dict[str, Any], line: bytes) -> dict[str, Any]:
    """One call: its answer."""
    try:
        order = json.loads(line)
        return {"result": functions[order["function"]](**order["args"])}
    except AtollError as error:
        return {"error": error.to_wire()}
    except OSError as error:
        return {"error": HostError(f"{error.filename or 'the system'}: {error.strerror or error}").to_wire()}
    except Exception as error:  # noqa: BLE001
        # A bug must reach the caller as an error of this call, and not look like a worker that died.
        return {"error": HostError(f"{type(error).__name__}: {error}", hint="this is a bug; see the agent's log").to_wire()}


def main() -> None:
    """Serve until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    functions = importlib.import_module(sys.argv[2]).FUNCTIONS
    with connection, connection.makefile("rwb") as stream:
        for line in stream:
            answer = carry_out(functions, line)
            stream.write(json.dumps(answer, default=str).encode() + b"\n")
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
