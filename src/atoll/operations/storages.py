"""Making a storage cluster of a group's nodes: everything is looked at first, then it is made phase by phase; a failure undoes it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any

from atoll.deploy import registry as kinds
from atoll.deploy.contract import Facts, Member, Planned, Planner, Preview
from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Order, Undo
from atoll.model.errors import AlreadyExists, AtollError, PreflightFailed, Unreachable, WrongState
from atoll.model.ids import new_id
from atoll.model.objects import Group, Node, StorageCluster
from atoll.operations.common import frozen, locks, name_lock
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.state import State
from atoll.operations.storage_options import effective, member, storage_of
from atoll.operations.storage_requests import StorageInit
from atoll.rpc.agents import Agents

#: Seconds for a node to look at itself; and by how much its clock may surely differ.
LOOK, CLOCK_DRIFT = 60.0, 0.05


def members_of(state: State, kind: str, group: Group) -> list[Member]:
    """The nodes that take part: those of the group that are not offline; and as clients all others that answer."""
    nodes = [n for n in state.store.all(Node) if not n.offline and (n.group == group.id or state.answers(n.id))]
    return [member(state, kind, group, node) for node in nodes]


def _prepare_init(state: State, target: str, request: StorageInit) -> Prepared:
    group = state.store.find(Group, target)
    planner = kinds.planner(request.type)
    name = planner.name_of(effective(state, request.type, group))
    known = state.store.get(StorageCluster, group.storage) if group.storage else None
    if known is not None and known.type != request.type:
        raise AlreadyExists(f"group {group.name} has the storage cluster {known.name} ({known.type}) already", hint="atoll storage list")
    other = next((g for g in state.store.all(Group) if g.storage and g.id != group.id and _named(state, g.storage, name)), None)
    if other is not None:
        raise AlreadyExists(
            f"group {other.name} is configured for the storage cluster {name!r} already",
            hint=f"give this one another name: atoll group modify {group.name} -S {request.type}:name=NAME",
        )
    held = [group.resource, *(node.resource for node in state.nodes_of_group(group.id)), name_lock(StorageCluster, name)]
    members = members_of(state, request.type, group)
    if any(m.inside for m in members) and (known is None or not known.layout):
        # Errors are told now, before there is a job.
        planner.layout(members, {}, nil_uuid)
    return Prepared(
        frozen(request, id=group.id, name=name), locks(exclusive=held), f"make the {request.type} cluster {name} of group {group.name}"
    )


def _named(state: State, ident: str, name: str) -> bool:
    found = state.store.get(StorageCluster, ident)
    return found is not None and found.name == name


def preview(state: State, target: str, kind: str) -> Preview:
    """What ``storage.init`` would make, in words; nobody is asked. Errors: those of ``storage.init``."""
    kinds.info(kind)
    group = state.store.find(Group, target)
    _prepare_init(state, target, StorageInit(type=kind))
    planner, members = kinds.planner(kind), members_of(state, kind, group)
    if group.storage and state.store.require(StorageCluster, group.storage).layout:
        return Preview(lines=["it is there already: nothing changes"])
    if not any(m.inside for m in members):
        return Preview(lines=["the group has no node: it is only marked, and nodes that join make the cluster"])
    return planner.preview(planner.layout(members, {}, nil_uuid))


async def _run_init(job: JobContext, request: dict[str, Any]) -> Any:
    kind, planner = request["type"], kinds.planner(request["type"])

    def begin() -> dict[str, Any]:
        state: State = job.state
        group = state.store.require(Group, request["id"])
        known = state.store.get(StorageCluster, group.storage) if group.storage else None
        if known is not None and known.layout:
            return {"there": known.id}
        return {
            "id": known.id if known else new_id("storage", state.rng),
            "created": state.clock.now(),
            "members": [m.model_dump(mode="json") for m in members_of(state, kind, group)],
            "options": effective(state, kind, group),
        }

    begun = await job.read("members", begin)
    if "there" in begun:
        return {"storage": begun["there"], "unchanged": True}
    members = [Member.model_validate(m) for m in begun["members"]]
    record = StorageCluster(
        id=begun["id"], name=request["name"], type=kind, group=request["id"], options=begun["options"], created=begun["created"]
    )
    if not any(m.inside for m in members):
        await job.commit()
        await job.write("mark", lambda: _marked(job.state, record, {}))
        return {"storage": record.id, "name": record.name, "marked": True}
    facts = await look(job, planner, kind, members, {})
    layout = await job.read("layout", lambda: planner.layout(members, facts, lambda: new_uuid(job.state)))
    context = f"storage:{record.id}"
    sealed = await job.read("keys", lambda: seal(job.state, planner.secrets(layout), context))
    secrets = json.loads(job.state.secrets.open(sealed, context))
    results: dict[str, Any] = {}
    for number, phase in enumerate(planner.make(members, layout, secrets, results)):
        await carry_out(job, kind, phase, results, (10 + 12 * number, 22 + 12 * number))
    layout = planner.finished(layout, results)
    kept = await job.read("keys that are kept", lambda: seal(job.state, planner.kept(secrets), context))
    await job.commit()
    done = record.model_copy(update={"layout": layout, "keys": kept})
    await job.write("record", lambda: _marked(job.state, done, planner.roles(layout)))
    return {"storage": record.id, "name": record.name, **planner.outcome(layout, results)}


def new_uuid(state: State) -> str:
    """A random one, from the master's own source of chance."""
    return str(uuid.UUID(int=state.rng.getrandbits(128), version=4))


