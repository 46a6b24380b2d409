"""An agent whose memory cannot be written does nothing; one whose memory is damaged does not start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from simsupport import check, jobs, settle

from atoll.agent.memory import Memory, open_database
from atoll.lab.box import Box, simulate
from atoll.model.errors import AtollError, HostError
from atoll.model.messages import Call
from atoll.model.objects import JobState
from atoll.model.units import GIB, MIB
from atoll.rpc.agents import quiet

#: Of the file system ``small``.
DISK = "1m"
PAGE = 4096


def fill(path: Path, pages: int) -> None:
    with (path / "filler").open("wb") as file:
        while (free := os.statvfs(path).f_bavail) > pages:
            file.write(bytes(PAGE * (free - pages)))
            file.flush()


def write_all(memory: Memory, upto: dict[str, int]) -> None:
    """Everything that is ever remembered; ``upto`` says what was, also when it ends with an error."""
    for number in range(1, 13):
        memory.see_term(number, f"node-{number}")
        upto["term"] = number
        memory.refuse("i-1", number)
        upto["refused"] = number
        memory.see_oldest_job(number - 1)
        memory.begin(number, "make")
        upto["begun"] = number
        memory.set_step(number, "make", "done", {"x": "y" * 300})
        upto["done"] = number


@pytest.mark.root
def test_a_disk_that_is_full_at_every_write(small: Path) -> None:
    refused = 0
    for pages in range(200):
        for path in small.iterdir():
            path.unlink()
        database = open_database(small / "agent.db")
        memory, upto = Memory(database), {"term": 0, "refused": 0, "begun": 0, "done": 0}
        fill(small, pages)
        try:
            write_all(memory, upto)
            break
        except HostError as error:
            found = error
        refused += 1
        assert "cannot remember" in found.message
        assert "df" in found.hint
        # What it says it knows is what it knows after a power cut: another connection sees what is in the file.
        other = Memory(open_database(small / "agent.db"))
        for one in (memory, other):
            assert (one.term, one.refused("i-1")) == (upto["term"], upto["refused"])
            assert one.step(upto["done"], "make") == (("done", {"x": "y" * 300}) if upto["done"] else None)
            assert (one.step(upto["done"] + 1, "make") is not None) == (upto["begun"] > upto["done"])
        other.close()
        (small / "filler").unlink()
        for number in range(13, 20):
            memory.see_term(number, "later")
            memory.begin(number, "make")
        memory.close()
    else:
        pytest.fail("it never came to its end")
    assert refused > 20


@pytest.mark.parametrize("harm", ["text", "page"])
def test_a_damaged_one_is_refused_with_what_to_do(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "agent.db"
    memory = Memory(open_database(path))
    for number in range(300):
        memory.set_step(number, "make", "done", "x" * 200)
    memory.close()
    data = bytearray(path.read_bytes())
    if harm == "text":
        data[:] = b"no database " * 3000
    else:
        start = len(data) // 2 // PAGE * PAGE
        data[start : start + PAGE] = os.urandom(PAGE)
    path.write_bytes(bytes(data))
    with pytest.raises(HostError) as found:
        open_database(path)
    assert str(path) in found.value.message
    assert "docs/howto/node-returns.md" in found.value.hint


@pytest.mark.root
def test_orders_to_a_node_with_a_full_disk(small: Path) -> None:
    """They are refused and change nothing; once there is room, the same node takes them again."""

    async def story() -> None:
        box = await Box.make(nodes=1)
        await box.add_pool()
        await box.crash_agent("node1")
        box._databases["node1"] = open_database(small / "agent.db")
        await box.boot_agent("node1")
        await settle(box)
        request = {"template": "shared", "disks": [{"size": GIB}], "memory": 128 * MIB}
        await box.do("instance.add", name="before", **request)
        fill(small, 0)
        # The very same order, again and again: the second must not be told of the first's failure.
        again = Call(term=box.master.state.store.term, method="guest.list", job=900, step="look")
        with pytest.raises(HostError, match="cannot remember"):
            await box.agents["node1"].service.handle(again, quiet)
        (small / "filler").unlink()
        assert [guest["name"] for guest in await box.agents["node1"].service.handle(again, quiet)] == ["before"]
        fill(small, 0)
        failed: list[str] = []
        for number in range(20):
            try:
                await box.do("instance.add", name=f"web{number}", **request)
            except AtollError as error:
                failed.append(error.message)
                if len(failed) == 3:
                    break
        assert len(failed) == 3
        assert all("cannot remember" in text for text in failed)
        # The guest that was there is not harmed.
        assert [guest.name for guest in await box.agents["node1"].hypervisor.guests() if guest.name == "before"] == ["before"]
        (small / "filler").unlink()
        for job in jobs(box):
            if job.state is JobState.NEEDS_ATTENTION:
                await box.master.undo_job(job.number)
                assert (await box.end_of(job.number)).state is JobState.UNDONE
        await box.do("instance.add", name="after", **request)
        check(box)
        await box.close()

    simulate(story)
