"""What a node needs of its host when it joins: the user that guests run as, and the daemons' units where systemd runs."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

from atoll.model.errors import HostError
from atoll.runtime import systemd
from atoll.runtime.config import GUEST_UID, Config
from atoll.runtime.files import write_durably

_UNITS = Path("/etc/systemd/system")


def settle_in(config: Config, path: Path, roles: tuple[str, ...]) -> list[str]:
    """Make the guests' user, and install and start the units of ``roles`` (agent, master). Gives what was done, for people.

    Without root, or without systemd, the daemons are started by whoever runs the node. Errors: HostError.
    """
    done: list[str] = []
    if os.geteuid() != 0:
        return done
    if config.guest_user and _make_user(config.guest_user):
        done.append(f"made the user {config.guest_user}, as which guests run")
    if systemd.booted_with_systemd():
        names = _install(path, roles)
        done.append(f"started {' and '.join(names)}")
    return done


def _make_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
        return False
    except KeyError:
        pass
    argv = ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
    try:
        pwd.getpwuid(GUEST_UID)
    except KeyError:
        argv += ["--uid", str(GUEST_UID), "--user-group"]
    _run([*argv, name])
    return True


def _install(path: Path, roles: tuple[str, ...]) -> list[str]:
    texts = systemd.units(str(Path(sys.executable).parent), str(path))
    names = [f"atoll-{role}.service" for role in roles]
    for name in names:
        write_durably(_UNITS / name, texts[name], 0o644)
    _run(["systemctl", "daemon-reload"])
    _run(["systemctl", "enable", "--now", *names])
    return names


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{argv[0]} cannot be run: {error}") from None
    if done.returncode:
        raise HostError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
