"""Time, injected. Code waits with asyncio only, so that ``VirtualLoop`` can run hours of cluster life in seconds."""

from __future__ import annotations

import asyncio
import selectors
import time
from typing import Any, Protocol


class Clock(Protocol):
    """What may be asked of time. ``now`` may jump; everything that measures a duration uses ``monotonic``."""

    def now(self) -> float:
        """Seconds since 1970 (UTC); for people, never for decisions."""

    def monotonic(self) -> float:
        """Seconds that only grow; zero is arbitrary."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class LoopClock:
    """The clock of the running event loop: virtual under ``VirtualLoop``. ``offset`` may be set to make the wall clock jump."""

    def __init__(self, epoch: float = 1_700_000_000.0) -> None:
        self.offset = epoch

    def now(self) -> float:
        return self.offset + asyncio.get_running_loop().time()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class _SkippingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, let the loop's time jump to it."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            # Only another thread or process could wake us: a deadlock in a purely virtual world shows itself as an error.
            ready = super().select(5)
            if not ready:
                raise RuntimeError("virtual time: everything waits and no timer is set")
            return ready
        self.skipped += max(timeout, 1e-6)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when nothing else is to do. Only for code that does no real I/O."""

    def __init__(self) -> None:
        self._skipping = _SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.skipped
