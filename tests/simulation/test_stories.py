"""The fault matrix has a story of every operation there is; a new one fails here until somebody has written its own."""

from __future__ import annotations

from pathlib import Path

from simstories import ELSEWHERE, STORIES

from atoll.operations.all import OPERATIONS

HERE = Path(__file__).parent


def test_every_operation_has_a_story() -> None:
    told = {story.operation for story in STORIES}
    missing = sorted(OPERATIONS.keys() - told - ELSEWHERE.keys())
    assert not missing, f"add a story to tests/simulation/simstories.py for {', '.join(missing)}"
    assert not told - OPERATIONS.keys()
    assert not told & ELSEWHERE.keys()


def test_what_is_told_elsewhere_is_told_there() -> None:
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (HERE / file).read_text()


def test_stories_have_names_of_their_own() -> None:
    assert len({story.name for story in STORIES}) == len(STORIES)
