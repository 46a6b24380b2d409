"""The target's side of a live migration: listen, load, and run when told to."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path

from atoll.hypervisor.qemu import migrate, mirror, tls
from atoll.hypervisor.qemu.files import Account, GuestFiles
from atoll.hypervisor.qemu.qmp import Refused, Session
from atoll.hypervisor.qemu.tuning import Tuning
from atoll.model.errors import GuestError
from atoll.model.messages import Endpoint

#: A port found free may be taken by somebody else before QEMU has it.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Target:
    """A guest that waits for its memory."""

    session: Session
    files: GuestFiles
    tls_dir: Path
    owner: Account | None
    tuning: Tuning
    node: str
    address: str


async def listen(target: Target, copy: list[str], peer: str) -> Endpoint:
    """Let the peer, and nobody else, send memory and disks. The endpoint is kept, for a repeated call. Errors: GuestError, HostError."""
    session = target.session
    await tls.offer(session, target.files, target.tls_dir, target.owner, peer)
    await session.execute("migrate-set-capabilities", migrate.capabilities(migrate.INCOMING_CAPABILITIES))
    await session.execute("migrate-set-parameters", {"tls-creds": tls.CREDENTIALS, "tls-authz": tls.PEER})
    nbd_port = await _bind(target, copy) if copy else None
    for attempt in range(1, _ATTEMPTS + 1):
        port = _free_port(target.address)
        try:
            await session.execute("migrate-incoming", {"uri": migrate.uri(target.address, port)})
            break
        except Refused as error:
            if attempt == _ATTEMPTS or "in use" not in str(error):
                raise GuestError(f"guest {target.files.guest} cannot listen for its migration: {error}") from None
    endpoint = Endpoint(node=target.node, host=target.address, port=port, nbd_port=nbd_port, tls=True)
    target.files.save("endpoint", endpoint.model_dump(mode="json"))
    return endpoint


async def _bind(target: Target, copy: list[str]) -> int:
    for attempt in range(1, _ATTEMPTS + 1):
        port = _free_port(target.address)
        try:
            await mirror.serve(target.session, target.address, port, copy, target.tuning)
            return port
        except Refused as error:
            if attempt == _ATTEMPTS or "in use" not in str(error):
                raise GuestError(f"guest {target.files.guest} cannot listen for its disks: {error}") from None
    raise AssertionError("the last attempt returns or raises")


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


async def loaded(session: Session, limit: float) -> None:
    """Wait until the guest is no longer incoming, at most ``limit`` seconds. Raises Closed when loading has failed."""
    loop = asyncio.get_running_loop()
    end = loop.time() + limit
    with session.events("MIGRATION") as events:
        while (await session.execute("query-status"))["status"] == "inmigrate" and (left := end - loop.time()) > 0:
            await events.next(min(left, 0.25))


async def let_run(session: Session, tuning: Tuning) -> None:
    """End the exports of its disks, and let it run: only now its disks are opened for writing. Raises Refused."""
    await mirror.unserve(session, tuning)
    await tls.drop(session)
    await session.execute("cont", limit=tuning.disk_command)
