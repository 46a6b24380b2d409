"""Where systemd runs, it keeps Ceph's daemons: which commands are given, and what an OSD's unit gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.deploy.ceph import daemons
from atoll.deploy.ceph.daemons import Daemons
from atoll.runtime.files import read_json


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that only notes what it is told."""
    program, said = tmp_path / "bin" / "systemctl", tmp_path / "said"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(daemons, "UNITS", tmp_path / "units")
    monkeypatch.setattr(daemons, "booted_with_systemd", lambda: True)
    return said


async def test_units_are_enabled_and_disabled(systemctl: Path, tmp_path: Path) -> None:
    found = Daemons(tmp_path)
    await found.start("mon", "node1")
    await found.start("osd", "3")
    await found.stop("osd", "3")
    await found.keep()
    assert systemctl.read_text().splitlines() == [
        "daemon-reload",
        "enable --now ceph-mon@node1.service",
        "daemon-reload",
        "enable --now ceph-osd@3.service",
        "disable --now ceph-osd@3.service",
    ]
    # A disk belongs to root after a boot: the unit gives it to Ceph's user before it starts the daemon.
    drop_in = (tmp_path / "units" / "ceph-osd@3.service.d" / "atoll.conf").read_text()
    assert "ExecStartPre=+/bin/chown ceph:ceph /var/lib/ceph/osd/ceph-3/block" in drop_in
    assert not (tmp_path / "ceph-daemons.json").exists()


async def test_without_systemd_what_is_wanted_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "booted_with_systemd", lambda: False)
    spawned = []

    async def spawn(self: Daemons, kind: str, ident: str) -> None:
        spawned.append((kind, ident))

    monkeypatch.setattr(Daemons, "_spawn", spawn)
    monkeypatch.setattr(daemons, "RUN", tmp_path)
    found = Daemons(tmp_path)
    await found.start("osd", "0")
    await found.start("mon", "node1")
    await found.start("osd", "0")
    assert read_json(tmp_path / "ceph-daemons.json") == [["mon", "node1"], ["osd", "0"]]
    await found.stop("mon", "node1")
    assert Daemons(tmp_path).wanted() == [("osd", "0")], "the next agent knows it"


def test_a_pid_of_another_process_is_not_taken_for_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "RUN", tmp_path)
    assert daemons.pid_of("osd", "0") == 0
    (tmp_path / "osd.0.pid").write_text("1\n")
    assert daemons.pid_of("osd", "0") == 0
