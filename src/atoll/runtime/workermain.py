"""A worker process: ``python -m atoll.runtime.workermain FD MODULE PARENT``. Carries out calls one after the other, JSON lines over a
socket. Before a call's answer there may be lines that say how far it is.

It ends when its parent does, also in the middle of a call: the next agent must not meet what the last one had begun. A call that
hangs is ended from outside, by SIGKILL.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

from atoll.model.errors import AtollError, HostError
from atoll.runtime import percent

_PR_SET_PDEATHSIG = 1


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
        traceback.print_exc()
        return {"error": HostError(f"{type(error).__name__}: {error}", hint="this is a bug; see the agent's log").to_wire()}


def main() -> None:
    """Serve until the socket closes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[3]):
        # It died before the kernel was asked to tell.
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    functions = importlib.import_module(sys.argv[2]).FUNCTIONS
    with connection, connection.makefile("rwb") as stream:

        def say(what: dict[str, Any]) -> None:
            stream.write(json.dumps(what, default=str).encode() + b"\n")
            stream.flush()

        for line in stream:
            percent.listen(lambda done: say({"percent": done}))
            answer = carry_out(functions, line)
            percent.listen(None)
            say(answer)
    os._exit(0)


if __name__ == "__main__":
    main()
