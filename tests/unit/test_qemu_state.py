"""What is kept of a guest, what is told of it, and what of a migration's account counts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atoll.hypervisor.qemu import command, files, migrate, network, probe, process, status
from atoll.hypervisor.qemu.files import GuestFiles
from atoll.model.errors import HostError, InvalidInput
from atoll.model.messages import GuestSpec
from atoll.model.objects import Nic

SPEC = GuestSpec(instance="i-1", name="web", generation=7, memory=1 << 27)


def test_a_guest_that_has_come_is_not_one_that_has_left() -> None:
    assert migrate.leaving({}) == ""
    assert migrate.leaving({"status": "completed"}) == ""
    assert migrate.leaving({"status": "completed", "ram": {}, "total-time": 3}) == "completed"
    assert migrate.leaving({"status": "failed"}) == "failed"


def test_uri() -> None:
    assert migrate.uri("10.0.0.1", 5) == "tcp:10.0.0.1:5"
    assert migrate.uri("fd00::1", 5) == "tcp:[fd00::1]:5"


def test_run_states() -> None:
    assert status.STATES["postmigrate"] == "migrated"
    assert status.STATES.get("finish-migrate", "paused") == status.STATES.get("io-error", "paused") == "paused"
    assert set(status.STATES.values()) == {"running", "incoming", "migrated", "shutdown"}


def test_the_spec_is_kept_and_old_sockets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SOCKET_PATH", 1000)
    kept = GuestFiles(tmp_path, "i-1")
    kept.prepare(SPEC, None)
    assert kept.spec() == SPEC
    kept.qmp.touch()
    kept.save("endpoint", {"port": 1})
    kept.prepare(SPEC, None)
    assert (kept.qmp.exists(), kept.load("endpoint")) == (False, None)
    (kept.dir / "spec.json").write_text("{")
    assert kept.spec() is None
    assert (kept.dir.stat().st_mode & 0o777, kept.dir.parent.stat().st_mode & 0o777) == (0o700, 0o711)
    kept.remove()
    assert (kept.dir.exists(), kept.logs.exists()) == (False, True)


def test_names_and_paths_that_cannot_be(tmp_path: Path) -> None:
    for name in ("", "a/b", "..", ".x"):
        with pytest.raises(InvalidInput):
            GuestFiles(tmp_path, name)
    with pytest.raises(InvalidInput, match="too long"):
        GuestFiles(tmp_path / ("x" * 100), "i-1").prepare(SPEC, None)
    with pytest.raises(HostError, match="no user"):
        files.account("no-such-user")
    assert files.account("") is None


def test_logs_are_limited_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SOCKET_PATH", 1000)
    kept = GuestFiles(tmp_path, "i-1")
    kept.prepare(SPEC, None)
    kept.console_log.write_bytes(b"x" * 100)
    kept.limit_logs()
    assert kept.console_log.stat().st_size == 100
    monkeypatch.setattr(files, "_LOG_LIMIT", 50)
    kept.limit_logs()
    assert (kept.console_log.stat().st_size, (kept.logs / "console.log.1").stat().st_size) == (0, 100)
    kept.remove()
    os.utime(kept.logs, (0, 0))
    GuestFiles(tmp_path, "i-2").prepare(SPEC, None)
    assert not kept.logs.exists()


def test_last_words(tmp_path: Path) -> None:
    kept = GuestFiles(tmp_path, "i-1")
    assert kept.last_words() == ""
    kept.logs.mkdir(parents=True)
    kept.qemu_log.write_text("a\nqemu-system-x86_64: load failed\nqemu-system-x86_64: terminating on signal 15\n")
    assert kept.last_words() == "a / load failed"


async def test_only_qemu_with_this_pid_file_is_the_guest(tmp_path: Path) -> None:
    kept, other = GuestFiles(tmp_path, "i-1"), GuestFiles(tmp_path, "i-2")
    kept.dir.mkdir(parents=True)
    # A pid file whose process has gone, and whose number another has now.
    kept.pidfile.write_text(str(os.getpid()))
    assert process.find(kept) == []
    await process.end(kept, 1)

    def like_qemu(files: GuestFiles) -> subprocess.Popen[bytes]:
        argv = [command.BINARY, "-c", "import time; time.sleep(60)", "-pidfile", str(files.pidfile)]
        return subprocess.Popen(argv, executable=sys.executable)

    mine, theirs = like_qemu(kept), like_qemu(other)
    try:
        end = time.monotonic() + 10
        while not (process.find(kept) and process.find(other)):
            assert time.monotonic() < end
        assert (process.find(kept), process.find(other)) == ([mine.pid], [theirs.pid])
        assert await process.gone(kept, 0.05) is False
        await process.end(kept, 10)
        assert mine.wait(10) == -signal.SIGKILL
        assert (process.find(kept), theirs.poll()) == ([], None)
        assert await process.gone(kept, 1) is True
    finally:
        for started in (mine, theirs):
            started.kill()
            started.wait()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_guests_of_a_lab_inside_this_machine_are_not_ours(tmp_path: Path) -> None:
    kept = GuestFiles(tmp_path, "i-1")
    code = f"exec -a {command.BINARY} {sys.executable} -c 'print(1, flush=True); import time; time.sleep(60)' -pidfile {kept.pidfile}"
    inside = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "bash", "-c", code], stdout=subprocess.PIPE)
    try:
        assert inside.stdout is not None
        assert inside.stdout.readline() == b"1\n"
        assert process.find(kept) == []
    finally:
        inside.kill()
        inside.wait()


def test_words_of_a_lock() -> None:
    assert process.is_lock_failure('Failed to get "write" lock')
    assert not process.is_lock_failure("No such file")


def test_tap_names_fit_the_kernel_and_differ() -> None:
    taps = {network.tap_name(node, guest, index) for node in "ab" for guest in ("i-1", "i-2") for index in (0, 7)}
    assert len(taps) == 8
    assert all(len(tap) <= 15 for tap in taps)
    nics = [Nic(mac="52:54:00:00:00:01"), Nic(mac="52:54:00:00:00:02", mode="bridged", link="br0")]
    assert [bool(tap) for tap in network.names("a", SPEC.model_copy(update={"nics": nics}))] == [False, True]


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs an assembler")
def test_the_probe_is_its_source(tmp_path: Path) -> None:
    source = Path(probe.__file__).with_name("probe.S")
    subprocess.run(["gcc", "-c", source, "-o", tmp_path / "o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True)
    assert (tmp_path / "bin").read_bytes() == probe.CODE
