"""For mkdocs: pages that live outside of docs/ belong to the site too, so that no link leads nowhere."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "contrib/README.md", "contrib/systemd/README.md")
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add them under ``project/``."""
    for name in OUTSIDE:
        if (ROOT / name).exists():
            files.append(File.generated(config, f"project/{name}", content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links in the source are those of the repository; here they become those of the site. A broken one stays, and mkdocs tells."""
    here = page.file.src_uri
    home = here.removeprefix("project/") if here.startswith("project/") else f"docs/{here}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), match[1]))
        if target in OUTSIDE:
            inside = f"project/{target}"
        elif here.startswith("project/") and target.startswith("docs/"):
            inside = target.removeprefix("docs/")
        else:
            return match[0]
        return f"]({posixpath.relpath(inside, posixpath.dirname(here))}{match[2]})"

    text = _LINK.sub(moved, markdown)
    if here.startswith("project/"):
        text = re.sub(r"\]\((docs/[^)#\s]+)((?:#[^)\s]*)?)\)", moved, text)
        # Files beside them, such as units, are in the repository only.
        text = re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)#\s]+\.(?!md)[a-z]+\)", r"\1", text)
    return text
