"""What a node finds that stands against Ceph on it: everything at once, in words that say what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from atoll.deploy.ceph import daemons, preflight
from atoll.deploy.contract import Facts

VERSION = "ceph version 16.2.15 (618f440892089921c3e944a991122ddc44e60516) pacific (stable)"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with Ceph's programs and nothing else; ``ip`` and ``blkid`` are the machine's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ceph-mon", "ceph-mgr", "monmaptool"):
        (programs / name).write_text("#!/bin/sh\n")
    (programs / "ceph-osd").write_text(f"#!/bin/sh\necho '{VERSION}'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(preflight, "CONF", tmp_path / "ceph.conf")
    monkeypatch.setattr(daemons, "DATA", tmp_path / "lib")
    return tmp_path


async def looked(**more: Any) -> Facts:
    return await preflight.look({"fsid": "", "address": "127.0.0.1", "disks": [], "ports": [], "networks": {}, **more})


async def test_everything_is_found_at_once(host: Path) -> None:
    (host / "ceph.conf").write_text("[global]\nfsid = 123\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = await looked(disks=["/dev/nothing"], ports=[port], networks={"public_network": "203.0.113.0/24"})
    text = "\n".join(found.problems)
    assert "ceph.conf exists" in text
    assert "disk /dev/nothing is not there" in text
    assert f"port {port} of 127.0.0.1 is in use" in text
    assert "no address in 203.0.113.0/24" in text


async def test_versions(host: Path) -> None:
    assert (await looked()).version == "16.2.15"
    (host / "bin" / "ceph-osd").write_text("#!/bin/sh\necho ceph version 14.2.1 nautilus\n")
    assert any("Ceph 14 is older than 16" in text for text in (await looked()).problems)
    (host / "bin" / "ceph-osd").write_text("#!/bin/sh\nexit 1\n")
    assert any("ceph-osd cannot be run" in text for text in (await looked()).problems)


async def test_missing_programs_are_told_as_packages(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight.PROGRAMS, "ceph-none", "ceph-none-package")
    assert any("apt-get install --no-install-recommends ceph-none-package" in text for text in (await looked()).problems)


@pytest.mark.parametrize("fsid", ["", "123"])
async def test_what_another_cluster_has_left_is_never_taken(host: Path, fsid: str) -> None:
    """Also by a node that joins: its monitor would be made where the old one's data lies."""
    place = host / "lib" / "mon" / "ceph-node1"
    place.mkdir(parents=True)
    assert any(f"{place} exists" in text for text in (await looked(fsid=fsid)).problems)


async def test_a_configuration_of_no_known_cluster_is_another_ones(host: Path) -> None:
    (host / "ceph.conf").write_text("[global]\n")
    assert any("ceph.conf exists" in text for text in (await looked()).problems)
    (host / "ceph.conf").write_text("[global]\n fsid = 123\n")
    assert not any("ceph.conf exists" in text for text in (await looked(fsid="123")).problems)
