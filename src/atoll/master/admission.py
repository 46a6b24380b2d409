"""Who may come in: join tokens, API tokens, node certificates."""

from __future__ import annotations

from typing import Any, Literal

from atoll.api.leader import Caller, JoinAnswer
from atoll.master.authority import DAY, CertificateAuthority
from atoll.model.errors import AlreadyExists, Forbidden, InvalidInput, NodeAnswers, NotFound, TokenInvalid, Unauthenticated
from atoll.model.ids import check_name, new_id
from atoll.model.objects import Group, Node, StorageCluster, Token
from atoll.operations.state import State
from atoll.runtime import certs
from atoll.runtime.secrets import digest, matches, new_token

#: Seconds for which a join token is good.
JOIN_TOKEN_LIFE = 15 * 60.0


class Admission:
    """Signs certificates with the cluster's CA and checks tokens. ``masters`` are the URLs that nodes report to."""

    def __init__(self, authority: CertificateAuthority, masters: tuple[str, ...]) -> None:
        self.authority, self._masters = authority, masters

    async def join_token(self, state: State, name: str, group: str | None, rejoin: bool = False) -> str:
        """A token bound to the node's name; it carries the CA's fingerprint, so that the node knows whom to trust.

        ``rejoin``: the node is one of the cluster already, and has lost its certificate, or was away when the CA was changed.
        """
        check_name(name, "node name")
        secret = new_token()
        node = ""
        if rejoin:
            known = state.store.find(Node, name)
            if state.health.alive(known.id):
                raise NodeAnswers(f"node {known.name} answers: its certificate is good", hint=f"atoll node renew {known.name}")
            if group is not None:
                raise InvalidInput("a node that comes back stays in its group", hint="leave the group away")
            node, name, chosen = known.id, known.name, state.store.require(Group, known.group)
        elif state.store.by_name(Node, name) is not None:
            raise AlreadyExists(f"there is already a node named {name!r}", hint=f"atoll node info {name}; if it shall come back: --rejoin")
        else:
            chosen = state.store.find(Group, group) if group else self._only_group(state)
        now = state.clock.now()
        token = Token(
            id=digest(secret)[:32],
            purpose="join",
            digest=digest(secret),
            name=name,
            role="node",
            group=chosen.id,
            node=node,
            created=now,
            expires=now + JOIN_TOKEN_LIFE,
        )
        await state.store.write(put=[token], delete=self._expired(state))
        return f"{certs.fingerprint(self.authority.authorities[0].certificate)}.{secret}"

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
        if found.node:
            node = state.store.require(Node, found.node).model_copy(update={"address": address, "port": port, "previous_serial": ""})
        elif state.store.by_name(Node, name) is not None:
            raise AlreadyExists(f"there is already a node named {name!r}", hint=f"atoll node info {name}; if it shall come back: --rejoin")
        else:
            # In a group with a storage cluster it shall have a part in it.
            group = state.store.get(Group, found.group)
            made = state.store.get(StorageCluster, group.storage) if group and group.storage else None
            storage: Literal["", "wanted"] = "wanted" if made and made.layout else ""
            node = Node(id=new_id("node", state.rng), name=name, group=found.group, address=address, port=port, storage=storage)
        certificate = self.authority.sign(csr, node)
        node = node.model_copy(
            update={
                "certificate_serial": certs.serial(certificate),
                "certificate_issued": certs.issued(certificate),
                "certificate_expires": certs.expires(certificate),
            }
        )
        # The CA must still be the same when the node is recorded: a change of the CA lists the nodes that it has to visit.
        await state.store.write(put=[node, found.model_copy(update={"used": True})], expect=self.authority.authorities)
        return JoinAnswer(
            node=node.id,
            cluster=state.cluster.name,
            certificate=certificate,
            ca=self.authority.bundle(),
            masters=self._masters,
            hypervisor=state.cluster.hypervisor,
        )

    async def api_token(self, state: State, name: str, role: str, days: int | None = None) -> str:
        """A new API token, kept as its hash."""
        check_name(name, "token name")
        if role not in ("admin", "operator", "reader"):
            raise InvalidInput(f"there is no role {role!r}", hint="roles: admin, operator, reader")
        if self._named(state, name):
            raise AlreadyExists(f"there is already an API token named {name!r}", hint=f"atoll cluster revoke {name}")
        secret, now = new_token(), state.clock.now()
        ends = now + days * DAY if days else None
        made = Token(id=digest(secret)[:32], purpose="api", digest=digest(secret), name=name, role=role, created=now, expires=ends)
        await state.store.write(put=[made])
        return secret

    def _named(self, state: State, name: str) -> list[Token]:
        return [token for token in state.store.all(Token) if token.purpose == "api" and token.name == name]

    def api_tokens(self, state: State) -> list[dict[str, Any]]:
        """What may be shown of the API tokens, by name."""
        found = sorted((token for token in state.store.all(Token) if token.purpose == "api"), key=lambda token: token.name)
        return [{"name": t.name, "role": t.role, "created": t.created or None, "expires": t.expires} for t in found]

    async def revoke_token(self, state: State, name: str) -> None:
        """Forget every API token of this name."""
        found = self._named(state, name)
        if not found:
            raise NotFound(f"there is no API token {name!r}", hint="atoll cluster tokens")
        await state.store.write(delete=found)

    def caller_of_token(self, state: State, token: str) -> Caller:
        """Who has this API token."""
        found = state.store.get(Token, digest(token)[:32])
        if found is None or found.purpose != "api" or not matches(token, found.digest):
            raise Unauthenticated("this API token is not known")
        if found.expires is not None and found.expires < state.clock.now():
            raise Unauthenticated(
                f"the API token {found.name} has ended", hint=f"atoll cluster revoke {found.name}; atoll cluster token NAME"
            )
        return Caller(found.name, found.role)

    def node_of_serial(self, state: State, serial: str, ident: str = "", issued: float = 0.0) -> str:
        """The node with this certificate; a removed node's is refused, and so is one that was replaced.

        ``ident``, ``issued``: what the certificate itself says. One of a node of the cluster that is newer than the store knows is good:
        only the CA can have made it, and the store is a backup from before.
        """
        for node in state.store.all(Node):
            if serial in (node.certificate_serial, node.previous_serial):
                return node.id
        known = state.store.get(Node, ident)
        if known is not None and known.certificate_issued and issued > known.certificate_issued:
            return known.id
        raise Forbidden(
            "this certificate belongs to no node of the cluster, or was replaced",
            hint="atoll node token NAME --rejoin; or atoll node add NAME",
        )
