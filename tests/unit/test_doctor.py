"""What a machine finds when it looks at itself: each finding is made to happen."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rest_fakes import FakeLeader, clean_environment, fake_leader, ident, served

from atoll import __version__
from atoll.cli.main import atoll
from atoll.model.errors import AtollError
from atoll.model.messages import PROTOCOL, PoolRef
from atoll.monitor import disks, doctor, host, links, remains, residue
from atoll.monitor.checks import Check
from atoll.runtime import certs, systemd
from atoll.runtime.config import Config, dump

GIB = 1 << 30


def config(place: Path, **more: Any) -> Config:
    dirs = {f"{name}_dir": place / name for name in ("etc", "state", "run", "log")}
    return Config(**{**dirs, "hypervisor": "fake", "guest_user": "", **more})


def of(checks: list[Check], about: str) -> list[Check]:
    return [check for check in checks if check.about.startswith(about)]


# --- this machine's own disks ---


def test_who_may_read_secrets(tmp_path: Path) -> None:
    here = config(tmp_path)
    ca = certs.create_ca("lagoon")
    pair = certs.issue(ca, "node", "node-1", "node1", ["127.0.0.1"])
    certs.save(here.tls_dir, ca.cert_pem, pair.cert_pem, pair.key_pem)
    (here.etc_dir / "master.key").write_text("x")
    (here.etc_dir / "master.key").chmod(0o600)
    here.store_dir.mkdir(parents=True)
    (here.store_dir / "atoll.db").touch(0o600)
    assert [check.level for check in disks.secrets(here)] == ["ok"]
    for path in (
        next(p for p in here.tls_dir.rglob("key.pem") if not p.is_symlink()),
        here.etc_dir / "master.key",
        here.store_dir / "atoll.db",
    ):
        path.chmod(0o640)
        bad = [check for check in disks.secrets(here) if check.level == "error"]
        assert bad
        assert all("mode 0640" in check.what and f"chmod 600 {here.etc_dir.parent}" in check.commands[0] for check in bad)
        path.chmod(0o600)
    here.etc_dir.chmod(0o777)
    assert [check.about for check in disks.secrets(here) if check.level == "error"] == [f"directory {here.etc_dir}"]


@pytest.mark.parametrize(
    ("free", "inodes", "levels"),
    [
        (100, 50, ["ok"]),
        (5, 50, ["ok"]),  # little of much is enough
        (0.5, 50, ["warning"]),
        (0.1, 50, ["error"]),
        (100, 0.05, ["ok", "warning"]),
        (100, 0.0001, ["ok", "error"]),
    ],
)
def test_room_and_inodes(free: float, inodes: float, levels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {
        "f_frsize": 1,
        "f_blocks": 200 * GIB,
        "f_bavail": int(free * GIB),
        "f_files": 10**6,
        "f_favail": int(inodes * 10**6),
        "f_flag": 0,
    }
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**numbers))
    assert [check.level for check in disks._room("state", tmp_path)] == levels


@pytest.mark.parametrize(
    ("fstype", "options", "words"),
    [
        ("tmpfs", "rw", "in memory"),
        ("nfs4", "rw", "no local disk"),
        ("fuse.glusterfs", "rw", "no local disk"),
        ("vfat", "rw", "no permissions"),
        ("ext4", "rw,nobarrier", "nobarrier"),
        ("overlay", "rw", "container"),
        ("ext4", "rw,relatime", ""),
    ],
)
def test_a_state_that_would_not_outlive_a_power_cut(fstype: str, options: str, words: str, tmp_path: Path) -> None:
    mount = disks.Mount(str(tmp_path), fstype, "/dev/x", frozenset(options.split(",")))
    (check,) = disks._durable(tmp_path, mount)
    assert words in check.what
    assert (check.level == "ok") is not bool(words)
    assert list(tmp_path.iterdir()) == [], "the measurement leaves nothing"


def test_the_mount_of_a_path(tmp_path: Path) -> None:
    known = [
        disks.Mount(point, kind, "x", frozenset()) for point, kind in (("/", "ext4"), ("/tmp", "tmpfs"), ("/tmp", "xfs"), ("/t", "nfs"))
    ]
    found = disks.mount_for(Path("/tmp"), known)
    assert found is not None
    assert found.fstype == "xfs"
    real = disks.mount_for(Path("/proc/self"), disks.mounts())
    assert real is not None
    assert real.fstype == "proc"


def test_a_user_that_is_not_there_or_is_root(tmp_path: Path) -> None:
    (missing,) = host._user(config(tmp_path, guest_user="no-such-user"))
    assert missing.level == "warning"
    (joined,) = host._user(config(tmp_path, guest_user="no-such-user", node="node1"))
    assert joined.level == "error"
    assert "useradd" in joined.commands[0]
    (root,) = host._user(config(tmp_path, guest_user="root"))
    assert root.level == "error"


def test_programs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = host.guests(config(tmp_path, hypervisor="qemu"))
    (programs,) = of(found, "programs")
    assert programs.level == "error"
    assert "qemu-system-x86" in programs.commands[0]
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    (check,) = host._qemu()
    assert (check.level, "5.2" in check.what) == ("error", True)


# --- what was left behind ---


@contextmanager
def process(name: str, *arguments: str) -> Iterator[int]:
    """A process with these arguments that does nothing."""
    child = subprocess.Popen(
        [name, "-c", "import time; print(flush=True); time.sleep(300)", *arguments], executable=sys.executable, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_processes_that_were_left_behind(tmp_path: Path) -> None:
    here = config(tmp_path)
    run = here.run_dir
    (run / "attached").mkdir(parents=True)
    (run / "attached" / "i-1.json").write_text('{"vol-1": {}}')
    orphan = ("atoll.runtime.workermain", "3", "atoll.storage.calls", "1", "pool-a")
    mine = ("atoll.runtime.workermain", "3", "atoll.storage.calls", str(os.getpid()), "pool-b")
    with (
        process("qemu-nbd", f"--pid-file={run}/copies/vol-1/nbd.pid") as export,
        process("qemu-nbd", f"--pid-file={run}/elsewhere/nbd.pid"),
        process("python3", "x/watchdog.py", f"{run}/guests/i-1/watchdog", "9") as watchdog,
        process("python3", *orphan) as worker,
        process("python3", *mine),
    ):
        found = residue.found(run)
        assert found["exports"] == {"vol-1": export}
        assert found["watchdogs"] == {"i-1": watchdog}
        assert [(w["pid"], w["key"]) for w in found["workers"]] == [(worker, "pool-a")]
        assert found["attached"] == {"i-1": ["vol-1"]}
        checks = remains.leftovers(here, [])
        assert [check.level for check in checks] == ["warning", "warning"]
        assert {check.about for check in checks} == {"worker of pool-a", f"watchdog {watchdog}"}
    assert [check.level for check in remains.leftovers(here, [])] == ["ok"]


def test_a_loop_device_on_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residue, "_loops", lambda known: {"loop3": "/srv/images/a.raw (deleted)", "loop4": "/srv/images-of-others/b"})
    checks = remains.leftovers(config(tmp_path), [{"options": {"path": "/srv/images"}}])
    assert [(check.about, check.commands) for check in checks] == [("loop device loop3", ("losetup -d /dev/loop3",))]


def test_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "booted_with_systemd", lambda: True)
    monkeypatch.setattr(remains, "_UNITS", tmp_path)
    answers = {"is-enabled": "enabled", "is-active": "active"}
    monkeypatch.setattr(remains, "_systemctl", lambda verb, name: answers[verb])
    here = config(tmp_path, node="node1")

    def levels() -> list[tuple[str, str]]:
        return [(check.level, check.what) for check in remains.units(here, "", "/usr/bin")]

    assert levels() == [("warning", "the unit is missing")]
    (tmp_path / "atoll-agent.service").write_text(systemd.units("/usr/bin")["atoll-agent.service"])
    assert [level for level, _ in levels()] == ["ok"]
    answers["is-active"] = "failed"
    assert levels() == [("warning", "it is enabled and failed")]
    (tmp_path / "atoll-agent.service").write_text("old")
    assert len(levels()) == 2


# --- the network ---


class Facts(FakeLeader):
    """A master that tells what the test wants."""

    told: dict[str, Any]

    def facts(self, node: str) -> dict[str, Any]:
        return self.told


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[tuple[Facts, Config]]:
    ca = certs.create_ca("lagoon")
    server = certs.issue(ca, "master", ident("node", 1), "node1", ["127.0.0.1"])
    certs.save(tmp_path / "tls", ca.cert_pem, server.cert_pem, server.key_pem)
    leader = await fake_leader()
    leader.__class__ = Facts
    assert isinstance(leader, Facts)
    leader.told = {"version": __version__, "protocol": PROTOCOL, "clock": time.time(), "pools": [], "peers": []}
    here = config(tmp_path, node="node2")
    pair = certs.issue(ca, "node", ident("node", 2), "node2", ["127.0.0.1"])
    certs.save(here.tls_dir, ca.cert_pem, pair.cert_pem, pair.key_pem)
    leader.serials[certs.serial(pair.cert_pem)] = ident("node", 2)
    async with served(leader, tmp_path, host="127.0.0.1", port=0, tls_dir=tmp_path / "tls") as (_, port):
        yield leader, here.model_copy(update={"masters": (f"https://127.0.0.1:{port}",)})


async def looked(here: Config, master: str = "") -> list[Check]:
    return (await asyncio.to_thread(links.look, here, master)).checks


async def test_a_master_that_answers(master: tuple[Facts, Config]) -> None:
    leader, here = master
    leader.told["clock"] = time.time()
    assert {check.level for check in await looked(here)} == {"ok"}
    # Before it joins, it knows no CA, and is refused what is for nodes.
    stranger = here.model_copy(update={"etc_dir": here.etc_dir / "none", "node": ""})
    found = await looked(stranger, here.masters[0])
    assert "who it is was not checked" in of(found, "master")[0].what
    assert of(found, "clock")[0].level == "ok"


@pytest.mark.parametrize(("ahead", "level"), [(-60.0, "warning"), (60.0, "warning"), (3600.0, "error"), (1.0, "ok")])
async def test_a_clock_that_differs(ahead: float, level: str, master: tuple[Facts, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    _, here = master
    monkeypatch.setattr(Facts, "facts", lambda self, node: {**self.told, "clock": time.time() + ahead})
    (check,) = of(await looked(here), "clock")
    assert check.level == level
    assert ("behind" in check.what) is (ahead > 5)


async def test_versions_that_differ(master: tuple[Facts, Config]) -> None:
    leader, here = master
    for distance, level in ((1, "warning"), (2, "error")):
        leader.told["protocol"] = PROTOCOL + distance
        assert level in [check.level for check in of(await looked(here), "master")]
    leader.told |= {"protocol": PROTOCOL, "reported": "0.0.1"}
    assert "installed" in of(await looked(here), "agent")[0].what


async def test_peers(master: tuple[Facts, Config]) -> None:
    leader, here = master
    port = int(here.masters[0].rpartition(":")[2])
    leader.told["peers"] = [{"name": "node1", "address": "127.0.0.1", "port": port}, {"name": "node3", "address": "127.0.0.1", "port": 1}]
    found = await looked(here)
    assert [(check.about, check.level) for check in of(found, "way")] == [("way to node1", "ok"), ("way to node3", "warning")]


async def test_masters_that_do_not_answer(master: tuple[Facts, Config]) -> None:
    leader, here = master
    for url, words in (
        ("https://127.0.0.1:1", "does not answer"),
        ("https://no-such-host.invalid:7770", "is not known here"),
        ("http://127.0.0.1", "no address of a master"),
    ):
        (check,) = of(await looked(here, url), "master")
        assert (check.level, words in check.what) == ("error", True), check
    # A node that was removed, and one that trusts another CA.
    leader.serials.clear()
    assert "refuses this node" in of(await looked(here), "master")[-1].what
    other = certs.create_ca("reef")
    pair = certs.issue(other, "node", ident("node", 2), "node2", ["127.0.0.1"])
    certs.save(here.tls_dir, other.cert_pem, pair.cert_pem, pair.key_pem)
    (check,) = of(await looked(here), "master")
    assert "TLS handshake failed" in check.what


@pytest.mark.parametrize(("days", "level"), [(400, "error"), (363, "error"), (340, "warning"), (100, "ok")])
def test_certificates_that_end(days: int, level: str, tmp_path: Path) -> None:
    ca = certs.create_ca("lagoon")
    pair = certs.issue(ca, "node", "node-1", "node1", ["127.0.0.1"], now=time.time() - days * 86400)
    found = list(links._certificate("it", ca.cert_pem, pair.cert_pem, pair.key_pem))
    assert [check.level for check in found if check.about == "it"] == [level]


def test_certificates_that_do_not_fit() -> None:
    ca, other = certs.create_ca("lagoon"), certs.create_ca("reef")
    pair, second = (certs.issue(ca, "node", "node-1", "node1", ["127.0.0.1"]) for _ in range(2))
    assert "key is another's" in next(links._certificate("it", ca.cert_pem, pair.cert_pem, second.key_pem)).what
    assert "no CA" in next(links._certificate("it", other.cert_pem, pair.cert_pem, pair.key_pem)).what


# --- all of it ---


class Storage:
    """Pools as a test wants them."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def pool(self, ref: PoolRef, method: str, deadline: float, told: Any = None, **args: Any) -> Any:
        if isinstance(self.answer, AtollError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "level", "command"),
    [
        ({"ok": True, "details": {"mount": "/srv", "file system": "nfs4"}}, "ok", ""),
        ({"ok": True, "details": {"mount": "/", "file system": "ext4"}}, "warning", "atoll pool info a; findmnt"),
        ({"ok": False, "reason": "not mounted", "hint": "mount it"}, "error", "mount it"),
        (AtollError("it hangs", hint="look"), "error", "look"),
    ],
)
async def test_pools(answer: Any, level: str, command: str) -> None:
    ref = PoolRef(id="pool-a", name="a", driver="sharedfile")
    check, _ = await doctor._pool(Storage(answer), ref)  # type: ignore[arg-type]
    assert check.level == level
    assert "".join(check.commands) == command


