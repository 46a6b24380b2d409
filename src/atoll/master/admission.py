"""Who may come in: join tokens, API tokens, node certificates."""

from __future__ import annotations

from pathlib import Path

from atoll.api.leader import Caller, JoinAnswer
from atoll.model.errors import AlreadyExists, Forbidden, InvalidInput, TokenInvalid, Unauthenticated
from atoll.model.ids import check_name, new_id
from atoll.model.objects import Group, Node, Token
from atoll.operations.state import State
from atoll.runtime import certs
from atoll.runtime.secrets import digest, new_token

#: Seconds for which a join token is good.
JOIN_TOKEN_LIFE = 15 * 60.0


class Admission:
    """Signs certificates with the cluster's CA and checks tokens. ``masters`` are the URLs that nodes report to."""

    def __init__(self, ca: certs.KeyPair, masters: tuple[str, ...]) -> None:
        self._ca, self._masters = ca, masters

    @classmethod
    def load(cls, tls_dir: Path, masters: tuple[str, ...]) -> Admission:
        """Read the CA of this master."""
        return cls(certs.KeyPair((tls_dir / "ca.pem").read_text(), (tls_dir / "ca.key").read_text()), masters)

    async def join_token(self, state: State, name: str, group: str | None) -> str:
        """A token bound to the node's name; it carries the CA's fingerprint, so that the node knows whom to trust."""
        check_name(name, "node name")
        if state.store.by_name(Node, name) is not None:
            raise AlreadyExists(f"there is already a node named {name!r}", hint=f"atoll node info {name}")
        chosen = state.store.find(Group, group) if group else self._only_group(state)
        secret = new_token()
        token = Token(
            id=digest(secret)[:32],
            purpose="join",
            digest=digest(secret),
            name=name,
            role="node",
            group=chosen.id,
            expires=state.clock.now() + JOIN_TOKEN_LIFE,
        )
        await state.store.write(put=[token], delete=self._expired(state))
        return f"{certs.fingerprint(self._ca.cert_pem)}.{secret}"

    def _only_group(self, state: State) -> Group:
        groups = state.store.all(Group)
        if len(groups) != 1:
            raise InvalidInput("say into which group the node shall go", hint=f"groups: {', '.join(g.name for g in groups)}")
        return groups[0]

    def _expired(self, state: State) -> list[Token]:
        now = state.clock.now()
        return [t for t in state.store.all(Token) if t.purpose == "join" and (t.used or (t.expires or now) < now)]

    async def join(self, state: State, token: str, name: str, address: str, port: int, csr: str) -> JoinAnswer:
        """Check the token, sign the certificate, record the node; the token is used in the same transaction."""
        secret = token.rpartition(".")[2]
        found = state.store.get(Token, digest(secret)[:32])
        if found is None or found.purpose != "join":
            raise TokenInvalid("there is no such join token")
        if found.used:
            raise TokenInvalid("this join token was used before")
        if (found.expires or 0.0) < state.clock.now():
            raise TokenInvalid("this join token has expired")
        if found.name != name:
            raise TokenInvalid(f"this join token was made for node {found.name!r}, not {name!r}")
        if state.store.by_name(Node, name) is not None:
            raise AlreadyExists(f"there is already a node named {name!r}", hint=f"atoll node info {name}")
        ident = new_id("node", state.rng)
        certificate = certs.sign_csr(self._ca, csr, "node", ident, name, [address])
        node = Node(id=ident, name=name, group=found.group, address=address, port=port, certificate_serial=certs.serial(certificate))
        await state.store.write(put=[node, found.model_copy(update={"used": True})])
        return JoinAnswer(
            node=ident,
            cluster=state.cluster.name,
            certificate=certificate,
            ca=self._ca.cert_pem,
            masters=self._masters,
            hypervisor=state.cluster.hypervisor,
        )

    async def api_token(self, state: State, name: str, role: str) -> str:
        """A new API token, kept as its hash."""
        check_name(name, "token name")
        if role not in ("admin", "operator", "reader"):
            raise InvalidInput(f"there is no role {role!r}", hint="roles: admin, operator, reader")
        secret = new_token()
        await state.store.write(put=[Token(id=digest(secret)[:32], purpose="api", digest=digest(secret), name=name, role=role)])
        return secret

    def caller_of_token(self, state: State, token: str) -> Caller:
        """Who has this API token."""
        found = state.store.get(Token, digest(token)[:32])
        if found is None or found.purpose != "api" or found.digest != digest(token):
            raise Unauthenticated("this API token is not known")
        return Caller(found.name, found.role)

    def node_of_serial(self, state: State, serial: str) -> str:
        """The node with this certificate; a removed node's is refused."""
        for node in state.store.all(Node):
            if node.certificate_serial == serial:
                return node.id
        raise Forbidden("this certificate belongs to no node of the cluster", hint="atoll node add NAME, and join again")
