from __future__ import annotations

import asyncio
import hashlib
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from atoll.model.errors import InvalidInput, Unauthenticated, Unreachable
from atoll.runtime import certs, tls
from atoll.runtime.certs import Identity, KeyPair, Role

CA = certs.create_ca("lagoon")
NODE_ID = "node-0123456789abcdef0"


def tls_dir(path: Path, role: Role = "node", name: str = "node1", ca: KeyPair = CA, trust: KeyPair = CA, **more: Any) -> Path:
    pair = certs.issue(ca, role, NODE_ID, name, ["127.0.0.1"], **more)
    certs.save(path / name, trust.cert_pem, pair.cert_pem, pair.key_pem)
    return path / name


@asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[tuple[int, list[Any]]]:
    """A server that notes its peers' certificates and answers every byte."""
    peers: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer.get_extra_info("ssl_object").getpeercert())
        try:
            writer.write(await reader.read(1))
            await writer.drain()
        except OSError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], peers


async def talk(port: int, context: ssl.SSLContext, name: str | None = None) -> Any:
    """One byte there and back; the server's certificate."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        try:
            writer.write(b"x")
            if await reader.read(1) != b"x":
                raise ConnectionResetError("refused")
            return writer.get_extra_info("ssl_object").getpeercert()
        finally:
            writer.transport.abort()


# --- what certificates say ---


def test_certificates_pass_openssl(tmp_path: Path) -> None:
    for role in ("master", "node"):
        where = tls_dir(tmp_path, role, role)  # type: ignore[arg-type]
        for purpose in ("sslserver", "sslclient"):
            checked = subprocess.run(
                ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", where / "ca.pem", where / "cert.pem"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert checked.returncode == 0, checked.stderr


def test_subject_names_and_uri() -> None:
    node = x509.load_pem_x509_certificate(
        certs.issue(CA, "node", NODE_ID, "node1", ["10.0.0.1", "fd00::1", "n1.example"]).cert_pem.encode()
    )
    assert node.subject.rfc4514_string() == "CN=node1"
    names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node1", "n1.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "fd00::1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"atoll://node/{NODE_ID}"]
    master = x509.load_pem_x509_certificate(certs.issue(CA, "master", NODE_ID, "m").cert_pem.encode())
    names = master.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["m", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_times_serial_and_fingerprint(tmp_path: Path) -> None:
    cert = certs.issue(CA, "node", NODE_ID, "node1", days=30).cert_pem
    assert abs(certs.expires(cert) - time.time() - 30 * 86400) < 600
    assert certs.serial(cert) != certs.serial(certs.issue(CA, "node", NODE_ID, "node1").cert_pem)
    (tmp_path / "c").write_text(CA.cert_pem)
    told = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "c", "-noout", "-fingerprint", "-sha256"], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip().split("=")[1].replace(":", "").lower() == certs.fingerprint(CA.cert_pem)
    assert certs.fingerprint(CA.cert_pem) == hashlib.sha256(ssl.PEM_cert_to_DER_cert(CA.cert_pem)).hexdigest()


def test_keys_are_not_shown_and_files_are_private(tmp_path: Path) -> None:
    assert "PRIVATE" not in repr(CA)
    where = tls_dir(tmp_path)
    assert {path.name: path.stat().st_mode & 0o777 for path in where.iterdir()} == {
        "ca.pem": 0o600, "cert.pem": 0o600, "key.pem": 0o600, "1": 0o700, "current": 0o700,
    }  # fmt: skip
    assert where.stat().st_mode & 0o777 == 0o700


def test_a_role_or_id_that_would_change_the_uri_is_refused() -> None:
    for role, ident in (("admin", "x"), ("node", "a/../b"), ("node", ""), ("node", "a?b"), ("node", "a\n")):
        with pytest.raises(InvalidInput):
            certs.issue(CA, role, ident, "n")  # type: ignore[arg-type]
    for text in ("", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(InvalidInput):
            certs.fingerprint(text)


@pytest.mark.parametrize(
    "cert",
    [
        None,
        {},
        {"subject": ((("commonName", "n"),),), "subjectAltName": (), "serialNumber": "01"},
        {"subject": ((("commonName", "n"),),), "subjectAltName": (("URI", "https://node/x"),), "serialNumber": "01"},
        {"subject": ((("commonName", "n"),),), "subjectAltName": (("URI", "atoll://admin/x"),), "serialNumber": "01"},
        {"subject": ((("commonName", "n"),),), "subjectAltName": (("URI", "atoll://node/x/y"),), "serialNumber": "01"},
        {"subject": ((("commonName", "n"),),), "subjectAltName": (("DNS", "atoll://node/x"),), "serialNumber": "01"},
        {"subject": (), "subjectAltName": (("URI", "atoll://node/x"),), "serialNumber": "01"},
        {
            "subject": ((("commonName", "n"),),),
            "subjectAltName": (("URI", "atoll://node/x"), ("URI", "atoll://master/x")),
            "serialNumber": "01",
        },
    ],
)
def test_what_is_no_identity(cert: Any) -> None:
    assert certs.identity(cert) is None


# --- requests ---


def test_a_request_keeps_the_key_at_home_and_cannot_choose_who_it_is() -> None:
    key_pem, csr = certs.make_key_and_csr("master9", ["10.9.9.9"])
    assert "PRIVATE" not in csr
    cert = x509.load_pem_x509_certificate(certs.sign_csr(CA, csr, "node", NODE_ID, "node1", ["10.0.0.1"]).encode())
    assert cert.subject.rfc4514_string() == "CN=node1"
    assert b"9.9" not in str(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value).encode()
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert cert.public_key().public_numbers() == key.public_key().public_numbers()  # type: ignore[union-attr]
    assert certs.make_key_and_csr("node1", key_pem=key_pem)[0] == key_pem, "a renewal may keep the key"


def test_bad_requests_are_refused() -> None:
    key = rsa.generate_private_key(65537, 2048)
    other = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    good = certs.make_key_and_csr("node1")[1]
    der = bytearray(ssl.PEM_cert_to_DER_cert(good.replace("CERTIFICATE REQUEST", "CERTIFICATE")))
    der[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    for bad in ("", "x", CA.cert_pem, other.public_bytes(serialization.Encoding.PEM).decode(), forged):
        with pytest.raises(InvalidInput, match="request"):
            certs.sign_csr(CA, bad, "node", NODE_ID, "node1")


# --- connections ---


async def test_both_sides_know_each_other(tmp_path: Path) -> None:
    server, client = tls_dir(tmp_path, "master", "m"), tls_dir(tmp_path, "node", "node1")
    async with serving(tls.server_context(server)) as (port, peers):
        seen = certs.identity(await talk(port, tls.client_context(client)))
        await talk(port, tls.client_context(client), "localhost")
    shown = (server / "cert.pem").read_text()
    assert seen == Identity("master", NODE_ID, "m", certs.serial(shown), certs.issued(shown))
    shown = (client / "cert.pem").read_text()
    assert certs.identity(peers[0]) == Identity("node", NODE_ID, "node1", certs.serial(shown), certs.issued(shown))


async def test_a_server_refuses_strangers(tmp_path: Path) -> None:
    stranger_ca = certs.create_ca("lagoon")
    strict = tls.server_context(tls_dir(tmp_path, "node", "strict"))
    lax = tls.server_context(tls_dir(tmp_path, "master", "lax"), optional_client=True)
    nobody = tls.client_context(tls_dir(tmp_path, name="nobody"), certificate=False)
    stranger = tls.client_context(tls_dir(tmp_path, name="stranger", ca=stranger_ca))
    expired = tls.client_context(tls_dir(tmp_path, name="expired", days=0))
    async with serving(strict) as (port, peers):
        for context in (nobody, stranger, expired):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await talk(port, context)
        assert peers == []
    async with serving(lax) as (port, peers):
        await talk(port, nobody)
        assert [certs.identity(peer) for peer in peers] == [None]
        for context in (stranger, expired):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await talk(port, context)
        assert len(peers) == 1


async def test_a_client_refuses_strangers_and_wrong_names(tmp_path: Path) -> None:
    client = tls.client_context(tls_dir(tmp_path, name="client"))
    stranger_ca = certs.create_ca("lagoon")
    for context in (
        tls.server_context(tls_dir(tmp_path, "master", "stranger", ca=stranger_ca)),
        tls.server_context(tls_dir(tmp_path, "master", "expired", days=0)),
    ):
        async with serving(context) as (port, _):
            with pytest.raises(ssl.SSLCertVerificationError):
                await talk(port, client)
    async with serving(tls.server_context(tls_dir(tmp_path, "node", "node1"))) as (port, _):
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await talk(port, client, "node2")
        await talk(port, client, "node1")


async def test_old_tls_is_refused(tmp_path: Path) -> None:
    where = tls_dir(tmp_path, "master", "m")
    for optional, version, accepted in ((True, ssl.TLSVersion.TLSv1_2, True), (False, ssl.TLSVersion.TLSv1_2, False)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=CA.cert_pem)
        context.load_cert_chain(where / "cert.pem", where / "key.pem")
        context.maximum_version = version
        async with serving(tls.server_context(where, optional)) as (port, _):
            if accepted:
                await talk(port, context)
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await talk(port, context)


# --- joining ---


async def test_joining_by_the_fingerprint_of_the_ca(tmp_path: Path) -> None:
    context = tls.server_context(tls_dir(tmp_path, "master", "m"), optional_client=True)
    pin = certs.fingerprint(CA.cert_pem)
    async with serving(context) as (port, _):
        for written in (pin, ":".join(pin[n : n + 2] for n in range(0, 64, 2)).upper()):
            pinned, ca_pem = await tls.pinned_context("127.0.0.1", port, written)
            assert certs.fingerprint(ca_pem) == pin
            await talk(port, pinned)
        with pytest.raises(Unauthenticated, match="does not belong"):
            await tls.pinned_context("127.0.0.1", port, certs.fingerprint(certs.create_ca("other").cert_pem))


async def test_joining_is_not_fooled_by_a_copied_ca_certificate(tmp_path: Path) -> None:
    """The CA's certificate is no secret: a false master can show it, but has no certificate signed by it."""
    false_ca = certs.create_ca("lagoon")
    where = tls_dir(tmp_path, "master", "m", ca=false_ca)
    with open(where / "cert.pem", "a") as file:
        file.write(CA.cert_pem)
    async with serving(tls.server_context(where, optional_client=True)) as (port, _):
        pinned, _ = await tls.pinned_context("127.0.0.1", port, certs.fingerprint(CA.cert_pem))
        with pytest.raises(ssl.SSLCertVerificationError):
            await talk(port, pinned)


