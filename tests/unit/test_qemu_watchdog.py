"""The watchdog of a migration, against a QEMU that says what the test wants."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.hypervisor.qemu import watchdog


class Qemu:
    """One QMP client; ``status`` is the migration's. ``deaf``: only out-of-band commands are heard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = "none"
        self.deaf = False
        self.heard: list[str] = []
        self._late: list[Any] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._client: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def say(self, message: dict[str, Any]) -> None:
        assert self._client is not None
        self._client.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        for end in (self._client, self._socket):
            if end is not None:
                # A thread that reads keeps a socket open that is only closed.
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def _serve(self) -> None:
        try:
            self._client, _ = self._socket.accept()
            self.say({"QMP": {"version": {}, "capabilities": ["oob"]}})
            for line in self._client.makefile():
                self._answer(json.loads(line))
        except OSError:
            pass

    def _answer(self, asked: dict[str, Any]) -> None:
        command = asked.get("execute") or asked["exec-oob"]
        if command not in ("query-migrate", "qmp_capabilities"):
            self.heard.append(command)
        if "execute" in asked and self.deaf:
            self._late.append(asked["id"])
            return
        if command == "yank":
            self.deaf, self.status = False, "failed"
            self.say({"return": {}, "id": asked["id"]})
            for number in self._late:
                self.say({"return": {"status": self.status}, "id": number})
            return
        if command == "migrate_cancel":
            self.status = "cancelled"
        self.say({"return": {} if self.status == "none" else {"status": self.status}, "id": asked["id"]})


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        made = Qemu(Path(place) / "qmp")
        yield made
        made.close()


class Watch:
    """The loop, in a thread."""

    def __init__(self, qemu: Qemu, seconds: float = 0.3) -> None:
        self.monitor = watchdog.Monitor(str(qemu.path))
        self.thread = threading.Thread(target=self._run, args=(seconds,), daemon=True)
        self.thread.start()

    def _run(self, seconds: float) -> None:
        try:
            watchdog.watch(self.monitor, seconds)
        except (EOFError, OSError):
            pass

    def ended(self, seconds: float = 5.0) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()


def eventually(what: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("state", ["pre-switchover", "device"])
def test_it_cancels_what_stands_still_for_too_long(qemu: Qemu, state: str) -> None:
    watch = Watch(qemu)
    qemu.status = state
    assert watch.ended()
    assert qemu.heard == ["migrate_cancel"]


def test_it_leaves_alone_what_moves(qemu: Qemu) -> None:
    watch = Watch(qemu)
    qemu.status = "active"
    assert not watch.ended(0.8)
    qemu.status = "pre-switchover"
    assert not watch.ended(0.15)
    qemu.status = "completed"
    assert watch.ended()
    assert qemu.heard == []


def test_it_never_acts_after_completed(qemu: Qemu) -> None:
    watch = Watch(qemu)
    qemu.status = "device"
    time.sleep(0.2)
    qemu.status = "completed"
    assert watch.ended()
    time.sleep(0.4)
    assert qemu.heard == []


def test_the_end_of_an_earlier_migration_is_not_this_ones(qemu: Qemu) -> None:
    qemu.status = "cancelled"
    watch = Watch(qemu)
    assert not watch.ended(0.5)
    qemu.status = "pre-switchover"
    assert watch.ended()
    assert qemu.heard == ["migrate_cancel"]


def test_a_migration_between_two_looks_is_noticed(qemu: Qemu) -> None:
    watch = Watch(qemu, 2.0)
    eventually(lambda: watch.monitor._sent > 1)
    qemu.say({"event": "MIGRATION", "data": {"status": "setup"}})
    qemu.say({"event": "MIGRATION", "data": {"status": "failed"}})
    qemu.status = "failed"
    assert watch.ended(3)


def test_a_qemu_that_hears_nothing_is_freed(qemu: Qemu) -> None:
    watch = Watch(qemu)
    qemu.status = "active"
    eventually(lambda: watch.monitor.begun)
    qemu.deaf = True
    assert watch.ended()
    assert set(qemu.heard) == {"yank"}


def test_it_ends_with_qemu_and_with_a_migration_that_never_begins(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(qemu)
    qemu.close()
    assert watch.ended()
    monkeypatch.setattr(watchdog, "_BEGIN", 0.2)
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        other = Qemu(Path(place) / "qmp")
        assert Watch(other).ended()
        assert other.heard == []
        other.close()


def test_the_program_detaches_and_needs_nothing_but_python(qemu: Qemu) -> None:
    qemu.status = "pre-switchover"
    argv = [sys.executable, "-I", "-S", watchdog.__file__, str(qemu.path), "0.3"]
    begin = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "ready\n"
    assert time.monotonic() - begin < 15
    eventually(lambda: qemu.heard == ["migrate_cancel"])
    lost = subprocess.run([*argv[:4], "/nowhere", "1"], capture_output=True, text=True, timeout=20, check=False)
    assert lost.returncode != 0
    assert "/nowhere" in lost.stderr
