"""Logs of the daemons: one line of JSON each on stderr, or colours on a terminal. Secrets never reach them."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from atoll.runtime.secrets import redact


def _no_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    clean: MutableMapping[str, Any] = redact(dict(event))
    return clean


class _Patient(structlog.PrintLogger):
    """Prints. A log that cannot be written, such as to a full disk, must not stop who writes it."""

    def msg(self, message: str) -> None:
        """Print a line, or nothing."""
        try:
            super().msg(message)
        except OSError:
            return

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def configure(level: str = "info") -> None:
    """Set up logging of this process."""
    terminal = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            _no_secrets,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: _Patient(sys.stderr),
    )
