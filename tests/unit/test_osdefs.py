"""OS definitions as directories: what is read, what is refused, and what scripts are told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from atoll.agent import osdefs
from atoll.agent.memory import Memory, open_database
from atoll.agent.osscripts import OsOrders
from atoll.model.errors import HostError, InvalidInput, NotFound, StaleGeneration
from atoll.model.messages import Progress
from atoll.runtime import scripts


def make(directory: Path, name: str, *, create: str = "#!/bin/sh\n", variants: str = "", rest: str = "") -> Path:
    place = directory / name
    place.mkdir(parents=True)
    for script in (*osdefs.SCRIPTS, "verify"):
        (place / script).write_text(create if script == "create" else "#!/bin/sh\n")
        (place / script).chmod(0o755)
    (place / "ganeti_api_version").write_text("20\n15\n10\n")
    (place / "variants.list").write_text(variants)
    (place / "parameters.list").write_text(rest)
    return place


def test_a_definition_is_read_as_ganeti_reads_it(tmp_path: Path) -> None:
    made = make(tmp_path, "debian", variants="# comment\nlean\n\n full \n", rest="Suite Which release.\nmirror\n")
    found = osdefs.read(made)
    assert (found.version, found.variants, found.problems) == (20, ("lean", "full"), ())
    assert found.parameters == {"suite": "Which release.", "mirror": ""}


def test_the_first_directory_wins_and_files_are_no_definitions(tmp_path: Path) -> None:
    make(tmp_path / "a", "debian")
    make(tmp_path / "b", "debian")
    make(tmp_path / "b", "other")
    (tmp_path / "b" / "README").write_text("")
    found = osdefs.find_all((tmp_path / "nothing", tmp_path / "a", tmp_path / "b"))
    assert [one.path for one in found] == [str(tmp_path / "a/debian"), str(tmp_path / "b/other")]
    with pytest.raises(NotFound, match=r"in .*/a, .*/b"):
        osdefs.find((tmp_path / "a", tmp_path / "b"), "third")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: (place / "create").unlink(), "script create is not there"),
        (lambda place: (place / "rename").chmod(0o644), "rename is not an executable"),
        (lambda place: (place / "verify").unlink(), "script verify"),
        (lambda place: (place / "parameters.list").unlink(), "parameters.list is missing"),
        (lambda place: (place / "ganeti_api_version").unlink(), "ganeti_api_version is missing"),
        (lambda place: (place / "ganeti_api_version").write_text("5\n"), "ganeti_api_version is 5"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, spoil: object, words: str) -> None:
    place = make(tmp_path, "debian")
    spoil(place)  # type: ignore[operator]
    found = osdefs.read(place)
    assert any(words in problem for problem in found.problems), found.problems
    with pytest.raises(InvalidInput, match="cannot be used"):
        osdefs.check(found, "", {})


@pytest.mark.parametrize("name", ["", "../etc", "a/b", "+lean", "a+", "a+../b", "a+b+c", ".hidden", "a\n"])
def test_names_lead_nowhere_else(name: str) -> None:
    with pytest.raises(InvalidInput):
        osdefs.split(name)


# --- scripts ---

SPEC = {"instance": "i-1", "name": "web", "os": "debian", "memory": 1 << 28, "vcpus": 2, "hypervisor": "qemu", "nics": [], "disks": []}
root = pytest.mark.skipif(os.geteuid() != 0, reason="scripts run as root")


class Node:
    """The orders of one node."""

    def __init__(self, directory: Path, create: str) -> None:
        make(directory / "os", "debian", create=create)
        self.memory = Memory(open_database(":memory:"))
        self.orders = OsOrders((directory / "os",), self.memory, directory / "run", directory / "log", "node1")
        self.logs = directory / "log" / "os"
        self.told: list[Progress] = []

    async def run(self, *, timeout: float = 60.0, generation: int = 1) -> object:
        args = {"generation": generation, "action": "create", "os": "debian", "parameters": {}, "spec": SPEC, "timeout": timeout}
        return await self.orders.run(args, self.told.append)

    async def unrun(self) -> None:
        await self.orders.unrun({"instance": "i-1"}, self.told.append)

    @property
    def log(self) -> bytes:
        return next(self.logs.glob("*.log")).read_bytes()


@root
async def test_the_log_keeps_the_newest_and_stays_small(tmp_path: Path) -> None:
    node = Node(tmp_path, "#!/bin/sh\nseq 1 700000; printf '\\377\\376 end\\n'; echo why >&2; exit 7\n")
    with pytest.raises(HostError, match="failed with code 7: why"):
        await node.run()
    assert len(node.log) <= scripts.LOG_LIMIT
    assert b"\xff\xfe end" in node.log
    assert b"left out" in node.log
    assert b"\n700000\n" in node.log


@root
async def test_a_promised_generation_runs_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, "#!/bin/sh\n")
    node.memory.refuse("i-1", 3)
    with pytest.raises(StaleGeneration):
        await node.run(generation=3)
    assert not node.logs.exists()
    await node.run(generation=4)


@root
async def test_its_daemons_and_mounts_end_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    daemon = f"(while :; do date >{mark}; sleep 0.01; done) &"
    script = f"#!/bin/bash\nmount -t tmpfs none /mnt && touch /mnt/here || exit 5\n{daemon}\nsleep 0.2\n"
    node = Node(tmp_path, script)
    await node.run()
    assert not Path("/mnt/here").exists()
    before = mark.read_bytes(), mark.stat().st_mtime_ns
    await asyncio.sleep(0.1)
    assert (mark.read_bytes(), mark.stat().st_mtime_ns) == before
    await node.unrun()


@root
async def test_at_its_deadline_it_is_gone_although_it_ignores_signals(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    node = Node(tmp_path, f"#!/bin/bash\ntrap '' TERM INT HUP\necho begun\nwhile :; do date >{mark}; sleep 0.01; done\n")
    with pytest.raises(HostError, match="was killed; the end of its words: begun"):
        await node.run(timeout=1.0)
    before = mark.stat().st_mtime_ns
    await asyncio.sleep(0.1)
    assert mark.stat().st_mtime_ns == before
    await node.unrun()
