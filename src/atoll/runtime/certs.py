"""The cluster's own certificate authority. Certificates say role and id in a URI, so that who speaks is known from TLS alone."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import shutil
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.model.errors import HostError, InvalidInput
from atoll.runtime.files import fsync_dir, write_durably

Role = Literal["master", "node"]
_URI = re.compile(r"atoll://(master|node)/([A-Za-z0-9._-]+)")
#: Days for which certificates of nodes and masters, and of the CA itself, are good.
DAYS, CA_DAYS = 365, 3650
#: Clocks of two nodes may differ by so much.
_SKEW = datetime.timedelta(hours=1)
FILES = ("ca.pem", "cert.pem", "key.pem")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, both PEM. The key is not shown."""

    cert_pem: str
    key_pem: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a verified certificate names. ``serial`` is lower-case hex, as ``serial()`` gives it; ``issued`` in seconds since 1970."""

    role: Role
    id: str
    name: str
    serial: str
    issued: float = 0.0


# --- making ---


def create_ca(cluster_name: str, days: int = CA_DAYS, now: float | None = None, number: int = 1) -> KeyPair:
    """A new self-signed certificate authority; its key belongs on masters only (0600).

    ``now``: seconds since 1970, default the host's clock. ``number`` tells it from the CAs before it: programs that look for an issuer by
    name alone must not take one for the other.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(f"Atoll CA{f' {number}' if number > 1 else ''} of {cluster_name}"[:64])
    cert = (
        _builder(subject, subject, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(_pem(cert), _key_pem(key))


def issue(
    ca: KeyPair, role: Role, id: str, name: str, addresses: Iterable[str] = (), days: int = DAYS, now: float | None = None
) -> KeyPair:
    """A key and a certificate for a master or node. ``addresses`` are IP addresses or DNS names by which others reach it."""
    key = ec.generate_private_key(ec.SECP256R1())
    return KeyPair(_sign(ca, key.public_key(), role, id, name, addresses, days, now), _key_pem(key))


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


def sign_csr(
    ca: KeyPair, csr_pem: str, role: Role, id: str, name: str, addresses: Iterable[str] = (), days: int = DAYS, now: float | None = None
) -> str:
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
    return _sign(ca, key, role, id, name, addresses, days, now)


def save(tls_dir: Path, ca_pem: str, cert_pem: str, key_pem: str | None = None) -> None:
    """Put ``ca.pem``, ``cert.pem`` and ``key.pem`` (all 0600, the directory 0700) in place of what is there, durably and all at once.

    The three lie in a directory of their own, to which the link ``current`` points; what was there before stays beside it once, for who
    has just looked. ``key_pem`` None keeps the key. Errors: HostError.
    """
    tls_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = current(tls_dir)
    data = dict(zip(FILES, (ca_pem, cert_pem, key_pem if key_pem is not None else (before / "key.pem").read_text()), strict=True))
    if before == tls_dir and any((tls_dir / name).is_file() for name in FILES):
        # Files of their own, as people put them there: first they become links to the same content.
        kept = {name: (tls_dir / name).read_text() for name in FILES if (tls_dir / name).is_file()}
        _generation(tls_dir, kept)
    place = _generation(tls_dir, data)
    for old in tls_dir.iterdir():
        if old.is_dir() and not old.is_symlink() and old.name.isdigit() and old.name not in (place.name, before.name):
            shutil.rmtree(old, ignore_errors=True)


def _generation(tls_dir: Path, data: Mapping[str, str]) -> Path:
    """A new directory with these files, and the links to it."""
    number = max((int(entry.name) for entry in tls_dir.iterdir() if entry.name.isdigit()), default=0) + 1
    place = tls_dir / str(number)
    place.mkdir(mode=0o700)
    for name, text in data.items():
        write_durably(place / name, text)
    _link(tls_dir / "current", str(number))
    for name in data:
        if not (tls_dir / name).is_symlink():
            _link(tls_dir / name, f"current/{name}")
    return place


def _link(path: Path, to: str) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        os.symlink(to, partial)
        partial.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from None
    fsync_dir(path.parent)


def current(tls_dir: Path) -> Path:
    """The directory whose files belong together now. Who reads several of them asks once: they may be replaced meanwhile."""
    try:
        return tls_dir / os.readlink(tls_dir / "current")
    except OSError:
        return tls_dir


# --- reading ---


def fingerprint(cert_pem: str) -> str:
    """sha256 of the certificate's DER form, lower-case hex; of the first one when there are several."""
    return _load(cert_pem).fingerprint(hashes.SHA256()).hex()


def serial(cert_pem: str) -> str:
    """The serial number, lower-case hex without leading zeros."""
    return f"{_load(cert_pem).serial_number:x}"


def owner(cert_pem: str) -> str:
    """The id of the node (or of the master's node) that the certificate names; empty for others."""
    try:
        names = _load(cert_pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    found = [_URI.fullmatch(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    return next((match[2] for match in found if match), "")


def expires(cert_pem: str) -> float:
    """When the certificate ends to be valid, in seconds since 1970."""
    # Naive, in UTC: all that old releases of cryptography have.
    return _load(cert_pem).not_valid_after.replace(tzinfo=datetime.UTC).timestamp()


def issued(cert_pem: str) -> float:
    """When the certificate was made, in seconds since 1970."""
    return _load(cert_pem).not_valid_before.replace(tzinfo=datetime.UTC).timestamp() + _SKEW.total_seconds()


def split(bundle: str) -> list[str]:
    """The certificates of a file with several."""
    return _PEM.findall(bundle)


def same_key(cert_pem: str, key_pem: str) -> bool:
    """Whether the certificate is for this private key."""
    return _load(cert_pem).public_key().public_numbers() == _load_key(key_pem).public_key().public_numbers()  # type: ignore[union-attr]


def issued_by(cert_pem: str, ca_pem: str) -> bool:
    """Whether this CA (its first certificate) signed the certificate; its dates are not looked at."""
    cert, ca = _load(cert_pem), _load(ca_pem)
    key = ca.public_key()
    if cert.issuer != ca.subject or not isinstance(key, ec.EllipticCurvePublicKey) or cert.signature_hash_algorithm is None:
        return False
    try:
        key.verify(cert.signature, cert.tbs_certificate_bytes, ec.ECDSA(cert.signature_hash_algorithm))
    except InvalidSignature:
        return False
    return True


def identity(peercert: Mapping[str, Any] | None) -> Identity | None:
    """Who the peer is, by ``getpeercert()`` of a verified connection. None: no certificate, or not one of a master or node."""
    if not peercert:
        return None
    uris = [value for kind, value in peercert.get("subjectAltName", ()) if kind == "URI"]
    names = [value for part in peercert.get("subject", ()) for key, value in part if key == "commonName"]
    found = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if found is None or len(names) != 1:
        return None
    begins = ssl.cert_time_to_seconds(peercert["notBefore"]) + _SKEW.total_seconds()
    return Identity(cast(Role, found[1]), found[2], names[0], f"{int(peercert['serialNumber'], 16):x}", begins)


# --- parts ---


def _sign(
    ca: KeyPair,
    key: ec.EllipticCurvePublicKey,
    role: Role,
    ident: str,
    name: str,
    addresses: Iterable[str],
    days: int,
    now: float | None = None,
) -> str:
    uri = f"atoll://{role}/{ident}"
    if not _URI.fullmatch(uri):
        raise InvalidInput(f"{uri} is not a role and an id", hint="")
    issuer, issuer_key = _load(ca.cert_pem), _load_key(ca.key_pem)
    local = ["localhost", "127.0.0.1"] if role == "master" else []
    names: list[x509.GeneralName] = [_general_name(text) for text in _unique([name, *addresses, *local])]
    cert = (
        _builder(_common_name(name), issuer.subject, key, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Older releases of QEMU ask for keyEncipherment too, although ECDHE never uses it.
        .add_extension(_usage(digital_signature=True, key_encipherment=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([*names, x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return _pem(cert)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, at: float | None = None
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC) if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
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
