"""Texts that leave the cluster, without secrets: what is known to be one is hidden in every form in which it may be written, and what looks
like one, too. Rather too much than too little."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atoll.runtime.config import Config
from atoll.runtime.secrets import HIDDEN, SECRET_NAMES, redact

#: A shorter text is no secret that could be searched for: it would hide half of the log.
SHORTEST = 8
_NAMES = "|".join(name.replace("_", "[_-]?") for name in sorted(SECRET_NAMES, key=len, reverse=True))
_PATTERNS = (
    # Private keys of all kinds, also with their line ends escaped.
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"atoll1:[A-Za-z0-9_:=-]+"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    # name=value, name: value, "name": "value", --name value.
    (
        re.compile(rf"""(?ix) ( (?:{_NAMES}) \\?["']? (?: \s*[:=]\s* | (?<=["'])\s+ ) ) (\\?["']) (.*?) \2"""),
        rf"\1\2{HIDDEN}\2",
    ),
    (re.compile(rf"(?i)((?:\b|--|_)(?:{_NAMES})(?:\s*[:=]\s*|\s+(?=\S*\d)))(?![\"'\\*])[^\s,;&\"'\\]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), rf"\1:{HIDDEN}@"),
    # Hashes of passwords, as in /etc/shadow and in user data.
    (re.compile(r"\$(?:1|2[aby]?|5|6|7|y|gy)\$[A-Za-z0-9./$=,]{8,}"), HIDDEN),
    # Longer than any digest that is shown.
    (re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{66,}(?![0-9A-Za-z])"), HIDDEN),
    # What was made at random: long, of capitals, small letters and digits. Hexadecimal digests and ids are not.
    (
        re.compile(
            r"(?<![A-Za-z0-9_+/=-])(?=[A-Za-z0-9_+/-]*[A-Z])(?=[A-Za-z0-9_+/-]*[a-z])(?=[A-Za-z0-9_+/-]*\d)[A-Za-z0-9_+-]{32,}={0,2}"
        ),
        HIDDEN,
    ),
)


class Scrubber:
    """Hides secrets. ``known``: texts that must not be seen, whatever they are written as."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        forms = {form for secret in known if len(secret) >= SHORTEST for form in _forms(secret)}
        # The longest first: one may be a part of another.
        self._known = sorted(forms, key=lambda form: (-len(form), form))

    def text(self, text: str) -> str:
        """A text without them."""
        # One search for each is far quicker than one expression of all.
        for form in self._known:
            text = text.replace(form, HIDDEN)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def data(self, data: Any) -> Any:
        """JSON-able data without them; its form stays."""
        return self._walk(redact(data))

    def _walk(self, item: Any) -> Any:
        if isinstance(item, dict):
            return {self.text(str(key)): self._walk(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [self._walk(inner) for inner in item]
        return self.text(item) if isinstance(item, str) else item


def _forms(secret: str) -> Iterator[str]:
    """How a secret may be written: as it is, quoted for JSON, URLs or Python, in hexadecimal, and in base64 at any place in a text."""
    raw = secret.encode()
    yield from (secret, json.dumps(secret)[1:-1], quote(secret, safe=""), repr(secret)[1:-1])
    yield from (raw.hex(), raw.hex().upper())
    for shift in range(3):
        # What stands before and after it changes the first and the last letters.
        coded = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
        begin = (0, 2, 3)[shift]
        end = len(coded) - (1 if (shift + len(raw)) % 3 else 0)
        inner = coded[begin:end]
        if len(inner) >= SHORTEST:
            yield inner
            yield inner.replace("+", "-").replace("/", "_")


def secrets_of(config: Config) -> list[str]:
    """The secrets that lie on this machine, as texts to search for. What may not be read here cannot be in what is read here either."""
    found: list[str] = []
    places = [config.tls_dir, config.master_tls_dir, config.candidate_dir]
    files = [p for place in places if place.is_dir() for p in place.rglob("*") if p.is_file() and ("key" in p.name)]
    files.append(config.etc_dir / "master.key")
    if named := os.environ.get("ATOLL_TOKEN_FILE"):
        files.append(Path(named))
    for path in files:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("-----")]
        found += [*lines, "".join(lines)]
    return found
