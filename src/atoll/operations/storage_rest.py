"""A node's daemons of a storage cluster while it is offline: stopped before, with what they have kept, and started after."""

from __future__ import annotations

from typing import Any

from atoll.deploy import registry as kinds
from atoll.jobs.context import JobContext
from atoll.model.errors import AtollError, NodeUnavailable, StorageWouldStop
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations.state import State
from atoll.operations.storages import carry_out


def cluster_of(state: State, node: Node) -> StorageCluster | None:
    """The storage cluster of the node's group, if it has been made."""
    group = state.store.get(Group, node.group)
    found = state.store.get(StorageCluster, group.storage) if group and group.storage else None
    return found if found and found.layout else None


def change_of(state: State, node: Node, offline: bool | None) -> str:
    """What setting the node offline or online means for its daemons: ``stopped``, ``joined``, or nothing."""
    if cluster_of(state, node) is None or offline is None or offline == node.offline:
        return ""
    if offline:
        return "stopped" if node.storage == "joined" else ""
    return "joined" if node.storage == "stopped" else ""


def check_answers(state: State, node: Node) -> None:
    """A node whose daemons shall be started must answer. Errors: NodeUnavailable."""
    if not state.answers(node.id):
        raise NodeUnavailable(
            f"node {node.name} does not answer, so its part of the storage cluster cannot be started", hint="atoll node list"
        )


async def follow(job: JobContext, node: str, io_may_stop: bool) -> None:
    """Stop or start the node's daemons, as what is wanted says. Errors: StorageWouldStop; those of the steps."""

    def begin() -> dict[str, Any]:
        state: State = job.state
        record = state.store.require(Node, node)
        cluster = cluster_of(state, record)
        assert cluster is not None
        tellers = kinds.planner(cluster.type).tellers(cluster.layout)
        # Others first: this one's monitor is about to stop, or has only just been started.
        able = [n for n in state.nodes_of_group(record.group) if n.name in tellers and state.answers(n.id) and n.storage == "joined"]
        able.sort(key=lambda n: n.id == node)
        teller = able[0].id if able else node
        there = {"type": cluster.type, "layout": cluster.layout, "storage": record.storage, "name": record.name}
        return {**there, "teller": teller, "answers": state.answers(node)}

    found = await job.read("storage", begin)
    planner = kinds.planner(found["type"])
    where = (found["layout"], found["name"], found["teller"])
    if found["storage"] == "stopped":
        phases = planner.wake(*where)
    elif not found["answers"]:
        # It is off already; whether its data shall be copied elsewhere is for Ceph to decide, as for any node that failed.
        return
    else:
        answer = await _may_rest(job, found, io_may_stop)
        phases = planner.rest(*where, hold=answer["known"], wait=answer["known"] and not answer["stops"])
    results: dict[str, Any] = {}
    for number, phase in enumerate(phases):
        part = 90 / len(phases)
        await carry_out(job, found["type"], phase, results, (5 + part * number, 5 + part * (number + 1)))


async def _may_rest(job: JobContext, found: dict[str, Any], io_may_stop: bool) -> dict[str, Any]:
    """``stops``: what would stop; ``known``: whether the storage cluster has said so. Errors: StorageWouldStop, unless that was allowed."""
    step = "what would stop"
    answer: dict[str, Any] = {}
    if not job.journaled(step):
        asked = kinds.planner(found["type"]).stops(found["layout"], found["name"], found["teller"])
        try:
            answer = {"known": True, **await job.ask(asked.node, f"{found['type']}.{asked.step}", asked.args, deadline=90.0)}
        except AtollError as error:
            answer = {"known": False, "stops": [f"the storage cluster gives no answer: {error.message}"]}
        if answer["stops"] and not io_may_stop:
            raise StorageWouldStop(
                f"without node {found['name']}, guests could no longer read and write: {'; '.join(answer['stops'])}",
                hint=f"if that may be: atoll node modify {found['name']} --offline yes --io-may-stop",
            )
    fixed: dict[str, Any] = await job.read(step, lambda: answer)
    return fixed
