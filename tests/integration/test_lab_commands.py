"""The commands of ``atoll lab``."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from atoll.lab import find
from atoll.lab.commands import lab
from atoll.model.errors import Forbidden, InvalidInput, NotFound, NotSupported

NAME = f"c{os.getpid()}"
real = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and loop devices need root")]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATOLL_LAB_DIR", str(tmp_path / "labs"))
    yield tmp_path / "labs"
    for name in find.names():
        if (tmp_path / "labs" / name).exists():
            find.remove(name)


def call(*words: str) -> Result:
    return CliRunner().invoke(lab, words, catch_exceptions=False)


def enter(*words: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own: ``exec`` replaces it."""
    program = "from atoll.lab.commands import lab; lab()"
    return subprocess.run([sys.executable, "-c", program, *words], check=False, timeout=60, **more)  # type: ignore[call-overload,no-any-return]


def kinds() -> list[object]:
    return [pytest.param([], marks=real, id="real"), pytest.param(["--rootless"], id="rootless")]


@pytest.mark.parametrize("options", kinds())
def test_up_status_power_down(options: list[str]) -> None:
    made = call("up", "--name", NAME, "--nodes", "2", "--no-cluster", *options)
    assert made.exit_code == 0
    assert "node2 is up" in made.output
    rows = json.loads(call("list", "--format", "json").output)
    assert [(row["nodes"], row["state"]) for row in rows if row["name"] == NAME] == [(2, "up")]
    found = find.load(NAME)
    found.node("node1").set_service("web", ["sleep", "1000"])
    shown = call("status", NAME).output
    assert f"lab {NAME}: 2 " in shown
    assert "web running" in shown
    assert call("kill", "-L", NAME, "node2").output == "node2 has lost its power\n"
    nodes = json.loads(call("status", NAME, "--format", "json").output)["nodes"]
    assert [node["powered"] for node in nodes] == [True, False]
    assert call("boot", "-L", NAME, "node2").output == "node2 is up\n"
    done = enter("exec", "-L", NAME, "node1", "--", "sh", "-c", "cat; echo oops >&2; exit 7", input=b"in", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in", b"oops\n")
    assert call("down", NAME).output == f"the lab {NAME} is gone\n"
    assert call("down", NAME).exit_code == 0
    with pytest.raises(NotFound):
        call("status", NAME)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and loop devices need root")
def test_cut_heal_and_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    call("up", "--name", NAME, "--nodes", "1", "--no-cluster", "--shared-size", "1G", "--bind", str(tmp_path / "seen"))
    assert enter("exec", "-L", NAME, "node1", "--", "test", "-d", str(tmp_path / "seen")).returncode == 0
    assert enter("exec", "-L", NAME, "node1", "--", "test", "-d", str(tmp_path / "labs")).returncode == 1
    assert call("cut", "-L", NAME, "node1").output == "node1 is cut off\n"
    assert json.loads(call("status", NAME, "--format", "json").output)["nodes"][0]["connected"] is False
    assert call("heal", "-L", NAME, "node1").output == "node1 is connected\n"
    assert json.loads(call("status", NAME, "--format", "json").output)["nodes"][0]["connected"] is True

    master, slave = pty.openpty()
    try:
        done = enter(
            "exec", "-L", NAME, "node1", "--", "sh", "-c", "test -t 0 && test -t 1 && hostname", stdin=slave, stdout=slave, stderr=slave
        )
        assert done.returncode == 0
        assert os.read(master, 100) == b"node1\r\n"
    finally:
        os.close(master)
        os.close(slave)


def test_several_labs_want_a_name() -> None:
    call("up", "--name", NAME, "--nodes", "1", "--no-cluster", "--rootless")
    call("up", "--name", f"{NAME}-b", "--nodes", "1", "--no-cluster", "--rootless")
    with pytest.raises(InvalidInput, match="several labs"):
        call("status")
    refused = call("down")
    assert refused.exit_code == 2
    assert "--all" in refused.output


def test_without_root_it_says_what_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Forbidden, match="need root") as caught:
        call("up", "--name", NAME)
    assert "--rootless" in caught.value.hint
    with pytest.raises(NotSupported, match="spare disks"):
        call("up", "--name", NAME, "--rootless", "--disks", "1")


def test_commands_are_imported_without_the_rest() -> None:
    program = "import sys, atoll.lab.commands; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"pydantic", "rich", "ctypes", "concurrent.futures"}
    assert {name for name in loaded if name.startswith("atoll.lab.")} == {"atoll.lab.commands"}
