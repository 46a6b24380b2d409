"""The numbers by which guests are handled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Tuning:
    """Times in seconds unless said otherwise. Tests and administrators of odd networks change these; everybody else leaves them."""

    #: A guest that does not answer for this long is hung, if its process is stopped or waits in the kernel ...
    answer: float = 1.0
    #: ... and for this long, if its process works (on a busy machine, or on a slow storage call).
    answer_busy: float = 3.0
    #: An ordinary QMP command.
    command: float = 10.0
    #: A QMP command that opens, closes or resizes disks; librbd and libgfapi may take many seconds.
    disk_command: float = 60.0
    #: From starting QEMU until it has opened its disks and answers.
    launch: float = 60.0
    #: From ``quit`` to SIGKILL, and from SIGKILL until the process must be gone.
    quit: float = 5.0
    kill: float = 15.0
    #: A guest asked to power off is asked again after this: at boot it may not have listened yet.
    ask_again: float = 5.0
    #: A soft reboot: until the guest has powered itself off.
    reboot: float = 120.0
    #: Longest stop of a guest that its migration aims at, in milliseconds.
    downtime_ms: int = 300
    #: Most that a migration sends, in bytes per second.
    bandwidth: int = 10 << 30
    #: A migration that sends nothing for this long is cancelled.
    stall: float = 30.0
    #: A guest left stopped before the end of its migration for this long is resumed at its source by the watchdog.
    watchdog: int = 15
    #: From the pause to ``completed``; longer than the watchdog's, which decides first.
    switchover: float = 60.0
