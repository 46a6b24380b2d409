from __future__ import annotations

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model.errors import HostError
from atoll.runtime import secrets
from atoll.runtime.secrets import SecretBox


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "master.key"


def test_sealed_opens_again_also_after_loading_anew(path: Path) -> None:
    token = SecretBox.load_or_create(path).seal(b"geheim", "chap:1")
    assert "geheim" not in token
    assert base64.urlsafe_b64encode(b"geheim").decode() not in token
    assert SecretBox.load_or_create(path).open(token, "chap:1") == b"geheim"


@given(plain=st.binary(max_size=200), context=st.text(max_size=20, alphabet="ab:é"))
def test_any_bytes_and_context(plain: bytes, context: str) -> None:
    key = bytes(range(32))
    box = SecretBox([key], Path("k"))
    assert box.open(box.seal(plain, context), context) == plain


def test_the_key_file_is_private_and_made_once(path: Path) -> None:
    before = os.umask(0)
    try:
        SecretBox.load_or_create(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    SecretBox.load_or_create(path)
    assert path.read_bytes() == content
    assert [item.name for item in path.parent.iterdir()] == ["master.key"]


def test_two_who_make_the_key_file_at_once_use_the_same_key(path: Path) -> None:
    """Both have seen that there is none: the second must not replace the first one's key."""
    secrets._create(path)
    first = path.read_bytes()
    secrets._create(path)
    assert path.read_bytes() == first
    path.unlink()
    with ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(lambda _: SecretBox.load_or_create(path), range(8)))
    token = boxes[0].seal(b"x", "c")
    assert all(box.open(token, "c") == b"x" for box in boxes)


def test_each_seal_is_different(path: Path) -> None:
    box = SecretBox.load_or_create(path)
    assert len({part for _ in range(10) for part in box.seal(b"x", "c").split(":")[2:]}) == 20
    # A nonce used twice under one key gives the key stream away; the data keys are random and would hide it here.
    assert len({base64.urlsafe_b64decode(box.seal(b"x", "c").split(":")[2])[:12] for _ in range(10)}) == 10


def test_a_changed_or_moved_token_does_not_open(path: Path) -> None:
    box = SecretBox.load_or_create(path)
    token, other = box.seal(b"geheim", "chap:1"), box.seal(b"anders", "chap:1")
    with pytest.raises(HostError, match="chap:2"):
        box.open(token, "chap:2")
    parts, others = token.split(":"), other.split(":")
    for bad in (
        "",
        "x",
        ":".join([*parts[:3], others[3]]),
        ":".join([*parts[:2], others[2], parts[3]]),
        token + "A",
        token[:-8],
        "atoll2" + token[6:],
    ):
        with pytest.raises(HostError):
            box.open(bad, "chap:1")
    for at in (len(token) - 30, len(":".join(parts[:3])) - 30):
        with pytest.raises(HostError):
            box.open(token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :], "chap:1")


def test_another_key_is_named(path: Path, tmp_path: Path) -> None:
    token = SecretBox.load_or_create(path).seal(b"x", "c")
    with pytest.raises(HostError, match=token.split(":")[1]):
        SecretBox.load_or_create(tmp_path / "other.key").open(token, "c")


def test_keys_can_be_changed(path: Path, tmp_path: Path) -> None:
    old = SecretBox.load_or_create(path).seal(b"x", "c")
    SecretBox.load_or_create(tmp_path / "new.key")
    path.write_text((tmp_path / "new.key").read_text() + path.read_text())
    box = SecretBox.load_or_create(path)
    assert box.open(old, "c") == b"x"
    assert SecretBox.load_or_create(tmp_path / "new.key").open(box.seal(b"y", "c"), "c") == b"y"


def test_a_key_file_that_others_read_or_that_is_damaged_is_refused(path: Path) -> None:
    SecretBox.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(HostError, match="0640") as refused:
        SecretBox.load_or_create(path)
    assert "chmod 600" in refused.value.hint
    path.chmod(0o600)
    for content in (b"", b"short\n", b"\xff\xff", base64.b64encode(b"x" * 16), b"!" * 44):
        path.write_bytes(content)
        with pytest.raises(HostError):
            SecretBox.load_or_create(path)


def test_no_key_is_shown(path: Path) -> None:
    box = SecretBox.load_or_create(path)
    key = base64.urlsafe_b64decode(path.read_text().strip())
    assert repr(key)[2:-1] not in repr(box)
    assert path.read_text().strip() not in repr(box)


def test_tokens() -> None:
    made = {secrets.new_token() for _ in range(100)}
    assert len(made) == 100
    for token in made:
        assert len(base64.urlsafe_b64decode(token + "=")) == 32
        assert secrets.matches(token, secrets.digest(token))
        assert not secrets.matches(token + "x", secrets.digest(token))
        assert token not in secrets.digest(token)
    assert secrets.digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_redact(path: Path) -> None:
    sealed = SecretBox.load_or_create(path).seal(b"x", "c")
    data = {
        "name": "a", "key": "step", "Password": "p1", "chap-secret": "p2", "nested": [{"token": "p3", "size": 1}, ("p4",)],
        "sealed": sealed, "line": "login p4 p4 failed", "secret": "",
    }  # fmt: skip
    assert secrets.redact(data, known=["p4", ""]) == {
        "name": "a", "key": "step", "Password": "***", "chap-secret": "***", "nested": [{"token": "***", "size": 1}, ["***"]],
        "sealed": "***", "line": "login *** *** failed", "secret": "",
    }  # fmt: skip
    assert data["Password"] == "p1", "the original is left alone"
