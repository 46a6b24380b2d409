"""The node's certificate for migration and NBD streams, and the one peer that may use them.

QEMU reads the files when its credentials object is made, so the copies that its user can read exist for that moment only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from atoll.hypervisor.qemu.files import Account, GuestFiles
from atoll.hypervisor.qemu.qmp import Refused, Session
from atoll.model.errors import HostError
from atoll.runtime.certs import current

CREDENTIALS = "migration-tls"
PEER = "migration-peer"
_NAMES = {"ca.pem": ("ca-cert.pem",), "cert.pem": ("server-cert.pem", "client-cert.pem"), "key.pem": ("server-key.pem", "client-key.pem")}


async def offer(session: Session, files: GuestFiles, tls_dir: Path, owner: Account | None, peer: str) -> None:
    """Credentials of a server; only a certificate with the subject ``CN=<peer>`` may connect. Errors: HostError (no certificate)."""
    await _make(session, files, tls_dir, owner, "server")
    # A comma would begin a second part of a distinguished name (RFC 4514).
    await session.execute("object-add", {"qom-type": "authz-simple", "id": PEER, "identity": "CN=" + peer.replace(",", "\\,")})


async def use(session: Session, files: GuestFiles, tls_dir: Path, owner: Account | None) -> None:
    """Credentials of a client. Errors: HostError (no certificate)."""
    await _make(session, files, tls_dir, owner, "client")


async def drop(session: Session) -> None:
    """Forget credentials and peer, if there are any."""
    for name in (PEER, CREDENTIALS):
        with contextlib.suppress(Refused):
            await session.execute("object-del", {"id": name})


async def _make(session: Session, files: GuestFiles, tls_dir: Path, owner: Account | None, endpoint: Literal["server", "client"]) -> None:
    await drop(session)
    with _copies(files, tls_dir, owner) as place:
        await session.execute(
            "object-add",
            {"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": str(place), "endpoint": endpoint, "verify-peer": True},
        )


@contextlib.contextmanager
def _copies(files: GuestFiles, tls_dir: Path, owner: Account | None) -> Iterator[Path]:
    missing = [name for name in _NAMES if not (tls_dir / name).is_file()]
    if missing:
        raise HostError(
            f"this node has no certificate for migrations: {', '.join(missing)} missing in {tls_dir}",
            hint="atoll node join makes one; guests never move unencrypted",
        )
    place = files.dir / "tls"
    shutil.rmtree(place, ignore_errors=True)
    try:
        _copy(tls_dir, place, owner)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _copy(tls_dir: Path, place: Path, owner: Account | None) -> None:
    # Looked up once: a renewal may replace all three meanwhile.
    source = current(tls_dir)
    try:
        place.mkdir(mode=0o700)
        for name, copies in _NAMES.items():
            data = (source / name).read_bytes()
            for copy in copies:
                handle = os.open(place / copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
                with open(handle, "wb") as file:
                    file.write(data)
                if owner:
                    os.chown(place / copy, owner.uid, owner.gid)
        if owner:
            os.chown(place, owner.uid, owner.gid)
    except OSError as error:
        raise HostError(f"the certificate of this node cannot be used: {error}", hint=f"ls -l {tls_dir}") from None
