"""Certificates: renewing them, and changing the CA that signs them. Guests, and streams between nodes that run, notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Attention, Changes, Undo, undo_function
from atoll.model.errors import UNKNOWN_OUTCOME, NodeUnavailable, WrongState
from atoll.model.objects import Authority, JobState, Node
from atoll.operations.common import frozen, locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import ClusterRenewCertificates, NodeRenew, RotateCa
from atoll.operations.state import State
from atoll.runtime import certs

#: The lock on all that is signed: shared by renewals, alone for a change of the CA.
CERTIFICATES = "certificates:cluster"
#: Seconds for one order, and for a node to report with its new certificate before the old one is refused.
ORDER, ADOPT = 30.0, 10.0


def _silent(state: State) -> list[str]:
    """The names of nodes that should answer and do not."""
    return [n.name for n in state.store.all(Node) if not n.offline and not state.answers(n.id)]


# --- one node ---


def _prepare_renew(state: State, target: str, request: NodeRenew) -> Prepared:
    node = state.store.find(Node, target)
    if not state.answers(node.id):
        raise NodeUnavailable(f"node {node.name} does not answer", hint=f"atoll node info {node.name}")
    state.authority.bundle()
    held = [f"certificate:{node.id}"]
    return Prepared({"id": node.id}, locks([CERTIFICATES, node.resource], held), f"renew the certificate of node {node.name}")


async def _run_renew(job: JobContext, request: dict[str, Any]) -> Any:
    return await renew(job, request["id"], "", "")


async def renew(job: JobContext, node: str, suffix: str, ca: str) -> dict[str, Any]:
    """Give the node a new key and certificate. Nothing of it needs an undo: until the node uses the new one, both are accepted.

    ``suffix`` tells its steps from those of other nodes; ``ca``: what it shall trust, default all that the cluster trusts.
    """
    csr = await job.call(
        f"make a key{suffix}",
        node,
        "certificate.request",
        undo=Undo("certificate.forget", node=node, dies=True, local=True),
        deadline=ORDER,
    )

    def sign() -> Changes:
        state: State = job.state
        record = state.store.require(Node, node)
        certificate = state.authority.sign(csr, record)
        report = state.health.report(node)
        # An earlier renewal may never have come there: what the node uses stays good, not what the record says that it should.
        used = report.certificate if report and report.certificate in (record.certificate_serial, record.previous_serial) else ""
        update = {
            "previous_serial": used or record.certificate_serial,
            "certificate_serial": certs.serial(certificate),
            "certificate_issued": certs.issued(certificate),
            "certificate_expires": certs.expires(certificate),
        }
        result = {"certificate": certificate, "ca": ca or state.authority.bundle(), "expires": update["certificate_expires"]}
        return Changes(put=[record.model_copy(update=update)], result=result)

    signed = await job.write(f"sign{suffix}", sign)
    install = {"certificate": signed["certificate"], "ca": signed["ca"]}
    await job.call(f"install{suffix}", node, "certificate.install", install, deadline=ORDER)
    await _adopted(job, node, certs.serial(signed["certificate"]))

    def settle() -> Changes:
        record = job.state.store.get(Node, node)
        return Changes(put=[record.model_copy(update={"previous_serial": ""})] if record else [])

    await job.write(f"refuse the old one{suffix}", settle)
    return {"node": node, "expires": signed["expires"]}


async def _adopted(job: JobContext, node: str, serial: str) -> None:
    """Until the node reports with it, or for a while: it has it durably already, and only a report on the way would be refused."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ADOPT
    while loop.time() < end:
        report = job.state.health.report(node)
        if report is not None and report.certificate == serial:
            return
        await asyncio.sleep(0.1)


register(Operation("node.renew", NodeRenew, _prepare_renew, _run_renew, role="admin", deadline=300.0))


# --- all of them ---


def _prepare_renew_all(state: State, target: str, request: ClusterRenewCertificates) -> Prepared:
    state.authority.bundle()
    return Prepared({}, locks([CERTIFICATES], ["cluster:cluster"]), "renew the certificates of all nodes and of the master")


