"""``atoll job watch`` and ``atoll cluster events``: the stream as people see it, also when the master goes and comes."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from rest_fakes import GROUP, FakeLeader, Script, clean_environment, fake_leader, served

from atoll.api.leader import Caller
from atoll.model.messages import Progress
from atoll.model.objects import JobState

ATOLL = [sys.executable, "-m", "atoll.cli.main"]
SOURCE = Path(__file__).parents[2] / "src"
ADA = Caller("ada", "admin")


class Running:
    """A command, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self, stream: str = "stdout") -> str:
        found = getattr(self._process, stream)
        async with asyncio.timeout(30):
            return (await found.readline()).decode().rstrip()

    async def until(self, word: str, stream: str = "stdout") -> str:
        while word not in (line := await self.line(stream)):
            assert line, f"{word} never came"
        return line

    async def end(self, number: int | None = None) -> tuple[int, str, str]:
        if number:
            self._process.send_signal(number)
        out, err = await asyncio.wait_for(self._process.communicate(), 30)
        assert self._process.returncode is not None
        assert b"Traceback" not in err
        return self._process.returncode, out.decode(), err.decode()


@pytest.fixture
async def leader() -> FakeLeader:
    return await fake_leader()


async def run(directory: Path, *words: str) -> Running:
    environment = clean_environment(PYTHONPATH=str(SOURCE), ATOLL_SOCKET=str(directory / "api.sock"))
    pipe = asyncio.subprocess.PIPE
    # Whoever runs the tests in the background may have Ctrl-C ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return Running(await asyncio.create_subprocess_exec(*ATOLL, *words, env=environment, stdout=pipe, stderr=pipe, preexec_fn=heed))


async def test_a_watched_job_is_followed_live_to_its_end(leader: FakeLeader, tmp_path: Path) -> None:
    leader.script = Script(progress=[Progress(percent=10, text="begun")], gate=asyncio.Event(), result={"figure": 7})
    async with served(leader, tmp_path):
        number = (await leader.submit("instance.start", "web1", {}, who=ADA)).job
        assert number == 1
        watch = await run(tmp_path, "job", "watch", "1")
        assert "begun" in await watch.until("10%", "stderr"), "what was told before is shown at once"
        leader.events.progress(1, Progress(percent=55, text="halfway"))
        assert "halfway" in await watch.until("55%", "stderr")
        leader.script.gate.set()
        code, out, _ = await watch.end()
    assert code == 0
    assert "Job 1 done: instance start web1" in out
    assert "figure: 7" in out


async def test_a_watched_job_is_followed_across_a_restart_of_the_master(leader: FakeLeader, tmp_path: Path) -> None:
    leader.script = Script(gate=asyncio.Event(), state=JobState.UNDONE)
    async with served(leader, tmp_path):
        await leader.submit("instance.start", "web1", {}, who=ADA)
        watch = await run(tmp_path, "job", "watch", "1")
        await watch.until("1", "stderr")
        leader.events.close("this master ends")
    leader.script.gate.set()
    leader.events.__init__(leader.state.store, leader.job_progress)
    async with served(leader, tmp_path):
        code, _, err = await watch.end()
    assert code == 8
    assert "was undone" in err


async def test_ctrl_c_leaves_the_job(leader: FakeLeader, tmp_path: Path) -> None:
    leader.script = Script(progress=[Progress(text="working")], gate=asyncio.Event())
    async with served(leader, tmp_path):
        await leader.submit("instance.start", "web1", {}, who=ADA)
        watch = await run(tmp_path, "job", "watch", "1")
        await watch.until("working", "stderr")
        code, _, err = await watch.end(signal.SIGINT)
    assert code == 130
    assert "Job 1 goes on" in err
    assert leader.events.count == 0


async def test_all_jobs(leader: FakeLeader, tmp_path: Path) -> None:
    leader.script = Script(progress=[Progress(percent=30, text="copying")], gate=asyncio.Event())
    async with served(leader, tmp_path):
        await leader.submit("instance.start", "web1", {}, who=ADA)
        watch = await run(tmp_path, "job", "watch")
        assert "job 1  running  instance start web1" in await watch.line()
        leader.events.progress(1, Progress(percent=35, text="copying"))
        while leader.events.count == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await leader.submit("instance.stop", "web1", {}, who=ADA)
        await watch.until("job 2  running  instance stop web1")
        leader.script.gate.set()
        await watch.until("done")
        code, _, _ = await watch.end(signal.SIGINT)
    assert code == 0


@pytest.mark.parametrize("form", ["table", "json"])
async def test_events(leader: FakeLeader, tmp_path: Path, form: str) -> None:
    store = leader.state.store
    before = store.revision
    await store.write(put=[GROUP.model_copy(update={"tags": ("x",)})])
    async with served(leader, tmp_path):
        events = await run(tmp_path, "cluster", "events", "group", "--after", str(before), "--format", form)
        line = await events.line()
        if form == "json":
            found = json.loads(line)
            assert (found["noun"], found["name"], found["event_id"]) == ("group", GROUP.name, before + 1)
        else:
            assert f"group {GROUP.name}  changed" in line
        code, _, _ = await events.end(signal.SIGINT)
    assert code == 0


async def test_events_of_nothing_known(leader: FakeLeader, tmp_path: Path) -> None:
    async with served(leader, tmp_path):
        code, _, err = await (await run(tmp_path, "cluster", "events", "secrets")).end()
    assert code == 2
    assert "nouns:" in err