async def test_joining_what_does_not_answer(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unreachable, match=r"within 0.3 s"):
        await tls.pinned_context("127.0.0.1", port, "00", deadline=0.3)
    server.close()
    await server.wait_closed()
    with pytest.raises(Unreachable, match="cannot connect"):
        await tls.pinned_context("127.0.0.1", port, "00")


# --- QEMU ---


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-utils")
def test_qemu_accepts_them_and_admits_only_the_peer_named(tmp_path: Path) -> None:
    """QEMU checks key usages more strictly than TLS does, and authorises peers by the exact subject."""
    image, socket_path = tmp_path / "image", tmp_path / "nbd.sock"
    image.write_bytes(b"\0" * (1 << 20))
    for name in ("node1", "node2", "node3"):
        where = tls_dir(tmp_path, "node", name)
        for ours, theirs in (
            ("ca", "ca-cert"),
            ("cert", "server-cert"),
            ("key", "server-key"),
            ("cert", "client-cert"),
            ("key", "client-key"),
        ):
            (where / f"{theirs}.pem").symlink_to(f"{ours}.pem")
    server = subprocess.Popen(
        [
            "qemu-nbd", "--persistent", "--read-only", "--format=raw", f"--socket={socket_path}",
            f"--object=tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={tmp_path / 'node1'}",
            "--object=authz-simple,id=peer,identity=CN=node2", "--tls-creds=tls", "--tls-authz=peer", str(image),
        ]
    )  # fmt: skip
    try:
        end = time.monotonic() + 20
        while not socket_path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        answers = {}
        for name in ("node2", "node3"):
            answers[name] = subprocess.run(
                [
                    "qemu-img", "info", "--object", f"tls-creds-x509,id=tls,endpoint=client,dir={tmp_path / name}", "--image-opts",
                    f"driver=nbd,server.type=unix,server.path={socket_path},tls-creds=tls,tls-hostname=node1",
                ],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        assert answers["node2"].returncode == 0, answers["node2"].stderr
        assert "virtual size: 1 MiB" in answers["node2"].stdout
        assert answers["node3"].returncode != 0
    finally:
        server.kill()
        server.wait()


# --- replacing files ---


def read(where: Path) -> list[str]:
    return [(where / name).read_text() for name in certs.FILES]


def test_three_files_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [certs.issue(CA, "node", NODE_ID, "node1") for _ in range(4)]
    for name, text in zip(certs.FILES, (CA.cert_pem, pairs[0].cert_pem, pairs[0].key_pem), strict=True):
        (tmp_path / name).write_text(text)  # as a person, or an older version, put them there
    for pair in pairs[1:3]:
        certs.save(tmp_path, CA.cert_pem, pair.cert_pem, pair.key_pem)
        assert read(tmp_path) == read(certs.current(tmp_path)) == [CA.cert_pem, pair.cert_pem, pair.key_pem]
    certs.save(tmp_path, CA.cert_pem * 2, pairs[2].cert_pem)
    assert read(tmp_path) == [CA.cert_pem * 2, pairs[2].cert_pem, pairs[2].key_pem]
    assert len([path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()]) == 2
    # A crash at any write leaves files that fit.
    written: list[str] = []
    real = certs.write_durably

    def crash(path: Any, data: Any, *more: Any) -> None:
        written.append(str(path))
        if len(written) % 3 == crashing:
            raise OSError("power cut")
        real(path, data, *more)

    monkeypatch.setattr(certs, "write_durably", crash)
    crashing = 0
    for turn in (1, 2, 0):
        crashing = turn
        written.clear()
        with pytest.raises(OSError, match="power cut"):
            certs.save(tmp_path, CA.cert_pem, pairs[3].cert_pem, pairs[3].key_pem)
        assert certs.same_key(*read(tmp_path)[1:])


def test_who_signed_it() -> None:
    other = certs.create_ca("lagoon", number=2)
    pair = certs.issue(CA, "node", NODE_ID, "node1", now=1_700_000_000.0)
    assert certs.issued_by(pair.cert_pem, CA.cert_pem)
    assert not certs.issued_by(pair.cert_pem, other.cert_pem)
    assert not certs.issued_by(pair.cert_pem, certs.create_ca("lagoon").cert_pem)  # same name, another key
    assert certs.issued(pair.cert_pem) == 1_700_000_000.0
    assert certs.expires(pair.cert_pem) == 1_700_000_000.0 + certs.DAYS * 86400
    assert certs.split(CA.cert_pem + other.cert_pem) == [CA.cert_pem, other.cert_pem]


def test_whom_a_certificate_names() -> None:
    ca = certs.create_ca("test")
    assert certs.owner(certs.issue(ca, "node", "node-1", "node1").cert_pem) == "node-1"
    assert certs.owner(certs.issue(ca, "master", "node-2", "node2").cert_pem) == "node-2"
    assert certs.owner(ca.cert_pem) == ""


def test_a_machine_that_joins_another_cluster_forgets_the_first_and_one_that_rejoins_does_not(tmp_path: Path) -> None:
    from atoll.agent.join import forget_other_cluster
    from atoll.runtime.config import Config

    config = Config(etc_dir=tmp_path / "etc", state_dir=tmp_path)
    pair = certs.issue(certs.create_ca("test"), "node", "node-1", "node1")
    certs.save(config.tls_dir, pair.cert_pem, pair.cert_pem, pair.key_pem)
    (tmp_path / "agent.db").touch()
    forget_other_cluster(config, "node-1")
    assert (tmp_path / "agent.db").exists()
    forget_other_cluster(config, "node-2")
    assert not (tmp_path / "agent.db").exists()
