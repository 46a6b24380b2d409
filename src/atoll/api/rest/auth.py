"""Who is asking, and whether this is allowed (PROTOCOLS 3).

- Unix socket: the kernel tells the peer's uid; root and the daemon's own user are admins.
- ``Authorization: Bearer TOKEN``: the leader knows the token's name and role.
- A certificate: that of a node, good for ``/agent/*`` and for nothing else.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import Request

from atoll.api.leader import Caller, Leader
from atoll.model.errors import Forbidden, Unauthenticated
from atoll.runtime import certs

_RANK = {"reader": 1, "operator": 2, "admin": 3}


def peer_certificate(request: Request) -> dict[str, Any] | None:
    """The verified certificate of the client, as ``ssl`` tells it; None if it has none."""
    found: dict[str, Any] | None = request.scope.get("state", {}).get("peer")
    return found


def caller(request: Request, leader: Leader) -> Caller:
    """Who asks for something under ``/v1``; it is noted for the audit log. Errors: Unauthenticated, Forbidden."""
    found = _caller(request, leader)
    note = request.scope.get("state", {}).get("audit")
    if note is not None:
        note.update(who=found.name, role=found.role)
    return found


def _caller(request: Request, leader: Leader) -> Caller:
    if peer_certificate(request):
        raise Forbidden("certificates are for agents; the REST API wants a token", hint="send Authorization: Bearer TOKEN, no certificate")
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("the Authorization header is not of the form 'Bearer TOKEN'")
        return leader.caller_of_token(token.strip())
    uid = request.scope.get("state", {}).get("uid")
    if uid is not None:
        if uid in (0, os.geteuid()):
            return Caller("root" if uid == 0 else f"uid {uid}", "admin")
        raise Forbidden(f"the user with uid {uid} may not use the master's socket", hint="run as root, or use HTTPS with a token")
    raise Unauthenticated("this request carries no token")


def require(request: Request, leader: Leader, role: str) -> Caller:
    """The caller, if its role is at least ``role``. Errors: Unauthenticated, Forbidden."""
    found = caller(request, leader)
    if _RANK.get(found.role, 0) < _RANK[role]:
        raise Forbidden(f"{found.name} has the role {found.role}; this needs {role}")
    return found


def refuse_unless_admin(found: Caller, why: str) -> None:
    """Some requests reach further than their operation's role: ``why`` says so. Errors: Forbidden."""
    if why and found.role != "admin":
        raise Forbidden(f"{found.name} has the role {found.role}, and {why}", hint="let an admin do it")


def node(request: Request, leader: Leader) -> str:
    """The id of the node whose certificate came with the request. Errors: Unauthenticated, Forbidden."""
    certificate = peer_certificate(request)
    if not certificate:
        raise Unauthenticated("this address is for agents, with their node's certificate", hint="atoll node join")
    found = certs.identity(certificate)
    if found is None or found.role != "node":
        raise Forbidden("this is not the certificate of a node", hint="atoll node join")
    return leader.node_of_serial(found.serial, found.id, found.issued)
