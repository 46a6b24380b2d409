"""Where a daemon keeps its certificate: in a directory, or in memory for simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from atoll.model.errors import HostError
from atoll.runtime import certs
from atoll.runtime.files import fsync_dir, write_durably


class Keeping(Protocol):
    """One daemon's CA certificates, certificate and key, and the key of a certificate that it has asked for."""

    def read(self) -> tuple[str, str, str]:
        """(CA bundle, certificate, key), all PEM. Errors: HostError."""

    def save(self, ca: str, certificate: str, key: str | None = None) -> None:
        """Replace them, durably and all at once; None keeps the key. Errors: HostError."""

    def next_key(self) -> str | None:
        """The key for which a certificate was asked."""

    def set_next_key(self, key: str | None) -> None:
        """Remember it, durably, or forget it. Errors: HostError."""


class KeptInFiles:
    """In ``tls_dir``, as ``certs.save`` lays it out."""

    def __init__(self, tls_dir: Path) -> None:
        self._dir = tls_dir
        self._next = tls_dir / "next.key"

    def read(self) -> tuple[str, str, str]:
        """See ``Keeping``."""
        place = certs.current(self._dir)
        try:
            ca, certificate, key = ((place / name).read_text() for name in certs.FILES)
        except OSError as error:
            raise HostError(f"the certificate in {self._dir} cannot be read: {error.strerror}", hint=f"ls -l {self._dir}") from None
        return ca, certificate, key

    def save(self, ca: str, certificate: str, key: str | None = None) -> None:
        """See ``Keeping``."""
        try:
            certs.save(self._dir, ca, certificate, key)
        except OSError as error:
            raise HostError(f"cannot write the certificate in {self._dir}: {error.strerror}") from None

    def next_key(self) -> str | None:
        """See ``Keeping``."""
        try:
            return self._next.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"cannot read {self._next}: {error.strerror}") from None

    def set_next_key(self, key: str | None) -> None:
        """See ``Keeping``."""
        if key is not None:
            write_durably(self._next, key)
            return
        try:
            self._next.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"cannot remove {self._next}: {error.strerror}") from None
        fsync_dir(self._dir)


class KeptInMemory:
    """For simulations: lives as long as the simulated node's disk."""

    def __init__(self, ca: str, pair: certs.KeyPair) -> None:
        self._files = (ca, pair.cert_pem, pair.key_pem)
        self._next: str | None = None

    def read(self) -> tuple[str, str, str]:
        """See ``Keeping``."""
        return self._files

    def save(self, ca: str, certificate: str, key: str | None = None) -> None:
        """See ``Keeping``."""
        self._files = (ca, certificate, self._files[2] if key is None else key)

    def next_key(self) -> str | None:
        """See ``Keeping``."""
        return self._next

    def set_next_key(self, key: str | None) -> None:
        """See ``Keeping``."""
        self._next = key