async def _run_renew_all(job: JobContext, request: dict[str, Any]) -> Any:
    def plan() -> dict[str, Any]:
        state: State = job.state
        nodes = [(n.id, n.name) for n in state.store.all(Node) if state.answers(n.id) and not n.offline]
        return {"nodes": nodes, "silent": [n.name for n in state.store.all(Node) if (n.id, n.name) not in nodes]}

    decided = await job.read("nodes", plan)
    since = await job.read("now", lambda: float(math.floor(job.state.clock.now())))
    await job.write("masters", lambda: Changes(put=[job.state.cluster.model_copy(update={"certificates_since": since})]))
    job.state.authority.settle()
    failed: dict[str, str] = {}
    for number, (node, name) in enumerate(decided["nodes"]):
        job.progress(100 * number / len(decided["nodes"]), f"renewing that of {name}")
        child = await job.ended(await job.child(f"renew/{name}", "node.renew", node, {}))
        if child.state is not JobState.DONE:
            failed[name] = str((child.error or {}).get("message", child.reason))
    if failed:
        first = next(iter(failed))
        raise WrongState(f"{len(failed)} nodes have no new certificate; {first}: {failed[first]}", hint=f"atoll node renew {first}")
    return {"renewed": [name for _, name in decided["nodes"]], "silent": decided["silent"]}


register(
    Operation(
        "cluster.renew-certificates", ClusterRenewCertificates, _prepare_renew_all, _run_renew_all, role="admin", deadline=24 * 3600.0
    )
)


# --- another CA ---


def _prepare_rotate(state: State, target: str, request: RotateCa) -> Prepared:
    state.authority.bundle()
    silent = _silent(state)
    if silent and not request.leave_behind:
        raise NodeUnavailable(
            f"{len(silent)} nodes do not answer, such as {silent[0]}: they would not trust the new CA, and come back only by a token",
            hint=f"bring {silent[0]} back, or: atoll cluster rotate-ca --leave-behind",
        )
    return Prepared(frozen(request), locks(exclusive=[CERTIFICATES, "cluster:cluster"]), "change the cluster's CA")


@undo_function("authority.drop-coming")
def _drop_coming(state: State, args: dict[str, Any]) -> Changes:
    return Changes(delete=[a for a in state.store.all(Authority) if a.state == "coming"])