def nil_uuid() -> str:
    """For a preview."""
    return str(uuid.UUID(int=0))


def opened(state: State, sealed: str, context: str) -> dict[str, str]:
    """Keys that were sealed."""
    found: dict[str, str] = json.loads(state.secrets.open(sealed, context))
    return found


def seal(state: State, secrets: Mapping[str, str], context: str) -> str:
    """Keys as the store and the journal may have them."""
    return state.secrets.seal(json.dumps(dict(secrets)).encode(), context)


def _marked(state: State, record: StorageCluster, roles: Mapping[str, list[str]]) -> Changes:
    group = state.store.require(Group, record.group).model_copy(update={"storage": record.id})
    nodes = [n for n in state.nodes_of_group(record.group) if n.name in roles]
    return Changes(put=[record, group, *(n.model_copy(update={"storage": "joined", "storage_roles": tuple(roles[n.name])}) for n in nodes)])


async def look(
    job: JobContext, planner: Planner, kind: str, members: list[Member], layout: Mapping[str, Any], *, disks: list[str] | None = None
) -> dict[str, Facts]:
    """What the nodes say of themselves; fixed once nothing stands against it. ``disks``: of the only member, which gives more.

    Errors: PreflightFailed names all problems of all nodes."""
    step = "look at the nodes"
    found: dict[str, Any] = {}
    if not job.journaled(step):
        job.progress(2, "looking at the nodes")
        names = {m.id: m.name for m in members}
        questions = planner.disk_questions(members[0], layout, disks) if disks else planner.questions(members, layout)
        answers = await asyncio.gather(*(_ask(job, kind, node, args) for node, args in questions.items()))
        problems = []
        for node, (fact, why) in zip(questions, answers, strict=True):
            problems += [f"{names[node]}: {text}" for text in [*(fact.problems if fact else []), *([why] if why else [])]]
            if fact:
                found[node] = fact.model_dump(mode="json")
        heard = {node: fact for node, (fact, _) in zip(questions, answers, strict=True) if fact}
        problems += planner.objections(members, heard)
        if problems:
            raise PreflightFailed(
                f"{len(problems)} thing{'s stand' if len(problems) > 1 else ' stands'} against it, and nothing was changed:\n- "
                + "\n- ".join(problems),
                problems=problems,
            )
    fixed = await job.read(step, lambda: found)
    return {node: Facts.model_validate(fact) for node, fact in fixed.items()}


async def _ask(job: JobContext, kind: str, node: str, args: dict[str, Any]) -> tuple[Facts | None, str]:
    """A node's facts, or why there are none; and what its clock differs by."""
    before = job.state.clock.now()
    try:
        facts = Facts.model_validate(await job.ask(node, f"{kind}.preflight", args, deadline=LOOK))
    except AtollError as error:
        return None, error.message
    late, early = facts.clock - job.state.clock.now(), before - facts.clock
    if max(late, early) > CLOCK_DRIFT:
        return facts, f"its clock differs from the master's by {max(late, early):.2f} s or more (apt-get install chrony)"
    return facts, ""


async def carry_out(job: JobContext, kind: str, phase: list[Planned], results: dict[str, Any], span: tuple[float, float]) -> None:
    """All steps of a phase at the same time."""
    texts = list(dict.fromkeys(planned.text for planned in phase if planned.text))
    job.progress(span[0], "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else ""))
    orders = []
    for planned in phase:
        undo = Undo(f"{kind}.{planned.undo}", planned.undo_args, node=planned.node, local=True, deadline=300.0) if planned.undo else None
        orders.append(Order(planned.key, planned.node, f"{kind}.{planned.step}", planned.args, undo, planned.deadline))
    for planned, result in zip(phase, await job.together(orders, span=span), strict=True):
        results[planned.key] = result


register(Operation("storage.init", StorageInit, _prepare_init, _run_init, role="admin", deadline=3600.0))


async def storage_status(state: State, agents: Agents, target: str) -> dict[str, Any]:
    """What it says of itself, asked of its nodes in turn. Errors: NotFound, WrongState (only marked); the last one's when none can tell."""
    found = storage_of(state, target)
    if not found.layout:
        raise WrongState(f"the storage cluster {found.name} is only marked: its group had no node", hint=f"atoll storage info {found.name}")
    tellers = set(kinds.planner(found.type).tellers(found.layout))
    nodes = [n for n in state.nodes_of_group(found.group) if n.name in tellers]
    last: AtollError = Unreachable(f"none of the nodes that could tell of {found.name} answers", hint="atoll node list")
    for node in sorted(nodes, key=lambda node: not state.answers(node.id)):
        try:
            said: dict[str, Any] = await agents.ask(node.id, f"{found.type}.status", {"fsid": found.layout.get("fsid", "")}, deadline=40.0)
            return {"name": found.name, "type": found.type, **said}
        except AtollError as error:
            last = error
    raise last
