"""Where a guest's run-time files are, and what is kept in them. ``run_dir`` belongs to this boot of the node: it holds no lasting truth."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atoll.model.errors import HostError, InvalidInput
from atoll.model.messages import GuestSpec
from atoll.runtime.files import write_durably

#: Longest path of a Unix socket, without its final zero byte (unix(7)).
_SOCKET_PATH = 107
_LOG_LIMIT = 4 << 20
_LOG_KEPT = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Account:
    """The user that guests run as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def account(user: str) -> Account | None:
    """The account of ``user``; None when guests run as the present user. Errors: HostError (no such user, or we are not root)."""
    if not user:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise HostError(f"there is no user {user!r} for guests to run as", hint=f"useradd --system --no-create-home {user}") from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise HostError(f"only root can start guests as the user {user!r}", hint="run the agent as root, or set guest_user to its own user")
    return Account(user, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(user, entry.pw_gid)))


class GuestFiles:
    """The files of one guest: ``run_dir/guests/<instance>/`` while it has a process; logs in ``run_dir/logs/<instance>/``, also later."""

    def __init__(self, run_dir: Path, guest: str) -> None:
        if not guest or "/" in guest or guest.startswith("."):
            raise InvalidInput(f"{guest!r} is not an instance id")
        self.guest = guest
        self.dir = run_dir / "guests" / guest
        self.logs = run_dir / "logs" / guest
        self.pidfile = self.dir / "pid"
        self.qmp = self.dir / "qmp"
        self.watchdog_qmp = self.dir / "watchdog"
        self.serial = self.dir / "console.sock"
        self.console_log = self.logs / "console.log"
        self.qemu_log = self.logs / "qemu.log"

    def prepare(self, spec: GuestSpec, owner: Account | None) -> None:
        """Make the directories and keep the spec durably, before anything is started. Errors: InvalidInput (path too long), HostError."""
        if len(os.fsencode(self.watchdog_qmp)) > _SOCKET_PATH:
            raise InvalidInput(f"{self.watchdog_qmp} is too long for a Unix socket", hint="give run_dir a shorter path: /run/atoll")
        try:
            for above in (self.dir.parent, self.logs.parent):
                above.mkdir(parents=True, exist_ok=True)
                above.chmod(0o711)  # others (the guests' user) may pass, not look
            self._prune_logs()
            for place in (self.dir, self.logs):
                place.mkdir(exist_ok=True)
                place.chmod(0o700)
                if owner:
                    os.chown(place, owner.uid, owner.gid)
            for stale in (self.pidfile, self.qmp, self.watchdog_qmp, self.serial, self.dir / "endpoint.json", self.dir / "migration.json"):
                stale.unlink(missing_ok=True)
            self.save("spec", spec.model_dump(mode="json"))
        except OSError as error:
            raise HostError(f"the files of guest {self.guest} cannot be made: {error}") from None

    def save(self, name: str, data: dict[str, Any]) -> None:
        """Keep ``name.json``, durably and whole."""
        write_durably(self.dir / f"{name}.json", json.dumps(data))

    def load(self, name: str) -> dict[str, Any] | None:
        """What ``save`` kept; None when it is not there."""
        try:
            data = json.loads((self.dir / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def spec(self) -> GuestSpec | None:
        """The spec that the guest was started with."""
        data = self.load("spec")
        try:
            return GuestSpec(**data) if data else None
        except ValidationError:
            return None

    def remove(self) -> None:
        """Remove all but the logs."""
        shutil.rmtree(self.dir, ignore_errors=True)

    def last_words(self) -> str:
        """The end of QEMU's own log: why it went."""
        try:
            text = self.qemu_log.read_bytes()[-4000:].decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip() and "terminating on signal" not in line]
        return " / ".join(line.removeprefix("qemu-system-x86_64: ") for line in lines[-3:])

    def limit_logs(self) -> None:
        """Keep the console log below 4 MiB (and one old copy): a talkative guest must not fill the node's memory. QEMU appends, so the
        file may be emptied under it; what it writes in between is lost from the log, not from the console."""
        with contextlib.suppress(OSError):
            if self.console_log.stat().st_size > _LOG_LIMIT:
                shutil.copyfile(self.console_log, self.logs / "console.log.1")
                os.truncate(self.console_log, 0)

    def _prune_logs(self) -> None:
        for place in self.logs.parent.iterdir():
            if not (self.dir.parent / place.name).exists() and place.stat().st_mtime < time.time() - _LOG_KEPT:
                shutil.rmtree(place, ignore_errors=True)


def hand_over(path: str, owner: Account | None) -> None:
    """Let the guests' user open a block device. Images are given to it by their driver, in a process that may hang: their storage may,
    and this one must not."""
    if owner and path.startswith("/dev/"):
        with contextlib.suppress(OSError):
            if os.stat(path).st_uid != owner.uid:
                os.chown(path, owner.uid, owner.gid)
