"""Errors on the wire."""

from __future__ import annotations

import pytest

from atoll.jobs.steps import Attention, Settled
from atoll.jobs.undo import UndoFailed
from atoll.model.errors import AtollError, PoolFull, all_errors, from_wire


def test_an_error_of_no_kind_comes_back_whatever_else_is_loaded() -> None:
    """Errors that steer jobs take more than a message; they share the root's code, and were chosen for it."""
    assert {UndoFailed, Settled, Attention} <= set(all_errors())
    found = from_wire(AtollError("it failed", hint="look", commands=["atoll job list"]).to_wire())
    assert type(found) is AtollError
    assert (found.message, found.hint, found.details) == ("it failed", "look", {"commands": ["atoll job list"]})


@pytest.mark.parametrize("error", [e for e in all_errors() if "code" in vars(e) and e.__init__ is AtollError.__init__])
def test_every_kind_of_error_comes_back_as_itself(error: type[AtollError]) -> None:
    found = from_wire(error("words", hint="type this").to_wire())
    assert (type(found), found.message, found.hint) == (error, "words", "type this")


def test_an_unknown_code_becomes_the_root_error() -> None:
    assert type(from_wire({"code": "of the future", "message": "words"})) is AtollError
    assert type(from_wire(PoolFull("x").to_wire())) is PoolFull
