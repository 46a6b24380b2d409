"""What the docs say is so: generated pages are up to date, every command in them exists with its options, every link leads somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from atoll.cli.ganeti import PROGRAMS
from atoll.cli.main import atoll
from atoll.runtime.systemd import units

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "scripts"))
from gen_reference import PAGES  # noqa: E402
from refpages.commands import walk  # noqa: E402

TEXTS = sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md"), *(TOP / "contrib").rglob("*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (TOP / "docs" / "reference" / name).read_text() == PAGES[name](), "type: .venv/bin/python scripts/gen_reference.py"


# --- commands ---


@cache
def roots() -> dict[str, click.Command]:
    return {"atoll": atoll, **{f"gnt-{noun}": make() for noun, make in PROGRAMS.items()}}


@cache
def commands() -> dict[tuple[str, ...], click.Command]:
    return {path: command for root, group in roots().items() for path, command in walk(group, (root,))}


def split(line: str) -> Iterator[list[str]]:
    """The commands in a line of shell, without comments, prompts and what is before or after pipes."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|;&<>()"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def ours(words: list[str]) -> list[str]:
    """The words from ``atoll`` or ``gnt-...`` on; none if the command is another one."""
    while words and (words[0] in ("sudo", "exec") or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
        words = words[1:]
    if not words:
        return []
    name = words[0].removeprefix(".venv/bin/")
    return [name, *words[1:]] if name in roots() else []


def problem(words: list[str], *, whole: bool) -> str:
    """Why this is no command, or nothing. ``whole``: arguments and options that are required must be there."""
    known, rest = commands(), list(words)
    root = roots()[rest.pop(0)]
    path: tuple[str, ...] = (words[0],)
    try:
        context = click.Context(root, info_name=words[0])
        while isinstance(root, click.Group):
            _, rest, _ = root.make_parser(context).parse_args(rest)
            if not rest or rest[0].isupper():
                return ""
            path = (*path, rest[0])
            found = root.get_command(context, rest.pop(0))
            if found is None:
                return f"there is no {' '.join(path)}"
            root = found
            context = click.Context(root, info_name=path[-1], parent=context)
        if path not in known:
            return f"there is no {' '.join(path)}"
        context.allow_extra_args = True
        given, left, _ = root.make_parser(context).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    if left:
        return f"{left} is too much"
    missing = [p.name for p in root.params if p.required and absent(given.get(p.name))]
    return f"{missing} is missing" if missing and whole else ""


def absent(value: object) -> bool:
    """What is not given is None, or a mark of its own in newer versions of click."""
    return not isinstance(value, (str, tuple, bool)) or value == ()


def typed() -> Iterator[tuple[str, str, bool]]:
    """(where, line, whole) of every command line in the texts; in a sentence a command may be only named."""
    for path in TEXTS:
        fenced, before = False, ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(TOP)}:{number}"
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif fenced:
                before += line.strip()
                if before.endswith("\\"):
                    before = before[:-1]
                    continue
                yield where, before, True
                before = ""
            else:
                yield from ((where, code, False) for code in re.findall(r"`([^`]+)`", line))


def shell(line: str) -> bool:
    """Whether it may be a command at all: output of programs is shown in the texts, too."""
    return re.match(r"(\$ |sudo |[A-Z_]+=\S+ |\.venv/bin/)*(atoll|gnt-\w+)( |$)", line) is not None or "| atoll " in line


def test_every_command_in_the_docs_exists() -> None:
    wrong, count = [], 0
    for where, line, whole in typed():
        if shell(line) and "..." not in line:
            for words in split(line):
                if found := ours(words):
                    count += 1
                    if why := problem(found, whole=whole):
                        wrong.append(f"{where}: {line}: {why}")
    assert not wrong, "\n".join(wrong)
    assert count > 100


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("atoll instance migrate web1 -n node2", ""),
        ("gnt-instance startup web1", ""),
        ("atoll --socket /run/x node list", ""),
        ("atoll lab exec node1 -- atoll nonsense", ""),
        ("atoll NOUN VERB", ""),
        ("atoll instance teleport web1", "there is no atoll instance teleport"),
        ("atoll machine list", "there is no atoll machine"),
        ("atoll instance migrate web1 --fast", "No such option"),
        ("atoll instance migrate", "missing"),
        ("atoll pool add p", "missing"),
    ],
)
def test_the_check_itself(line: str, why: str) -> None:
    (words,) = split(line)
    found = problem(ours(words), whole=True)
    assert why in found
    assert bool(why) == bool(found)


def advice(path: Path) -> Iterator[tuple[int, str]]:
    """Every text in the code that begins with a command of ours, with X for what is filled in."""
    tree = ast.parse(path.read_text())
    inner = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        for part in re.findall(r"\batoll [a-z]+ [a-z-]+[^;,:()|`\"\n]*", text):
            yield node.lineno, part


def test_what_errors_tell_to_type_exists() -> None:
    """Hints are followed by words of prose, so only nouns, verbs and options are looked at."""
    known, wrong, count = commands(), [], 0
    nouns = {path[1] for path in known if path[0] == "atoll"}
    for path in sorted((TOP / "src").rglob("*.py")):
        for line, text in advice(path):
            words = text.split()
            command = known.get(("atoll", words[1], words[2])) or known.get(("atoll", words[1]))
            if command is None:
                if words[1] in nouns and re.fullmatch(r"[a-z-]+", words[2]):
                    wrong.append(f"{path.relative_to(TOP)}:{line}: {text}: there is no {' '.join(words[:3])}")
                continue
            count += 1
            options = {"--help", *(name for p in command.params for name in (*p.opts, *p.secondary_opts))}
            bad = [
                w
                for w in (words[: words.index("--")] if "--" in words else words)
                if re.fullmatch(r"--?[a-z][a-z-]*", w) and w not in options
            ]
            if bad:
                wrong.append(f"{path.relative_to(TOP)}:{line}: {text}: there is no {bad[0]}")
    assert not wrong, "\n".join(wrong)
    assert count > 50


# --- links ---


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    wrong = []
    for path in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists():
                wrong.append(f"{path.relative_to(TOP)}: {target}")
            elif anchor and anchor not in anchors(there):
                wrong.append(f"{path.relative_to(TOP)}: {target}: no such heading")
    assert not wrong, "\n".join(wrong)


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [TOP / "README.md"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", path.read_text()):
            there = (path.parent / target).resolve()
            if not re.match(r"[a-z]+:", target) and there.exists():
                todo.append(there)
    assert not [str(path.relative_to(TOP)) for path in TEXTS if path not in seen]


def test_files_that_the_code_names_exist() -> None:
    """Errors send people to pages of the docs."""
    named = {match for path in (TOP / "src").rglob("*.py") for match in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert named
    assert not [name for name in named if not (TOP / name).exists()]


def test_the_units_in_contrib_are_those_that_are_installed() -> None:
    for name, text in units("/opt/atoll/.venv/bin").items():
        assert (TOP / "contrib" / "systemd" / name).read_text() == text
