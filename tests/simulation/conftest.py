"""Simulations run thousands of clusters: their logs would cost more than they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from atoll.lab.box import Box

#: Clusters that were made in this process.
_clusters = 0
_make = Box.__dict__["make"].__func__


async def _counted(cls: type[Box], *args: Any, **options: Any) -> Box:
    """Of the class that was asked: other tests of this process have boxes of their own kinds."""
    global _clusters
    _clusters += 1
    made: Box = await _make(cls, *args, **options)
    return made


Box.make = classmethod(_counted)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def counting(record_property: Any) -> Iterator[None]:
    """How many clusters a test has made: one test of the matrix is many cases (see scripts/run_faults.py)."""
    before = _clusters
    yield
    record_property("clusters", _clusters - before)


@pytest.fixture(autouse=True, scope="session")
def silent() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False)
    yield
    structlog.reset_defaults()