class _Rotation:
    """One change of the CA: make it, let all trust old and new, switch, sign all anew, let all forget the old, destroy its key.

    A node that is away is left behind (if the request says so) or stops the job with a reason; past the switch it needs a person, who
    brings it back or calls it dead. What was decided about a node is journaled, so that a replay decides the same.
    """

    def __init__(self, job: JobContext, leave_behind: bool) -> None:
        self.job, self.leave_behind = job, leave_behind
        self.left: list[str] = []

    async def run(self) -> Any:
        job = self.job

        def make() -> Changes:
            signer = job.state.authority
            coming = signer.make()
            made = {"old": signer.bundle(), "new": coming.certificate}
            return Changes(put=[coming], result=made)

        made = await job.write("make a CA", make, Undo("authority.drop-coming"))
        old, new = made["old"], made["new"]
        job.state.authority.settle()
        nodes = await self.present("nodes")
        for name, node in self.each(nodes, (0, 30), "tells {} of the new CA"):
            undo = Undo("certificate.trust", {"ca": old}, node=node, dies=True, local=True)
            await self.reach(name, node, f"trust both/{name}", {"ca": old + new}, undo)
        await job.commit()
        await job.write("switch", self.switch)
        job.state.authority.settle()
        # Those that have joined meanwhile too: the old CA may have signed for them.
        nodes = await self.present("nodes to renew")
        for name, node in self.each(nodes, (30, 80), "renews the certificate of {}"):
            if not await self.gone(name, node):
                with self.or_attention(name):
                    await renew(job, node, f"/{name}", new + old)
        for name, node in self.each(nodes, (80, 100), "lets {} forget the old CA"):
            if not await self.gone(name, node):
                with self.or_attention(name):
                    await job.call(f"trust the new one/{name}", node, "certificate.trust", {"ca": new}, deadline=ORDER)
        await job.write("destroy the old CA", lambda: Changes(delete=[a for a in job.state.store.all(Authority) if a.state == "leaving"]))
        job.state.authority.settle()
        return {"fingerprint": certs.fingerprint(new), "left_behind": sorted(set(self.left))}

    def switch(self) -> Changes:
        state: State = self.job.state
        turns = {"coming": "current", "current": "leaving"}
        put = [a.model_copy(update={"state": turns[a.state]}) for a in state.store.all(Authority) if a.state in turns]
        new = next(a for a in put if a.state == "current")
        cluster = state.cluster
        update = {"ca_fingerprint": certs.fingerprint(new.certificate), "identity": state.identity}
        return Changes(put=[*put, cluster.model_copy(update=update)])

    async def present(self, key: str) -> list[tuple[str, str]]:
        """(name, id) of the nodes that take part now; the others are left behind."""

        def look() -> dict[str, Any]:
            state: State = self.job.state
            here = [n for n in state.store.all(Node) if not n.offline and n.name not in self.left]
            # Before the commit silence is decided on here; past it nobody is left behind without a person's word.
            there = [n for n in here if state.answers(n.id) or (self.job.committed and not state.proved_dead(n.id))]
            others = [n.name for n in state.store.all(Node) if n not in there]
            return {"nodes": [(n.name, n.id) for n in there], "left": others}

        found = await self.job.read(key, look)
        self.left += [name for name in found["left"] if name not in self.left]
        return [(name, node) for name, node in found["nodes"]]

    def each(self, nodes: list[tuple[str, str]], span: tuple[float, float], words: str) -> Any:
        for number, (name, node) in enumerate(nodes):
            if name not in self.left:
                self.job.progress(span[0] + (span[1] - span[0]) * number / len(nodes), words.format(name))
                yield name, node

    async def gone(self, name: str, node: str) -> bool:
        """Past the switch: whether a person has let this node go."""
        if not self.job.journaled(f"left/{name}") and (self.job.journaled(f"trust the new one/{name}") or not self.let_go(node)):
            return False
        await self.job.read(f"left/{name}", lambda: True)
        self.left.append(name)
        return True

    def let_go(self, node: str) -> bool:
        record = self.job.state.store.get(Node, node)
        return record is None or record.offline or self.job.state.proved_dead(node)

    @contextlib.contextmanager
    def or_attention(self, name: str) -> Iterator[None]:
        """A node that falls silent past the switch needs a person: it may come back, and nobody else can know whether it will."""
        try:
            yield
        except UNKNOWN_OUTCOME as error:
            raise Attention(
                f"node {name} does not answer ({error.message}); until it does, both CAs are trusted",
                (
                    f"when {name} is back: atoll job resume {self.job.id}",
                    f"or atoll node declare-dead {name}; atoll job resume {self.job.id}",
                ),
            ) from None

    async def reach(self, name: str, node: str, key: str, args: dict[str, Any], undo: Undo) -> None:
        """Before the switch: order it to trust these CAs. One that falls silent is left behind where the request allows that."""
        if self.job.journaled(f"left/{name}"):
            self.left.append(name)
            return
        try:
            await self.job.call(key, node, "certificate.trust", args, undo=undo, deadline=ORDER)
        except (*UNKNOWN_OUTCOME, NodeUnavailable):
            if not self.leave_behind:
                raise
            await self.job.read(f"left/{name}", lambda: True)
            self.left.append(name)


async def _run_rotate(job: JobContext, request: dict[str, Any]) -> Any:
    return await _Rotation(job, request["leave_behind"]).run()


register(Operation("cluster.rotate-ca", RotateCa, _prepare_rotate, _run_rotate, role="admin", deadline=24 * 3600.0))
