"""Clients that take all they can get: the master goes on answering others within moments."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_master import Served, real_master

#: Seconds in which others must be answered on a machine that is busy with something else.
PATIENCE = 10.0


def connect(served: Served) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(served.path))
    return client


def answers(served: Served) -> None:
    began = time.monotonic()
    assert served.ask("GET", "/v1/cluster")[0] == 200
    assert time.monotonic() - began < PATIENCE


@pytest.fixture
def files() -> Iterator[None]:
    """Room for many connections in this process, which has both ends of them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def served(tmp_path: Path, files: None) -> Iterator[Served]:
    with real_master(tmp_path, nodes=1) as found:
        yield found


def test_ten_megabytes_of_headers(served: Served) -> None:
    for _ in range(3):
        client = connect(served)
        client.sendall(b"GET /v1/cluster HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            for number in range(160):
                client.sendall(b"X-%d: " % number + b"a" * (64 << 10) + b"\r\n")
        with contextlib.suppress(OSError):
            assert client.recv(100)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
        client.close()
        answers(served)


def test_a_thousand_who_only_listen(served: Served) -> None:
    """Followers of events that never read: those beyond the limit are told, the rest cost nothing."""
    streams, refused = [], 0
    for _ in range(1000):
        client = connect(served)
        client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            head = client.recv(4096)
        except OSError:
            head = b""
        if b" 200 " in head[:20]:
            streams.append(client)
        else:
            assert head[:12] in (b"", b"HTTP/1.1 503"), head
            refused += 1
            client.close()
    assert len(streams) >= 100
    assert len(streams) + refused == 1000
    began = time.monotonic()
    # On the connections that are left for them, others are served while much happens that all must be told.
    for stream in streams[:8]:
        stream.close()
    for number in range(30):
        for _ in range(100):
            status, _, answer = served.ask("POST", "/v1/groups", {"name": f"g{number}"})
            if status:
                break
        assert status == 202, answer
    answers(served)
    assert time.monotonic() - began < 10 * PATIENCE
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 60
    while f"g{29}" not in {row["name"] for row in served.json("GET", "/v1/groups")["items"]}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_hundred_who_send_drops(served: Served) -> None:
    stop = threading.Event()
    slow = [connect(served) for _ in range(100)]

    def drip() -> None:
        while not stop.wait(0.2):
            for client in slow:
                with contextlib.suppress(OSError):
                    client.send(b"P")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        for _ in range(20):
            answers(served)
    finally:
        stop.set()
        thread.join()
        for client in slow:
            client.close()


def test_the_wall_clock_jumps(served: Served) -> None:
    """An hour, a day and three years, there and back: nobody is called dead, jobs end, tokens without an end stay good."""
    token = served.json("POST", "/v1/tokens", {"name": "ray", "role": "reader"})["token"]
    for jump in (3600, -3600, 86400, -3 * 86400, 3 * 365 * 86400, -3 * 365 * 86400):
        served.box.clock.offset += jump
        told = served.json("POST", "/v1/groups", {"name": f"g{abs(jump)}{'a' if jump > 0 else 'b'}"})
        deadline = time.monotonic() + 60
        while served.json("GET", f"/v1/jobs/{told['job']}?wait=2")["state"] != "done":
            assert time.monotonic() < deadline
        assert [row["alive"] for row in served.json("GET", "/v1/nodes")["items"]] == [True]
        assert served.ask("GET", "/v1/cluster", headers={"Authorization": f"Bearer {token}"})[0] == 200
