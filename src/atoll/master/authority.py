"""The cluster's certificate authority, as the master that leads has it.

The store holds it, its key sealed under the masters' key file, so it goes wherever the store goes. The files beside a master's own
certificate follow the store; they are where a store of before 0.1 finds its CA, and what restores a master whose store is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import structlog

from atoll.model.errors import HostError
from atoll.model.objects import Authority, Cluster, Node
from atoll.runtime import certs
from atoll.runtime.clock import Clock
from atoll.runtime.config import Config
from atoll.runtime.files import write_durably
from atoll.runtime.keeping import Keeping, KeptInFiles
from atoll.runtime.secrets import SecretBox
from atoll.store.cache import LeaderStore

log = structlog.get_logger()
DAY = 86400.0
#: Certificates are renewed when this part of their life is left: months before they end, so that a node may be away for weeks.
RENEW_AT = 1 / 3
_ORDER = {"current": 0, "coming": 1, "leaving": 2}


def sealed(box: SecretBox, pair: certs.KeyPair, state: str = "current", number: int = 1) -> Authority:
    """A CA as the store keeps it."""
    ident = certs.fingerprint(pair.cert_pem)[:32]
    return Authority.model_validate(
        {
            "id": ident,
            "certificate": pair.cert_pem,
            "key": box.seal(pair.key_pem.encode(), f"authority:{ident}"),
            "state": state,
            "number": number,
        }
    )


def opened(box: SecretBox, authority: Authority) -> certs.KeyPair:
    """The CA with its key. Errors: HostError when the key file is another one."""
    return certs.KeyPair(authority.certificate, box.open(authority.key, f"authority:{authority.id}").decode())


def in_order(authorities: Iterable[Authority]) -> list[Authority]:
    """The current one first, then the coming, then the leaving."""
    return sorted(authorities, key=lambda a: (_ORDER[a.state], a.number))


def due(now: float, issued: float, expires: float) -> bool:
    """Whether a certificate should be renewed now."""
    return expires > 0.0 and expires - now < RENEW_AT * max(0.0, expires - issued)


class CertificateAuthority:
    """Signs, and keeps this master's own certificate fresh. ``me``: name and address of the node where it leads.

    ``key_file``: where the CA's own key lies besides, for who takes over without a store. Use ``load`` for a real master.
    """

    def __init__(
        self, store: LeaderStore, box: SecretBox, clock: Clock, keeping: Keeping, me: tuple[str, str], key_file: Path | None = None
    ) -> None:
        self._store, self._box, self._clock, self._keeping, self._me, self._key_file = store, box, clock, keeping, me, key_file

    @classmethod
    async def load(cls, store: LeaderStore, config: Config, clock: Clock) -> CertificateAuthority:
        """Of this node's master. A store that has no CA yet gets that of the files. Errors: HostError, StoreError."""
        box = SecretBox.load_or_create(config.etc_dir / "master.key")
        key_file = config.master_tls_dir / "ca.key"
        if not store.all(Authority):
            try:
                pair = certs.KeyPair((config.master_tls_dir / "ca.pem").read_text(), key_file.read_text())
            except OSError as error:
                raise HostError(f"this master has no CA: {error}", hint=f"restore {config.etc_dir} from a backup") from None
            await store.write(put=[sealed(box, pair)])
        return cls(store, box, clock, KeptInFiles(config.master_tls_dir), (config.node, config.address), key_file)

    @property
    def authorities(self) -> list[Authority]:
        """All CAs, the current one first."""
        return in_order(self._store.all(Authority))

    def current(self) -> certs.KeyPair:
        """The CA that signs. Errors: HostError."""
        return opened(self._box, self.authorities[0])

    # --- operations.state.Signer ---

    def make(self) -> Authority:
        """See ``Signer``."""
        number = max(a.number for a in self.authorities) + 1
        name = self._store.require(Cluster, "cluster").name
        return sealed(self._box, certs.create_ca(name, now=self._clock.now(), number=number), "coming", number)

    def bundle(self, *states: str) -> str:
        """See ``Signer``."""
        return "".join(a.certificate for a in self.authorities if not states or a.state in states)

    def sign(self, csr: str, node: Node) -> str:
        """See ``Signer``."""
        return certs.sign_csr(self.current(), csr, "node", node.id, node.name, [node.address], now=self._clock.now())

    def settle(self) -> None:
        """See ``Signer``."""
        bundle = self.bundle()
        ca, mine, _ = self._keeping.read()
        if not self._good(mine):
            name, address = self._me
            node = self._store.by_name(Node, name)
            ident = node.id if node else "master"
            pair = certs.issue(self.current(), "master", ident, name, [address], now=self._clock.now())
            self._keeping.save(bundle, pair.cert_pem, pair.key_pem)
            log.info("this master has a new certificate", serial=certs.serial(pair.cert_pem))
        elif ca != bundle:
            self._keeping.save(bundle, mine)
        self._settle_key()

    def _settle_key(self) -> None:
        if self._key_file is None:
            return
        key = self.current().key_pem
        try:
            known = self._key_file.read_text() if self._key_file.exists() else ""
        except OSError as error:
            raise HostError(f"cannot read {self._key_file}: {error.strerror}") from None
        if known != key:
            write_durably(self._key_file, key)

    def _good(self, mine: str) -> bool:
        now = self._clock.now()
        return (
            certs.issued_by(mine, self.authorities[0].certificate)
            and not due(now, certs.issued(mine), certs.expires(mine))
            and certs.issued(mine) >= int(self._store.require(Cluster, "cluster").certificates_since)
        )

    def expires(self) -> float:
        """When this master's own certificate ends, in seconds since 1970. Errors: HostError."""
        return certs.expires(self._keeping.read()[1])
