"""The cluster's own certificate authority. Certificates say role and id in a URI, so that who speaks is known from TLS alone."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.model.errors import InvalidInput, Unauthenticated, Unreachable
from atoll.runtime.files import write_durably

Role = Literal["master", "node"]
_URI = re.compile(r"atoll://(master|node)/([A-Za-z0-9._-]+)")
#: Clocks of two nodes may differ by so much.
_SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, both PEM. The key is not shown."""

    cert_pem: str
    key_pem: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a verified certificate names. ``serial`` is lower-case hex, as ``serial()`` gives it."""

    role: Role
    id: str
    name: str
    serial: str


# --- making ---


def create_ca(cluster_name: str, days: int = 3650) -> KeyPair:
    """A new self-signed certificate authority; its key belongs on masters only (0600)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(f"Atoll CA of {cluster_name}"[:64])
    cert = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(_pem(cert), _key_pem(key))


def issue(ca: KeyPair, role: Role, id: str, name: str, addresses: Iterable[str] = (), days: int = 365) -> KeyPair:
    """A key and a certificate for a master or node. ``addresses`` are IP addresses or DNS names by which others reach it."""
    key = ec.generate_private_key(ec.SECP256R1())
    return KeyPair(_sign(ca, key.public_key(), role, id, name, addresses, days), _key_pem(key))


def make_key_and_csr(name: str, addresses: Iterable[str] = (), key_pem: str | None = None) -> tuple[str, str]:
    """A private key that never leaves this node, and the request to certify it, both PEM. ``key_pem`` keeps a key, for a renewal."""
    key = _load_key(key_pem) if key_pem else ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_common_name(name))
        .add_extension(x509.SubjectAlternativeName([_general_name(text) for text in _unique([name, *addresses])]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), csr.public_bytes(serialization.Encoding.PEM).decode()


def sign_csr(ca: KeyPair, csr_pem: str, role: Role, id: str, name: str, addresses: Iterable[str] = (), days: int = 365) -> str:
    """A certificate (PEM) for the request's key. All it says comes from the arguments: what the request asks to be called is ignored.

    Errors: InvalidInput when the request is not one, or its key is not on P-256.
    """
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        valid = csr.is_signature_valid
        key = csr.public_key()
    except ValueError as error:
        raise InvalidInput(f"this is not a certificate request: {error}", hint="atoll node join") from None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("the certificate request is not signed by a P-256 key of its own", hint="atoll node join")
    return _sign(ca, key, role, id, name, addresses, days)


def save(tls_dir: Path, ca_pem: str, cert_pem: str, key_pem: str | None = None) -> None:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` (all 0600, the directory 0700), durably. A renewal keeps the key: None."""
    tls_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if key_pem is not None:
        write_durably(tls_dir / "key.pem", key_pem)
    write_durably(tls_dir / "ca.pem", ca_pem)
    write_durably(tls_dir / "cert.pem", cert_pem)


# --- reading ---


def fingerprint(cert_pem: str) -> str:
    """sha256 of the certificate's DER form, lower-case hex; of the first one when there are several."""
    return _load(cert_pem).fingerprint(hashes.SHA256()).hex()


def serial(cert_pem: str) -> str:
    """The serial number, lower-case hex without leading zeros."""
    return f"{_load(cert_pem).serial_number:x}"


def expires(cert_pem: str) -> float:
    """When the certificate ends to be valid, in seconds since 1970."""
    # Naive, in UTC: all that old releases of cryptography have.
    return _load(cert_pem).not_valid_after.replace(tzinfo=datetime.UTC).timestamp()


def identity(peercert: Mapping[str, Any] | None) -> Identity | None:
    """Who the peer is, by ``getpeercert()`` of a verified connection. None: no certificate, or not one of a master or node."""
    if not peercert:
        return None
    uris = [value for kind, value in peercert.get("subjectAltName", ()) if kind == "URI"]
    names = [value for part in peercert.get("subject", ()) for key, value in part if key == "commonName"]
    found = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if found is None or len(names) != 1:
        return None
    return Identity(cast(Role, found[1]), found[2], names[0], f"{int(peercert['serialNumber'], 16):x}")


# --- using ---


def server_context(tls_dir: Path, optional_client: bool = False) -> ssl.SSLContext:
    """TLS for a server. Clients must show a certificate of the cluster; with ``optional_client`` they may show none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Agents talk to Atoll only. The API also serves other people's clients, and some know no TLS 1.3.
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if optional_client else ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL if optional_client else ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=tls_dir / "ca.pem")
    context.load_cert_chain(tls_dir / "cert.pem", tls_dir / "key.pem")
    return context


def client_context(tls_dir: Path, certificate: bool = True) -> ssl.SSLContext:
    """TLS for a client of the cluster's servers; shows this node's certificate unless told not to."""
    context = _verifying((tls_dir / "ca.pem").read_text())
    if certificate:
        context.load_cert_chain(tls_dir / "cert.pem", tls_dir / "key.pem")
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


# --- parts ---


def _sign(ca: KeyPair, key: ec.EllipticCurvePublicKey, role: Role, ident: str, name: str, addresses: Iterable[str], days: int) -> str:
    uri = f"atoll://{role}/{ident}"
    if not _URI.fullmatch(uri):
        raise InvalidInput(f"{uri} is not a role and an id", hint="")
    issuer, issuer_key = _load(ca.cert_pem), _load_key(ca.key_pem)
    local = ["localhost", "127.0.0.1"] if role == "master" else []
    names: list[x509.GeneralName] = [_general_name(text) for text in _unique([name, *addresses, *local])]
    cert = (
        _builder(_common_name(name), issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Older releases of QEMU ask for keyEncipherment too, although ECDHE never uses it.
        .add_extension(_usage(digital_signature=True, key_encipherment=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([*names, x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return _pem(cert)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**true: bool) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign")
    return x509.KeyUsage(**{name: true.get(name, False) for name in (*every, "crl_sign", "encipher_only", "decipher_only")})


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _unique(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _load(cert_pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(cert_pem.encode())
    except ValueError as error:
        raise InvalidInput(f"this is not a certificate: {error}", hint="") from None


def _load_key(key_pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(key_pem.encode(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _pem(cert: x509.Certificate) -> str:
    return cert.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
