"""Secrets at rest (envelope encryption under a key file outside the store) and tokens."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from atoll.model.errors import HostError
from atoll.runtime.files import fsync_dir

_FORMAT = "atoll1"
_NONCE = 12
HIDDEN = "***"
#: Names of fields whose values are secrets; also with a prefix, such as ``user_password``.
SECRET_NAMES = (
    "password", "passwd", "passphrase", "secret", "secret_key", "token", "authorization", "credential", "keyring", "private_key",
    "key_pem", "api_key", "user_data", "meta_data", "network_config",
)  # fmt: skip


class SecretBox:
    """Seals secrets with keys of a key file (0600). The first key of the file seals; all of them open, so that keys can be changed."""

    def __init__(self, keys: Sequence[bytes], path: Path) -> None:
        """Use ``load_or_create``."""
        self._path = path
        self._keys = {_key_id(key): key for key in keys}
        self._current = _key_id(keys[0])

    def __repr__(self) -> str:
        return f"SecretBox({self._path})"

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> SecretBox:
        """Read the key file; make it, once, when there is none. Errors: HostError when it is damaged or others may read it."""
        target = Path(path)
        try:
            if not target.exists():
                _create(target)
            mode = target.stat().st_mode & 0o777
            lines = target.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise HostError(f"cannot use the key file {target}: {error}") from None
        if mode & 0o077:
            raise HostError(f"others may read the key file {target} (mode {mode:04o})", hint=f"chmod 600 {target}")
        return cls.of(" ".join(lines), target)

    @classmethod
    def of(cls, text: str, path: Path) -> SecretBox:
        """Of a key file's content; ``path`` is for messages. Errors: HostError when it is damaged."""
        try:
            keys = [_decode(line) for line in text.split()]
        except ValueError:
            keys = []
        if not keys or any(len(key) != 32 for key in keys):
            raise HostError(f"the key file {path} is damaged", hint="restore it from a backup: without it no secret can be opened")
        return cls(keys, path)

    def seal(self, plain: bytes, context: str) -> str:
        """Encrypt: a text that only ``open`` with the same context (such as ``token:ID``) turns back. Each call gives another text."""
        data_key = AESGCM.generate_key(256)
        wrapped = _encrypt(self._keys[self._current], data_key, f"{_FORMAT}:key:{context}")
        body = _encrypt(data_key, plain, f"{_FORMAT}:body:{context}")
        return ":".join((_FORMAT, self._current, _encode(wrapped), _encode(body)))

    def open(self, token: str, context: str) -> bytes:
        """Decrypt what ``seal`` made. Errors: HostError when it was changed, is for another context, or its key is not in the file."""
        parts = token.split(":")
        if len(parts) != 4 or parts[0] != _FORMAT:
            raise HostError("this is not a sealed secret", hint="restore the store from a backup")
        key = self._keys.get(parts[1])
        if key is None:
            raise HostError(
                f"the secret for {context} was sealed with key {parts[1]}, which is not in {self._path}",
                hint=f"restore {self._path} from a backup",
            )
        try:
            data_key = _decrypt(key, _decode(parts[2]), f"{_FORMAT}:key:{context}")
            return _decrypt(data_key, _decode(parts[3]), f"{_FORMAT}:body:{context}")
        except (InvalidTag, ValueError):
            raise HostError(f"the secret for {context} is damaged or belongs to something else", hint="set it again") from None


def new_token() -> str:
    """A new credential: 32 random bytes as text that fits in URLs and headers."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What is stored of a token: its sha256, lower-case hex. Tokens have 256 random bits, so a slow hash would add nothing."""
    return hashlib.sha256(token.encode()).hexdigest()


def matches(token: str, stored: str) -> bool:
    """Whether the token has this stored digest; takes the same time either way."""
    return hmac.compare_digest(digest(token), stored)


def redact(value: Any, known: Iterable[str] = ()) -> Any:
    """A copy fit for logs: values of fields with secret names, sealed secrets, and every occurrence of ``known`` secrets are hidden."""
    known = [text for text in known if text]

    def walk(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: HIDDEN if _is_secret_name(key) and inner else walk(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple, set, frozenset)):
            return [walk(inner) for inner in item]
        if isinstance(item, str):
            if item.startswith(f"{_FORMAT}:"):
                return HIDDEN
            for text in known:
                item = item.replace(text, HIDDEN)
        return item

    return walk(value)


def _is_secret_name(name: Any) -> bool:
    text = str(name).lower().replace("-", "_")
    return any(text == secret or text.endswith(f"_{secret}") for secret in SECRET_NAMES)


def _create(path: Path) -> None:
    """Make the key file whole or not at all; another process that makes it first wins."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(_encode(AESGCM.generate_key(256)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # Not a rename: that would replace a key with which secrets are sealed already.
            os.link(partial, path)
        except FileExistsError:
            pass
    finally:
        partial.unlink()
    fsync_dir(path.parent)


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"atoll key id:" + key).hexdigest()[:16]


def _encrypt(key: bytes, plain: bytes, context: str) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, context.encode())


def _decrypt(key: bytes, data: bytes, context: str) -> bytes:
    return AESGCM(key).decrypt(data[:_NONCE], data[_NONCE:], context.encode())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
