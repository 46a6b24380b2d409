"""Joining a cluster: check whose cluster it is, ask for a certificate, write this node's configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from atoll.agent.hostsetup import settle_in
from atoll.model.errors import AtollError, InvalidInput, TokenInvalid, Unreachable, all_errors
from atoll.runtime import certs, tls
from atoll.runtime.config import Config, dump, load
from atoll.runtime.files import write_durably
from atoll.runtime.masters import forget_masters


def configured(path: Path, overrides: dict[str, str], **fields: Any) -> Config:
    """The configuration in the file, if there is one, with these fields and overrides. Errors: InvalidInput."""
    present = load(path).model_dump(mode="json") if path.exists() else {}
    for key in overrides:
        if key not in Config.model_fields:
            raise InvalidInput(f"there is no setting {key!r}", hint=f"settings: {', '.join(Config.model_fields)}")
    try:
        return Config(**{**present, **fields, **overrides})
    except ValueError as error:
        raise InvalidInput(f"the settings do not fit: {error}") from None


def join(master_url: str, name: str, address: str, token: str, config: Path, overrides: dict[str, str]) -> list[str]:
    """Join the cluster of the master at ``master_url`` (https://HOST:PORT). The token tells whose certificate to trust.

    Gives what was done on this host, for people.

    Errors: TokenInvalid, AlreadyExists, Unauthenticated (another cluster's master), Unreachable, InvalidInput.
    """
    settings = configured(config, overrides, node=name, address=address)
    where = urlsplit(master_url)
    if where.scheme != "https" or not where.hostname:
        raise InvalidInput(f"{master_url!r} is not the address of a master", hint="https://HOST:7770")
    fingerprint, _, secret = token.strip().partition(".")
    if not secret:
        raise TokenInvalid("this is not a join token")
    key, csr = certs.make_key_and_csr(name, [address])
    body = {"token": token.strip(), "name": name, "address": address, "port": settings.agent_port, "csr": csr}
    answer, ca = asyncio.run(_ask(where.hostname, where.port or 7770, fingerprint, body))
    forget_other_cluster(settings, answer["node"])
    certs.save(settings.tls_dir, ca, answer["certificate"], key)
    # Whom it followed in the cluster that it was in before.
    forget_masters(settings.state_dir)
    masters = tuple(answer["masters"]) or (master_url,)
    final = settings.model_copy(update={"masters": masters, "hypervisor": answer["hypervisor"]})
    config.parent.mkdir(parents=True, exist_ok=True)
    write_durably(config, dump(final), 0o644)
    return settle_in(final, config, ("agent",))


def forget_other_cluster(config: Config, node: str) -> None:
    """Terms and jobs that this machine remembers of another cluster would make it refuse this one's master, or tell it that it was deposed.
    What it has promised as this very node (``node``: its id), it goes on to keep."""
    known = config.tls_dir / "cert.pem"
    if known.exists() and certs.owner(known.read_text()) == node:
        return
    for name in ("agent.db", "agent.db-wal", "agent.db-shm"):
        (config.state_dir / name).unlink(missing_ok=True)


async def _ask(host: str, port: int, fingerprint: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    context, ca = await tls.pinned_context(host, port, fingerprint)
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}/agent/v1/join"
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
            session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=20)) as answer,
        ):
            data = await answer.json(content_type=None)
            if answer.status >= 400:
                raise _error(data)
            return data, ca
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unreachable(f"the master at {host}:{port} did not answer: {error or type(error).__name__}") from None


def _error(problem: dict[str, Any]) -> AtollError:
    cls = {c.code: c for c in all_errors()}.get(problem.get("code", ""), AtollError)
    return cls(problem.get("detail", "the master refused"), hint=problem.get("hint"))
