"""A log that cannot be written stops nobody."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import structlog
from atoll.runtime.logs import configure
configure()
log = structlog.get_logger()
for number in range(2000):
    log.warning("something", number=number, text="x" * 100)
    log.info("and more")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("with a traceback")
print("went on")
"""


def test_a_full_disk_under_the_log_stops_nobody() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=full, text=True, timeout=60)
    assert done.stdout == "went on\n"


def test_a_log_that_can_be_written_is() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "went on\n"
    assert done.stderr.count('"event": "something"') == 2000
    assert "ZeroDivisionError" in done.stderr