async def test_what_hangs_is_a_finding_and_keeps_nothing_else_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = config(tmp_path, node="node2")
    here.tls_dir.mkdir(parents=True)
    # Reading it waits for somebody who writes, as reading from a share whose server is gone waits.
    os.mkfifo(here.tls_dir / "cert.pem")
    for name in ("ca.pem", "key.pem"):
        (here.tls_dir / name).touch(0o600)
    monkeypatch.setattr(doctor, "ALL", 6.0)
    found = (await doctor.examine(here))["findings"]
    late = [item for item in found if item["about"] == "looking at the network"]
    assert [item["level"] for item in late] == ["error"]
    assert "hangs" in late[0]["why"]
    assert {"kernel", "secrets", "hypervisor"} <= {item["about"] for item in found}
    assert found[0]["level"] == "error"


def test_the_command_and_its_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ATOLL_CONFIG")
    path = tmp_path / "atoll.toml"
    path.write_text(dump(config(tmp_path)))
    done = CliRunner().invoke(atoll, ["doctor", "--config", str(path), "--json"])
    found = json.loads(done.output)
    levels = {item["level"] for item in found}
    assert "error" not in levels
    # It belongs to no cluster.
    assert done.exit_code == 11
    assert ("master", "warning") in {(item["about"], item["level"]) for item in found}
    path.write_text("nonsense = 1\n")
    monkeypatch.setattr(doctor, "_part", nothing)
    done = CliRunner().invoke(atoll, ["doctor", "--config", str(path), "-q"])
    assert done.exit_code == 1
    assert done.output.startswith("error: configuration: ")
    assert f"$ mend {path}" in done.output
    monkeypatch.setattr("atoll.cli.doctor.here", lambda config, master: [{**found[-1], "level": "ok"}])
    done = CliRunner().invoke(atoll, ["doctor"])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "Nothing is to mend.")


async def nothing(*args: Any, **more: Any) -> list[Any]:
    return []
