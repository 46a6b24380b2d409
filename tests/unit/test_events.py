"""The event stream: what is told, in which order, from where on, and to whom no longer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rest_fakes import GROUP, FakeLeader, fake_leader, ident, served

from atoll.api import events
from atoll.api.events import Follower, Hub
from atoll.model.errors import NotLeader, TooManyStreams
from atoll.model.messages import Progress
from atoll.model.objects import Group, Instance, Job, JobState, Token
from atoll.store.cache import LeaderStore
from atoll.store.memory import Durable, MemoryStore

GROUPS = [Group(id=ident("group", number), name=f"g{number}") for number in range(1, 40)]


async def make(durable: Durable | None = None, **kept: int) -> tuple[LeaderStore, Hub]:
    store = await LeaderStore.open(MemoryStore(durable=durable or Durable(), **kept))
    return store, Hub(store, lambda number: Progress())


def parse(text: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in text.decode().splitlines():
        name, _, value = line.partition(": ")
        if name:
            found[name] = json.loads(value) if name == "data" else value
    return found


class Reader:
    """What a follower was sent, as far as it reads."""

    def __init__(self, follower: Follower) -> None:
        self._frames = follower.frames()

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            return parse(await anext(self._frames))

    async def names(self, count: int) -> list[str]:
        return [(await self.next())["data"]["name"] for _ in range(count)]

    async def all(self) -> list[dict[str, Any]]:
        """Until it is let go."""
        async with asyncio.timeout(5):
            return [parse(text) async for text in self._frames]


async def test_changes_are_told_with_the_revision_on_the_last_of_a_transaction() -> None:
    store, hub = await make()
    reader = Reader(await hub.follow())
    assert (await reader.next())["id"] == str(store.revision)
    await store.write(put=GROUPS[:2])
    await store.write(delete=[GROUPS[0]])
    first, second, third = [await reader.next() for _ in range(3)]
    assert first["data"] == {"noun": "group", "id": GROUPS[0].id, "change": "changed", "revision": 2, "name": "g1"}
    assert "id" not in first, "cut off here, the whole transaction is told again"
    assert second["id"] == "2"
    assert (third["event"], third["id"], third["data"]["change"]) == ("group", "3", "removed")


async def test_what_was_missed_is_told_first_and_nothing_twice() -> None:
    durable = Durable()
    store, hub = await make(durable)
    await store.write(put=GROUPS[:1])
    seen = store.revision
    await store.write(put=[GROUPS[1], GROUPS[2]])
    await store.write(delete=[GROUPS[1]])
    # Another master leads by now.
    store, hub = await make(durable)
    follow = asyncio.ensure_future(hub.follow(after=seen))
    await asyncio.sleep(0)
    await store.write(put=[GROUPS[3]])
    reader = Reader(await follow)
    await store.write(put=[GROUPS[4]])
    told: list[tuple[str, str]] = []
    while not told or told[-1][0] != "g5":
        event = await reader.next()
        if "data" in event:
            told.append((event["data"].get("name", event["data"]["id"]), event["data"]["change"]))
    wanted = [("g2", "changed"), ("g3", "changed"), (GROUPS[1].id, "removed"), ("g4", "changed"), ("g5", "changed")]
    assert told == wanted


@pytest.mark.parametrize("ahead", [False, True])
async def test_who_was_away_too_long_is_told_to_read_again(ahead: bool) -> None:
    store, hub = await make(keep_revisions=3)
    for group in GROUPS[:10]:
        await store.write(put=[group])
    reader = Reader(await hub.follow(after=999 if ahead else 2))
    event = await reader.next()
    assert event["event"] == "reset"
    assert event["id"] == str(store.revision)
    assert ("newer" if ahead else "no longer kept") in event["data"]["why"]
    await reader.next()
    await store.write(put=[GROUPS[11]])
    assert (await reader.next())["data"]["name"] == "g12"


async def test_a_slow_follower_is_told_and_let_go_and_the_others_miss_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BOUND", 5)
    store, hub = await make()
    slow, fast = Reader(await hub.follow()), Reader(await hub.follow())
    await fast.next()
    for group in GROUPS[:10]:
        await store.write(put=[group])
        assert await fast.names(1) == [group.name]
    assert hub.count == 1
    found = await slow.all()
    assert [event["event"] for event in found] == ["reset"], "bounded: what waited is dropped"
    assert "did not read" in found[0]["data"]["why"]
    assert int(found[0]["id"]) <= store.revision


async def test_of_progress_only_the_newest_waits() -> None:
    store, hub = await make()
    await store.write(put=[Job(id=f"{7:010d}", operation="instance.add", state=JobState.RUNNING, summary="make web1")])
    reader, other = Reader(await hub.follow(job=7)), await hub.follow(job=8)
    assert (await reader.next())["data"] == {
        "noun": "job",
        "id": 7,
        "change": "changed",
        "revision": 2,
        "state": "running",
        "summary": "make web1",
        "operation": "instance.add",
    }
    for percent in range(100):
        hub.progress(7, Progress(percent=percent, text="copying"))
    assert "data" not in await reader.next()
    event = await reader.next()
    assert (event["event"], event["data"]["percent"]) == ("progress", 99.0)
    assert "id" not in event
    assert other.woken == 0


async def test_secrets_and_journals_are_not_told() -> None:
    store, hub = await make()
    reader = Reader(await hub.follow())
    await reader.next()
    await store.write(put=[Token(id="t", purpose="api", digest="d", name="monitoring")])
    await store.write(put=GROUPS[:1])
    assert await reader.names(1) == ["g1"]
    follower = await hub.follow(after=1)
    assert follower.knows == store.revision
    replayed = Reader(follower)
    assert await replayed.names(1) == ["g1"]


async def test_a_thousand_idle_followers_are_not_woken_and_one_timer_beats_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store, hub = await make()
    idle = [await hub.follow(nouns=["pool"]) for _ in range(1000)]
    busy = Reader(await hub.follow(nouns=["group"]))
    await busy.next()
    tasks = len(asyncio.all_tasks())
    for group in GROUPS:
        await store.write(put=[group])
    assert await busy.names(len(GROUPS)) == [group.name for group in GROUPS]
    waiting = {len(follower._waiting) for follower in idle}
    assert waiting == {1}, "nothing but the greeting"
    assert len(asyncio.all_tasks()) == tasks
    monkeypatch.setattr(events, "FOLLOWERS", hub.count)
    with pytest.raises(TooManyStreams):
        await hub.follow()


async def test_the_heartbeat_brings_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BEAT", 0.05)
    store, hub = await make()
    reader = Reader(await hub.follow(nouns=["pool"]))
    await reader.next()
    await store.write(put=GROUPS[:1])
    assert (await reader.next())["id"] == str(store.revision)
    hub.close("the end")
    assert [event["event"] for event in await reader.all() if "event" in event] == ["end"]
    with pytest.raises(NotLeader, match="the end"):
        await hub.follow()


async def test_an_event_out_of_order_lets_everybody_read_again() -> None:
    store, hub = await make()
    reader = Reader(await hub.follow())
    await reader.next()
    store.late += 1
    await store.write(put=GROUPS[:1])
    assert [event["event"] for event in await reader.all()] == ["reset"]


async def test_old_layouts_in_the_log_are_told() -> None:
    found = events.describe("volumes", "vol-1", {"id": "vol-1", "label": "x", "state": "available"}, 5)
    assert found == {"noun": "volume", "id": "vol-1", "change": "changed", "revision": 5, "state": "available"}


# --- over HTTP ---


@pytest.fixture
async def rest(tmp_path: Path) -> AsyncIterator[tuple[FakeLeader, aiohttp.ClientSession]]:
    leader = await fake_leader()
    async with (
        served(leader, tmp_path) as (path, _),
        aiohttp.ClientSession("http://x", connector=aiohttp.UnixConnector(path)) as session,
    ):
        yield leader, session


async def test_stream_over_http(rest: tuple[FakeLeader, aiohttp.ClientSession]) -> None:
    leader, session = rest
    store = leader.state.store
    before = store.revision
    await store.write(put=[GROUP.model_copy(update={"tags": ("x",)})])
    async with session.get("/v1/events?nouns=group,instance", headers={"Last-Event-ID": str(before)}) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert parse(await _frame(answer))["data"]["name"] == GROUP.name
        await _frame(answer)
        await store.change(Instance, ident("i", 1), lambda item: item.model_copy(update={"name": "www"}))
        assert parse(await _frame(answer))["data"]["name"] == "www"
        assert leader.events.count == 1
    async with asyncio.timeout(5):
        while leader.events.count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _frame(answer: aiohttp.ClientResponse) -> bytes:
    async with asyncio.timeout(5):
        return await answer.content.readuntil(b"\n\n")


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("?nouns=tokens", {}, 422),
        ("?job=99", {}, 404),
        ("?job=0", {}, 422),
        ("", {"Last-Event-ID": "x"}, 422),
        ("", {"Last-Event-ID": "-1"}, 422),
        ("", {"Authorization": "Bearer bad"}, 401),
    ],
)
async def test_refusals(rest: tuple[FakeLeader, aiohttp.ClientSession], query: str, headers: dict[str, str], status: int) -> None:
    async with rest[1].get(f"/v1/events{query}", headers=headers) as answer:
        assert answer.status == status
        assert (await answer.json(content_type=None))["hint"]


async def test_the_master_ends_without_waiting_for_streams(tmp_path: Path) -> None:
    leader = await fake_leader()
    loop = asyncio.get_running_loop()
    async with served(leader, tmp_path) as (path, _):
        session = aiohttp.ClientSession("http://x", connector=aiohttp.UnixConnector(path))
        answer = await session.get("/v1/events")
        await _frame(answer)
        leader.events.close("this master ends")
        began = loop.time()
    assert loop.time() - began < 2
    assert b"event: end" in await answer.content.read()
    await session.close()
