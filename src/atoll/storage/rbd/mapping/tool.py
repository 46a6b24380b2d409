"""Running programs for a mapping, bounded in time and without secrets in their arguments."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from atoll.model.errors import DeadlineExceeded, HostError
from atoll.storage.rbd.mapping import records

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class Failed(HostError):
    """A program that did not succeed. ``status`` is its exit status, ``words`` what it said."""

    status = 0
    words = ""


def run(argv: Sequence[str], seconds: float = 20.0) -> str:
    """Run it to its end; its standard output. The locks that are held go with it. Errors: Failed (with its last words), DeadlineExceeded
    (it was killed), HostError (there is no such program)."""
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=_ENVIRONMENT,
            cwd="/",
            pass_fds=records.held(),
            check=False,
        )
    except FileNotFoundError:
        raise HostError(f"there is no program {argv[0]} on this node", hint="atoll doctor") from None
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{argv[0]} did not end in {seconds:.0f} s", hint="ceph -s; dmesg | tail") from None
    if done.returncode:
        words = " / ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())[-600:]
        failed = Failed(f"{argv[0]} failed: {words or f'exit status {done.returncode}'}")
        failed.status, failed.words = done.returncode, words
        raise failed
    return done.stdout
