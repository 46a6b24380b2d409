"""What was acknowledged is on the disk: a real file system loses its power right after, with all that was not synced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.agent.memory import Memory, open_database
from atoll.lab.loops import make_xfs
from atoll.store.sqlite import SqliteStore

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

_STORE = """
import asyncio, sys
from pathlib import Path
from atoll.store.contract import Transaction
from atoll.store.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]) / "store")
    for n in range(1, 21):
        await store.transact(Transaction(put={"n": b"%d" % n}))
    print("acknowledged", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""
_MEMORY = """
import sys
from pathlib import Path
from atoll.agent.memory import Memory, open_database

memory = Memory(open_database(Path(sys.argv[1]) / "agent" / "memory.db"))
memory.see_term(5)
memory.begin(1, "start guest")
memory.set_step(1, "start guest", "done", {"pid": 1})
memory.refuse("i-1", 7)
print("acknowledged", flush=True)
sys.stdin.read()
"""


class Disk:
    """A file system of its own, on a loop device."""

    def __init__(self, directory: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        self.image, self.path = directory / "disk.img", directory / "disk"
        make_xfs(self.image, 300 << 20)
        self.path.mkdir()
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.path)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)

    def cut_power_after(self, code: str) -> None:
        """Run a program until it says that all is acknowledged; then nothing more comes to the disk, not even what the kernel has."""
        command = [sys.executable, "-c", code, str(self.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "acknowledged\n"
            subprocess.run(["xfs_io", "-x", "-c", "shutdown", str(self.path)], check=True)
            program.kill()
        self.unmount()
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path)
    yield found
    found.unmount()


async def test_the_store_has_what_it_has_acknowledged(disk: Disk) -> None:
    disk.cut_power_after(_STORE)
    store = await SqliteStore.open(disk.path / "store")
    entry = await store.get("n")
    await store.close()
    assert entry is not None
    assert entry.value == b"20"


def test_an_agent_remembers_what_it_has_promised(disk: Disk) -> None:
    disk.cut_power_after(_MEMORY)
    memory = Memory(open_database(disk.path / "agent" / "memory.db"))
    try:
        assert (memory.term, memory.refused("i-1")) == (5, 7)
        assert memory.step(1, "start guest") == ("done", {"pid": 1})
    finally:
        memory.close()
