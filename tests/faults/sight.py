"""Looking at guests without disturbing them: what they print on their consoles, and what the agents say of them."""

from __future__ import annotations

import ctypes
import http.client
import itertools
import json
import os
import re
import socket
import ssl
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from atoll.lab.lab import Lab
from atoll.lab.layout import netns_name
from atoll.runtime.config import Config

_ACK = re.compile(rb"ACK (\d+)\r?\n")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Acks:
    """Reads all consoles. Each record is acknowledged by one copy, once: a second time means two writers, or a lost write."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._stop = threading.Event()
        self._read: dict[tuple[Path, int], int] = {}
        self._seen: dict[str, dict[int, tuple[str, float]]] = defaultdict(dict)
        self._last: dict[str, int] = defaultdict(int)
        self._text: dict[str, str] = defaultdict(str)
        #: (instance, number, where first, where again)
        self.twice: list[tuple[str, int, tuple[str, float], tuple[str, float]]] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(0.02):
            for node in self._lab.record.nodes:
                for log in (self._lab.directory / "nodes" / node / "run").glob("logs/*/console.log"):
                    self._take(node, log)

    def _take(self, node: str, log: Path) -> None:
        try:
            with log.open("rb") as file:
                key = log, os.fstat(file.fileno()).st_ino
                begin = self._read.get(key, 0)
                file.seek(begin)
                part = file.read()
        except OSError:
            return
        end = part.rfind(b"\n") + 1
        if not end:
            return
        self._read[key] = begin + end
        instance, now = log.parent.name, time.monotonic()
        self._text[instance] += part[:end].decode(errors="replace")
        for match in _ACK.finditer(part, 0, end):
            number = int(match[1])
            if number in self._seen[instance]:
                self.twice.append((instance, number, self._seen[instance][number], (node, now)))
            self._seen[instance][number] = (node, now)
            self._last[instance] = max(self._last[instance], number)

    def last(self, instance: str) -> int:
        """The highest acknowledged record."""
        return self._last[instance]

    def text(self, instance: str) -> str:
        """Everything that it said on any node."""
        return self._text[instance]

    def beyond(self, instance: str, number: int, seconds: float = 90.0) -> int:
        """Until a higher record is acknowledged."""
        end = time.monotonic() + seconds
        while self._last[instance] <= number:
            assert time.monotonic() < end, f"the guest acknowledged nothing beyond record {number} in {seconds:.0f} s"
            time.sleep(0.02)
        return self._last[instance]

    def gap(self, instance: str, since: float) -> float:
        """The longest silence of the writer since that moment (monotonic), in seconds; the one that lasts still included."""
        times = sorted(at for _, at in dict(self._seen[instance]).values() if at >= since)
        ends = [since, *times, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(ends))

    def says(self, instance: str, words: str, seconds: float = 60.0) -> None:
        """Until these words are on the console."""
        end = time.monotonic() + seconds
        while words not in self._text[instance]:
            assert time.monotonic() < end, f"the guest did not say {words!r}: {self._text[instance][-500:]}"
            time.sleep(0.05)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Sight:
    """Asks the agents, each from within its own node, so that a cut link hides nothing. Uses the master's certificate and its term."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._term = 0
        self._stop = threading.Event()
        tls = lab.node("node1").root / "etc/atoll" / Config().master_tls_dir.name
        self._context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        self._context.load_cert_chain(str(tls / "cert.pem"), str(tls / "key.pem"))
        self._addresses = {node.name: (node.address, node.spec.agent_port) for node in lab.nodes}
        #: (time, node, instance, pid) of each look that saw it running
        self._running: list[tuple[float, str, str, int]] = []
        self._threads = [threading.Thread(target=self._watch, args=(name,), daemon=True) for name in self._addresses]
        for thread in self._threads:
            thread.start()

    def _watch(self, node: str) -> None:
        while not self._stop.wait(0.25):
            for guest in self._look(node) or []:
                if guest["state"] == "running":
                    self._running.append((time.monotonic(), node, guest["instance"], guest["pid"]))

    def ask(self, node: str) -> list[dict[str, Any]] | None:
        """All guests of the node; None when its agent does not answer."""
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(self._look(node)))
        thread.start()
        thread.join()
        return found[0]

    def _look(self, node: str) -> list[dict[str, Any]] | None:
        """In a thread that may move to the node's network."""
        try:
            with open(f"/run/netns/{netns_name(self._lab.name, node)}") as place:
                if _LIBC.setns(place.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return self._call(node)
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def _call(self, node: str) -> list[dict[str, Any]] | None:
        connection = http.client.HTTPConnection("agent")
        for _ in range(2):
            raw = socket.create_connection(self._addresses[node], timeout=2)
            connection.sock = self._context.wrap_socket(raw, server_hostname=node)
            try:
                order = {"term": self._term, "method": "guest.list", "deadline": 5}
                connection.request("POST", "/call", json.dumps(order), {"Content-Type": "application/json"})
                answer = json.loads(connection.getresponse().read().splitlines()[-1])
            finally:
                connection.close()
            if "result" in answer:
                found: list[dict[str, Any]] = answer["result"]
                return found
            # A new master has begun; we speak in its name.
            term = re.search(r"but term (\d+) has begun", answer["error"]["message"])
            if not term:
                return None
            self._term = int(term[1])
        return None

    def both(self, instance: str) -> list[tuple[float, str, str, int]]:
        """Looks at which a copy ran while another did: it was seen between two looks that saw the other."""
        seen = [look for look in self._running if look[2] == instance]
        spans: dict[tuple[str, int], list[float]] = defaultdict(list)
        for at, node, _, pid in seen:
            spans[node, pid].append(at)
        found = []
        for (node, pid), times in spans.items():
            for before, after in itertools.pairwise(times):
                # A copy that was paused for a switchover that failed is seen again later; nobody else may have run in between either.
                found += [look for look in seen if (look[1], look[3]) != (node, pid) and before < look[0] < after]
        return found

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
