"""An answer's parts leave the process together, in their order, and none is lost when the connection ends."""

from __future__ import annotations

import asyncio

from atoll.runtime.httpserver import _Gathered, _State


class Sink(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.closed
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True


async def test_parts_of_one_turn_are_one_write() -> None:
    sink = Sink()
    gathered = _Gathered(sink, asyncio.get_running_loop())
    for part in (b"head", b"", b"body"):
        gathered.write(part)
    assert sink.written == []
    await asyncio.sleep(0)
    gathered.write(b"more")
    await asyncio.sleep(0)
    assert sink.written == [b"headbody", b"more"]


async def test_closing_sends_what_waits() -> None:
    sink = Sink()
    gathered = _Gathered(sink, asyncio.get_running_loop())
    gathered.write(b"last")
    gathered.close()
    assert (sink.written, sink.closed) == ([b"last"], True)
    await asyncio.sleep(0)
    assert sink.written == [b"last"]


async def test_much_is_sent_at_once() -> None:
    sink = Sink()
    gathered = _Gathered(sink, asyncio.get_running_loop())
    for _ in range(4):
        gathered.write(b"x" * (_Gathered.most // 2))
    assert [len(part) for part in sink.written] == [_Gathered.most] * 2


def test_each_answer_has_a_date() -> None:
    name, value = _State().default_headers[0]
    assert name == b"date"
    assert value.endswith(b"GMT")
