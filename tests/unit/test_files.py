from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.model.errors import HostError, InUse
from atoll.runtime.files import fsync_dir, lock_exclusively, read_json, write_durably


def test_write_durably_replaces_the_whole_file_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    before = os.umask(0o077)
    try:
        write_durably(path, b"old, and longer", mode=0o644)
        assert path.stat().st_mode & 0o777 == 0o644
        write_durably(path, "nëw")
    finally:
        os.umask(before)
    assert path.read_text() == "nëw"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["f"]


def test_write_durably_syncs_the_content_before_the_rename_and_the_name_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is what a power cut needs; a lost fsync shows in no other way."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        calls.append("fsync directory" if path == str(tmp_path) else f"fsync {os.fstat(handle).st_size} bytes")
        fsync(handle)

    def seen_replace(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_durably(tmp_path / "f", b"12345")
    assert calls == ["fsync 5 bytes", "rename", "fsync directory"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_durably(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(HostError, match="No space left"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["f"]
    with pytest.raises(HostError):
        write_durably(tmp_path / "missing" / "f", b"")
    with pytest.raises(HostError):
        fsync_dir(tmp_path / "missing")


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert read_json(path) is None
    assert read_json(path, {}) == {}
    write_durably(path, json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
    for damaged in (b'{"a": [1', b"\xff\xfe\xff"):
        path.write_bytes(damaged)
        with pytest.raises(HostError, match="damaged"):
            read_json(path)
    with pytest.raises(HostError):
        read_json(tmp_path)


def test_a_lock_is_exclusive_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"from atoll.runtime.files import lock_exclusively as l; l({str(path)!r}); print('ok', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ok\n"
        with pytest.raises(InUse, match=f"process {other.pid}"):
            lock_exclusively(path)
        other.kill()
    handle = lock_exclusively(path)
    with pytest.raises(InUse, match=f"process {os.getpid()}"):
        lock_exclusively(path)
    os.close(handle)
    os.close(lock_exclusively(path))
    with pytest.raises(HostError):
        lock_exclusively(tmp_path / "missing" / "lock")
