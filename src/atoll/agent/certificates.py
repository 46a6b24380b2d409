"""Orders about this node's certificate. A new one is used by the next connection: nothing is restarted, and streams that run go on."""

from __future__ import annotations

from typing import Any

from atoll.agent.service import Handler
from atoll.model.errors import InvalidInput, WrongState
from atoll.rpc.contract import Report
from atoll.runtime import certs
from atoll.runtime.keeping import Keeping


class CertificateOrders:
    """Handlers of ``certificate.*``. The private key is made here and never leaves the node."""

    def __init__(self, keeping: Keeping, name: str, address: str) -> None:
        self._keeping, self._name, self._address = keeping, name, address
        self._known: tuple[str, str] | None = None
        self._facts: dict[str, Any] = {}

    def handlers(self) -> dict[str, Handler]:
        """Method -> handler."""
        return {
            "certificate.request": self.request,
            "certificate.install": self.install,
            "certificate.trust": self.trust,
            "certificate.forget": self.forget,
        }

    def facts(self) -> dict[str, Any]:
        """What the heartbeat tells: the certificate in use and whom this node trusts. Errors: HostError."""
        ca, certificate, _ = self._keeping.read()
        if self._known != (ca, certificate):
            self._facts = {
                "certificate": certs.serial(certificate),
                "certificate_issued": certs.issued(certificate),
                "certificate_expires": certs.expires(certificate),
                "trusts": tuple(certs.fingerprint(pem) for pem in certs.split(ca)),
            }
            self._known = (ca, certificate)
        return self._facts

    async def request(self, args: dict[str, Any], report: Report) -> Any:
        """Make a new key; the request to certify it (PEM)."""
        key, csr = certs.make_key_and_csr(self._name, [self._address])
        self._keeping.set_next_key(key)
        return csr

    async def install(self, args: dict[str, Any], report: Report) -> Any:
        """Use this ``certificate``, and trust ``ca``. Already so = success. Errors: WrongState (it is for a key that is not here)."""
        ca, certificate, key = self._keeping.read()
        if (ca, certificate) != (args["ca"], args["certificate"]):
            fits = [known for known in (self._keeping.next_key(), key) if known and certs.same_key(args["certificate"], known)]
            if not fits:
                raise WrongState("this certificate is for another key than the one that was made here", hint="atoll node renew NODE")
            self._keeping.save(args["ca"], args["certificate"], fits[0])
        self._keeping.set_next_key(None)

    async def trust(self, args: dict[str, Any], report: Report) -> Any:
        """Trust the CAs of this bundle (``ca``) and no others. Errors: InvalidInput when this node's own certificate is by none of them."""
        ca, certificate, _ = self._keeping.read()
        if not any(certs.issued_by(certificate, pem) for pem in certs.split(args["ca"])):
            raise InvalidInput("none of these CAs made this node's certificate", hint="atoll node renew NODE")
        if ca != args["ca"]:
            self._keeping.save(args["ca"], certificate)

    async def forget(self, args: dict[str, Any], report: Report) -> Any:
        """No certificate will come for the key that was made. Nothing there = success."""
        self._keeping.set_next_key(None)
