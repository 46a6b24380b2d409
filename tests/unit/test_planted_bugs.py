"""The planted bugs still fit the source. Whether the fault tests see them says ``scripts/planted_bugs.py``, which takes minutes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOP = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOP / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


script("run_faults")  # which it imports
PLANTED = script("planted_bugs")


@pytest.mark.parametrize("bug", PLANTED.BUGS, ids=lambda bug: bug.name)
def test_what_is_replaced_is_in_the_source_once_and_is_python_afterwards(bug: object) -> None:
    source = bug.check(TOP)  # type: ignore[attr-defined]
    planted = source.replace(bug.old, bug.new)  # type: ignore[attr-defined]
    assert planted != source
    compile(planted, bug.file, "exec")  # type: ignore[attr-defined]


@pytest.mark.parametrize("bug", PLANTED.BUGS, ids=lambda bug: bug.name)
def test_its_tests_belong_to_the_group_that_must_see_it(bug: object) -> None:
    groups = {group.name: group.paths for group in script("run_faults").GROUPS}
    assert any(bug.tests.startswith(path) for path in groups[bug.group])  # type: ignore[attr-defined]
    first = re.match(r"test_\w+", bug.chosen)  # type: ignore[attr-defined]
    if first is not None:
        assert f"def {first[0]}(" in (TOP / bug.tests).read_text()  # type: ignore[attr-defined]


def test_a_bug_that_no_longer_fits_is_told_loudly(tmp_path: Path) -> None:
    bug = PLANTED.BUGS[0]
    (tmp_path / bug.file).parent.mkdir(parents=True)
    (tmp_path / bug.file).write_text("something else\n")
    with pytest.raises(SystemExit, match="0 places"):
        bug.plant(tmp_path)


def test_the_groups_name_tests_that_exist() -> None:
    for group in script("run_faults").GROUPS:
        for path in group.paths:
            assert (TOP / path).exists(), f"group {group.name}: there is no {path}"


def test_the_docs_tell_of_every_planted_bug() -> None:
    page = (TOP / "docs/explanation/faults.md").read_text()
    assert [bug.name for bug in PLANTED.BUGS if f"`{bug.name}`" not in page] == []
