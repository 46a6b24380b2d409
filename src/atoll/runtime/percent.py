"""How far a call in a worker process is. Drivers tell; elsewhere, such as in tests of a driver, nobody listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Seconds between two words about one call.
_PAUSE = 0.5
_lock = threading.Lock()
_listener: Callable[[float], None] | None = None
_last = 0.0


def listen(listener: Callable[[float], None] | None) -> None:
    """Who is told from now on; None: nobody. When this returns, nobody else is being told any more."""
    global _listener, _last
    with _lock:
        _listener, _last = listener, 0.0


def tell(percent: float) -> None:
    """From any thread, as often as one likes."""
    global _last
    with _lock:
        if _listener is not None and time.monotonic() - _last >= _PAUSE:
            _last = time.monotonic()
            _listener(percent)
