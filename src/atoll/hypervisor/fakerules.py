"""What both forms of the fake hypervisor decide alike."""

from __future__ import annotations

from typing import Literal

from atoll.model.errors import Conflict, GuestError
from atoll.model.messages import GuestSpec, GuestStatus

#: Seconds that a guest left paused before its switchover waits for somebody to go on.
WATCHDOG = 15.0


def admit(present: GuestStatus, spec: GuestSpec, incoming: bool) -> Literal["make", "replace", "resume", "done"]:
    """What a start (or an incoming start) does with what is there. ``replace``: the old process has ended its guest and goes first.

    Errors: Conflict (another generation, or in a state that this call does not lead to), GuestError (it hangs).
    """
    if present.state == "gone":
        return "make"
    if present.state == "shutdown":
        return "replace"
    if present.state == "hung":
        raise GuestError(f"{spec.instance} has a process (pid {present.pid}) that does not answer", hint="kill the guest first")
    if present.generation != spec.generation:
        raise Conflict(f"{spec.instance} is {present.state} here with generation {present.generation}, not {spec.generation}")
    arrived = present.state == "paused" and present.migration == "completed"
    if incoming:
        if present.state == "incoming" or arrived:
            return "done"
    elif present.state == "running":
        return "done"
    elif present.state == "paused" and present.migration in ("", "failed", "cancelled"):
        return "resume"
    raise Conflict(f"{spec.instance} is {present.state} here already" + (f" (migration: {present.migration})" if present.migration else ""))
