"""TLS with the cluster's certificates. Contexts follow the files: a new certificate is used by the next connection, without a restart."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from atoll.model.errors import Unauthenticated, Unreachable
from atoll.runtime.certs import FILES, current

log = structlog.get_logger()
_Stamp = tuple[object, ...]


class FreshContext(ssl.SSLContext):
    """A context for asyncio that makes each connection with the newest certificate and CA in ``tls_dir``.

    Connections that exist keep what they began with. While new files cannot be used, such as a key without its certificate, the old ones
    stay in use, and the log says so once. Made by ``fresh_server`` and ``fresh_client``.
    """

    _make: Callable[[], ssl.SSLContext]

    @classmethod
    def of(cls, protocol: int, tls_dir: Path, make: Callable[[], ssl.SSLContext]) -> FreshContext:
        """``make`` gives a context of the present files; it is called now, and again whenever they have changed."""
        made = cls(protocol)
        made._tls_dir, made._make = tls_dir, make
        made._stamp = _stamp(tls_dir)
        made._now = make()
        made.version = 1
        return made

    def refresh(self) -> int:
        """Look whether the files have changed. Gives a number that grows with each change that is in use."""
        stamp = _stamp(self._tls_dir)
        if stamp != self._stamp:
            try:
                self._now = self._make()
                self.version += 1
                log.info("a new certificate is in use", directory=str(self._tls_dir))
            except (OSError, ssl.SSLError) as error:
                log.error("the new certificate cannot be used; the old one stays in use", directory=str(self._tls_dir), error=str(error))
            self._stamp = stamp
        return self.version

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """See ``ssl``; asyncio calls it for each connection."""
        self.refresh()
        return self._now.wrap_bio(*args, **kwargs)

    _tls_dir: Path
    _stamp: _Stamp
    _now: ssl.SSLContext
    #: Grows by one with each new set of files in use.
    version: int


def _stamp(tls_dir: Path) -> _Stamp:
    """What changes when one of the files does."""
    place = str(current(tls_dir))
    found: list[object] = [place]
    for name in FILES:
        try:
            status = os.stat(f"{place}/{name}")
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def fresh_server(tls_dir: Path, optional_client: bool = False) -> FreshContext:
    """``server_context`` that follows the files."""
    return FreshContext.of(ssl.PROTOCOL_TLS_SERVER, tls_dir, lambda: server_context(tls_dir, optional_client))


def fresh_client(tls_dir: Path) -> FreshContext:
    """``client_context`` that follows the files."""
    return FreshContext.of(ssl.PROTOCOL_TLS_CLIENT, tls_dir, lambda: client_context(tls_dir))


def server_context(tls_dir: Path, optional_client: bool = False) -> ssl.SSLContext:
    """TLS for a server. Clients must show a certificate of the cluster; with ``optional_client`` they may show none."""
    place = current(tls_dir)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Agents talk to Atoll only. The API also serves other people's clients, and some know no TLS 1.3.
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if optional_client else ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL if optional_client else ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=place / "ca.pem")
    context.load_cert_chain(place / "cert.pem", place / "key.pem")
    return context


def client_context(tls_dir: Path, certificate: bool = True) -> ssl.SSLContext:
    """TLS for a client of the cluster's servers; shows this node's certificate unless told not to."""
    place = current(tls_dir)
    context = _verifying((place / "ca.pem").read_text())
    if certificate:
        context.load_cert_chain(place / "cert.pem", place / "key.pem")
    return context


async def pinned_context(host: str, port: int, fingerprint: str, deadline: float = 10.0) -> tuple[ssl.SSLContext, str]:
    """For joining: a context that verifies with the CA of this fingerprint, and that CA's certificate (PEM).

    A first connection, over which nothing is sent, only reads the server's chain. Errors: Unauthenticated when the CA is not in it;
    Unreachable.
    """
    wanted = fingerprint.replace(":", "").strip().lower()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(deadline):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                chain = _chain(writer.get_extra_info("ssl_object"))
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise Unreachable(f"{host}:{port} did not answer within {deadline:g} s", hint="check the address of the master") from None
    except (OSError, ssl.SSLError) as error:
        raise Unreachable(f"cannot connect to {host}:{port}: {error}", hint="check the address of the master") from None
    for der in chain:
        if hashlib.sha256(der).hexdigest() == wanted:
            ca_pem = ssl.DER_cert_to_PEM_cert(der)
            return _verifying(ca_pem), ca_pem
    raise Unauthenticated(
        f"the server at {host}:{port} does not belong to the cluster of this join token", hint="check the address; atoll node token NAME"
    )


def _verifying(ca_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem)
    return context


def _chain(connection: Any) -> list[bytes]:
    """The certificates that the server sent, DER."""
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    # Public only since Python 3.13; 1 is DER.
    return [cert.public_bytes(2) for cert in connection._sslobj.get_unverified_chain()]
