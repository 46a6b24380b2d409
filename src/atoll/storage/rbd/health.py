"""One sample of Ceph's health, over a connection that is kept for it: it asks monitors and manager only, never an OSD."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import rados

from atoll.model.errors import PoolUnavailable
from atoll.model.health import Health
from atoll.storage.rbd import connections
from atoll.storage.rbd.options import RbdOptions
from atoll.storage.rbd.sample import sample

#: Seconds for the monitors, and for the manager. A manager that is lost is noticed by the monitors after half a minute, and till then what
#: it is asked hangs.
_MONITORS, _MANAGER = 5.0, 2.0
_QUESTIONS = ("osd perf", "osd pool stats")
_NO_ANSWER = "Ceph's manager gives no answer: latency and rates are not known"
_NOT_ALLOWED = "Ceph's manager does not let client.{user} ask: ceph auth caps, mgr 'allow r'; latency and rates are not known"


class _Asked(threading.Thread):
    """A question with patience. It cannot be taken back: librados would write a late answer where nothing of ours is any more."""

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="question")
        self._question = question
        self.answer: Any = None
        self.error: rados.Error | None = None

    def run(self) -> None:
        try:
            self.answer = self._question()
        except rados.Error as error:
            self.error = error

    def within(self, seconds: float) -> bool:
        """Whether there is an answer, or an error, by then."""
        self.start()
        self.join(seconds)
        return not self.is_alive()


class Watch:
    """What is kept between samples of one cluster."""

    def __init__(self, options: RbdOptions) -> None:
        # Without a time-out of librados' own: after that a late answer of the manager's damages this process's memory.
        self._options, self._cluster = options, connections.connect(options, rados_mon_op_timeout="0", client_mount_timeout="5")
        #: The newest OSD map, by its number: it changes seldom, and is the largest answer by far.
        self._map: tuple[int, dict[str, Any]] = (-1, {})
        self._waiting: _Asked | None = None

    def _told(self) -> dict[str, Any]:
        told = {prefix: connections.ask(self._cluster, prefix) for prefix in ("status", "df")}
        told["health"] = connections.ask(self._cluster, "health", detail="detail")
        epoch = int(told["status"]["osdmap"]["epoch"])
        if self._map[0] != epoch:
            self._map = epoch, connections.ask(self._cluster, "osd dump")
        return {**told, "osd dump": self._map[1]}

    def monitors(self) -> dict[str, Any]:
        """Their answers. Errors: PoolUnavailable, HostError."""
        asked = _Asked(self._told)
        if not asked.within(_MONITORS):
            raise PoolUnavailable(f"Ceph's monitors have given no answer for {_MONITORS:g} s", hint="ceph -s; are most of them up?")
        if asked.error is not None:
            raise connections.explain(asked.error, self._options, "asking for its health") from asked.error
        found: dict[str, Any] = asked.answer
        return found

    def manager(self) -> dict[str, Any] | str:
        """Its answers, or why there are none. A question that hangs is not followed by another."""
        if self._waiting is not None and self._waiting.is_alive():
            return _NO_ANSWER
        asked = self._waiting = _Asked(lambda: {q: connections.ask_manager(self._cluster, q) for q in _QUESTIONS})
        if not asked.within(_MANAGER):
            return _NO_ANSWER
        if asked.error is not None:
            return _NOT_ALLOWED.format(user=self._options.user) if connections.forbidden(asked.error) else str(asked.error)
        answers: dict[str, Any] = asked.answer
        return answers


_kept: dict[tuple[str, str, str], Watch] = {}


def take(options: RbdOptions) -> Health:
    """A sample. Errors: PoolUnavailable (no monitor answers)."""
    began, busy = time.monotonic(), time.process_time()
    key = (options.conf, options.user, options.keyring)
    watch = _kept.get(key) or Watch(options)
    _kept[key] = watch
    try:
        told = watch.monitors()
    except Exception:
        # The next sample connects anew; this one's connection may hang in its question for ever.
        connections.abandon(_kept.pop(key))
        raise
    manager = watch.manager() if told["status"]["mgrmap"]["available"] else ""
    found = sample(told, {options.pool, options.data_pool or options.pool}, manager)
    return found.model_copy(update={"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - busy})
