"""Docs say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from atoll.cli.main import atoll as cli

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_pages_equal_the_code() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/gen_reference.py"), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def commands() -> list[tuple[str, str]]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in page.read_text().splitlines():
            for match in re.findall(r"(?:^    +|`)(?:\.venv/bin/)?(atoll [a-z][^`#]*)", line):
                words = match.strip()
                if page.name != "errors.md":
                    found.append((page.name, words))
    return found


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_in_the_docs_exist(page: str, line: str) -> None:
    words = line.split()[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="atoll")
    while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z-]+", words[0]):
        found = command.get_command(context, words[0])
        assert found is not None, f"{page}: there is no command {line!r}"
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in options, f"{page}: {line!r} has no option {word}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
