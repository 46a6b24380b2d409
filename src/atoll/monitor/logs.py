"""The end of a node's logs, without secrets: the daemons', QEMU's and the kernel's. What guests write to their consoles is theirs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from atoll.runtime import systemd
from atoll.runtime.config import Config
from atoll.runtime.scrub import Scrubber, secrets_of

#: Bytes of each log, and how many of one kind.
LIMIT, MANY = 512 << 10, 50
#: Seconds for a program that shows a log.
_SHOW = 20.0


def collect(config: Config, limit: int = LIMIT) -> dict[str, str]:
    """Name -> text of every log that is here."""
    scrubber = Scrubber(secrets_of(config))
    found: dict[str, str] = {}
    for path in _newest(config.log_dir, "*"):
        found[path.name] = _tail(path, limit)
    for path in _newest(config.run_dir / "logs", "*/qemu.log"):
        found[f"qemu-{path.parent.name}.log"] = _tail(path, min(limit, 32 << 10))
    if systemd.booted_with_systemd():
        for unit in ("atoll-agent", "atoll-master"):
            found[f"{unit}.journal"] = _shown(limit, "journalctl", "--no-pager", "-q", "-n", "5000", "-o", "short-iso", "-u", unit)
    found["kernel.log"] = _shown(min(limit, 128 << 10), "dmesg", "--time-format", "iso")
    return {name: scrubber.text(text) for name, text in found.items() if text}


def _newest(place: Path, pattern: str) -> list[Path]:
    files = [p for p in place.glob(pattern) if p.is_file() and not p.is_symlink()] if place.is_dir() else []
    return sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:MANY]


def _tail(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - limit))
            data = file.read(limit)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}\n"
    return _whole_lines(data, cut=end > limit)


def _whole_lines(data: bytes, *, cut: bool) -> str:
    # A line without its beginning may be a secret without its name.
    text = data.decode(errors="replace")
    return text.partition("\n")[2] if cut else text


def _shown(limit: int, *argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_SHOW, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]} gave nothing: {error}\n"
    data = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return _whole_lines(data[-limit:], cut=len(data) > limit)
