"""Running programs for a mapping, bounded in time and without secrets in their arguments."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

from atoll.model.errors import DeadlineExceeded, HostError
from atoll.storage.rbd.mapping import records

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def run(argv: Sequence[str], seconds: float = 20.0, *, lends_locks: bool = True) -> str:
    """Run it to its end; its standard output. The locks that are held go with it, but not to a program that leaves a daemon.

    Errors: HostError (there is no such program; or it failed: ``details`` has its ``exit_status`` and last ``words``), DeadlineExceeded (it
    was killed).
    """
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=_ENVIRONMENT,
            cwd="/",
            umask=0o077,
            pass_fds=records.held() if lends_locks else (),
        )
    except FileNotFoundError:
        raise HostError(f"there is no program {argv[0]} on this node", hint="atoll doctor") from None
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that hangs in the kernel is left to itself; it keeps the lock.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)
        raise DeadlineExceeded(f"{argv[0]} did not end in {seconds:.0f} s", hint="ceph -s; dmesg | tail") from None
    if process.returncode:
        words = " / ".join(line.strip() for line in (said or out).splitlines() if line.strip())[-600:]
        message = f"{argv[0]} failed: {words or f'exit status {process.returncode}'}"
        raise HostError(message, hint="ceph -s; dmesg | tail", exit_status=process.returncode, words=words)
    return out
