"""Operations on nodes. Evacuations are parent jobs: one child job for each instance, so that one that cannot move stops no other."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import AtollError, InUse, InvalidInput, NodeAnswers, NodeUnavailable, NotFound, WrongState
from atoll.model.objects import DeathProof, Group, Instance, JobState, Node, Pool, Volume
from atoll.operations import storage_plan
from atoll.operations.common import frozen, locks, prepare_tags, run_tags
from atoll.operations.instance_power import answers
from atoll.operations.making import declare_lost
from atoll.operations.node_let_in import let_in_again
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import NodeDeclareDead, NodeModify, NodeMove, NodeRemove, Nothing, TagsChange
from atoll.operations.state import State
from atoll.operations.storage_leave import DEADLINE as STORAGE_DEADLINE
from atoll.operations.storage_leave import check_leaves, held_by, leave
from atoll.operations.storage_options import check_node, merged
from atoll.operations.storage_rest import change_of, check_answers, cluster_of, follow

MASTER_CANDIDATE = "master-candidate"
ROLES = frozenset({"vm", "storage-controller", MASTER_CANDIDATE})


def instances_on(state: State, node: str) -> list[Instance]:
    """The instances whose claim is on the node."""
    return [i for i in state.store.all(Instance) if node in state.claim(i.id).nodes]


def _prepare_modify(state: State, target: str, request: NodeModify) -> Prepared:
    node = state.store.find(Node, target)
    if request.offline:
        users = instances_on(state, node.id)
        if users and state.health.alive(node.id):
            raise InUse(
                f"node {node.name} runs {len(users)} instances, such as {users[0].name}", hint=f"atoll node evacuate {node.name} first"
            )
    for role in request.roles or []:
        if role not in ROLES:
            raise InvalidInput(f"there is no role {role!r}", hint=f"roles: {', '.join(sorted(ROLES))}")
    check_node(node, request.storage_options)
    held = [node.resource]
    change = change_of(state, node, request.offline)
    if change:
        cluster = cluster_of(state, node)
        # One node at a time: each alone may be let go, two together may not.
        held += [cluster.resource] if cluster else []
        if change == "joined":
            check_answers(state, node)
    return Prepared(frozen(request, id=node.id), locks(exclusive=held), f"modify node {node.name}")


async def _run_modify(job: JobContext, request: dict[str, Any]) -> Any:
    storage = await job.read(
        "change of storage", lambda: change_of(job.state, job.state.store.require(Node, request["id"]), request["offline"])
    )
    if storage:
        await follow(job, request["id"], request.get("io_may_stop", False))

    def change() -> Changes:
        node = job.state.store.require(Node, request["id"])
        update = {k: request[k] for k in ("offline", "drained") if request[k] is not None}
        if request["roles"] is not None:
            update["roles"] = tuple(sorted(request["roles"]))
        if storage:
            update["storage"] = storage
        elif request["offline"] is False and node.offline and not node.storage and cluster_of(job.state, node) is not None:
            # It was put into the group while it was offline: now it joins.
            update["storage"] = "wanted"
        if request.get("storage_options", {}):
            update["storage_options"] = merged(node.storage_options, request.get("storage_options", {}))
        return Changes(put=[node.model_copy(update=update)])

    await job.commit()
    await job.write("change", change)
    return {"node": request["id"], **({"storage": storage} if storage else {})}


register(Operation("node.modify", NodeModify, _prepare_modify, _run_modify, role="admin"))


def _prepare_remove(state: State, target: str, request: NodeRemove) -> Prepared:
    node = state.store.find(Node, target)
    users = instances_on(state, node.id)
    if users:
        raise InUse(f"node {node.name} runs instance {users[0].name}", hint=f"atoll node evacuate {node.name}")
    volumes = [v for v in state.store.all(Volume) if node.id in (v.node, v.secondary)]
    if volumes:
        owner = state.store.get(Instance, volumes[0].instance or "")
        first = f"atoll instance remove {owner.name}" if owner else f"atoll volume delete {volumes[0].name}"
        lost = "" if state.health.alive(node.id) or state.disks_are_lost(node.id) else f"; if they are lost: {declare_lost(node.name)}"
        raise InUse(f"node {node.name} owns {len(volumes)} node-local volumes, such as {volumes[0].name}", hint=f"{first}{lost}")
    if node.id == state.replication.master:
        raise InUse(f"the master works on node {node.name}", hint="on a master candidate: atoll cluster master-failover")
    storage = check_leaves(state, node, [], dead=True) if request.dead else None
    if node.storage in ("joined", "stopped") and not request.dead:
        raise InUse(
            f"node {node.name} has a part in a storage cluster ({', '.join(node.storage_roles)}), and what is on it would be missed",
            hint=f"atoll node modify {node.name} --drain; if it died for good: atoll node remove {node.name} --dead",
        )
    if MASTER_CANDIDATE in node.roles:
        raise InUse(
            f"node {node.name} is a master candidate and holds the keys of a master",
            hint=f"atoll node modify {node.name} --role vm, which takes them back",
        )
    if node.holds_keys and not request.keys_are_lost:
        raise InUse(
            f"node {node.name} has not said yet that it has removed the keys of a master",
            hint=f"let it come back; if it never will: atoll node remove {node.name} --keys-are-lost",
        )
    # Its group alone, too: placement may be about to choose it for somebody who holds the group.
    held = [*held_by(state, node, storage), state.store.require(Group, node.group).resource]
    return Prepared(frozen(request, id=node.id), locks(exclusive=held), f"remove node {node.name}", STORAGE_DEADLINE if storage else None)


async def _run_remove(job: JobContext, request: dict[str, Any]) -> Any:
    def remove() -> Changes:
        state: State = job.state
        gone = [state.store.require(Node, request["id"]), state.store.get(DeathProof, request["id"])]
        return Changes(delete=[item for item in gone if item is not None])

    if request.get("dead"):
        await leave(job, request["id"], [], dead=True)
    await job.commit()
    await job.write("remove", remove)
    return {"node": request["id"]}


register(
    Operation(
        "node.remove",
        NodeRemove,
        _prepare_remove,
        _run_remove,
        role="admin",
        plan=lambda state, target, request: storage_plan.leave(state, target, request) if request.dead else {},
    )
)
register(Operation("node.tags", TagsChange, prepare_tags(Node), run_tags(Node), role="admin"))


def _prepare_dead(state: State, target: str, request: NodeDeclareDead) -> Prepared:
    node = state.store.find(Node, target)
    if state.health.alive(node.id):
        raise NodeAnswers(f"node {node.name} answers; it is not dead")
    words = " and its disks are lost" if request.disks_are_lost else ""
    return Prepared(frozen(request, id=node.id), locks(), f"record that node {node.name} is dead{words}")


async def _run_dead(job: JobContext, request: dict[str, Any]) -> Any:
    step = "record"
    if not job.journaled(step):
        await job.state.listen(request["id"])
    if not job.journaled(step) and await answers(job, request["id"]):
        raise NodeAnswers("the node answers; it is not dead")

    def record() -> Changes:
        job.state.check_silent(request["id"])
        lost = request.get("disks_are_lost", False) or job.state.disks_are_lost(request["id"])
        proof = DeathProof(id=request["id"], method="human", who="declare-dead", at=job.state.clock.now(), disks_are_lost=lost)
        return Changes(put=[proof])

    await job.write(step, record)
    return {"node": request["id"]}


register(Operation("node.declare-dead", NodeDeclareDead, _prepare_dead, _run_dead, role="admin"))


@undo_function("node.drained")
def _restore_drained(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Node, args["node"])
    return Changes(put=[found.model_copy(update={"drained": args["drained"]})] if found else [])


def _prepare_move(verb: str) -> Any:
    def prepare(state: State, target: str, request: NodeMove) -> Prepared:
        node = state.store.find(Node, target)
        alive = state.health.alive(node.id)
        if request.node_is_dead and alive:
            raise NodeAnswers(f"node {node.name} answers; it is not dead")
        if verb != "failover" and not alive:
            raise NodeUnavailable(f"node {node.name} does not answer", hint=f"atoll node failover {node.name} --node-is-dead")
        to = state.store.find(Node, request.target) if request.target else None
        if to is not None and to.id == node.id:
            raise InvalidInput("the target is the node itself", hint="name another node")
        count = len(instances_on(state, node.id))
        return Prepared(
            frozen(request, id=node.id, target=to.id if to else None),
            locks([node.resource, *([to.resource] if to else [])]),
            f"{verb} {count} instances of node {node.name}",
        )

    return prepare


def _child(state: State, verb: str, instance: Instance, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What one instance needs: migrate if it runs, else (or on a dead node) failover; node-local disks are moved."""
    mobile = all(state.driver(state.store.require(Pool, v.pool)).mirrored for _, v in state.volumes_of(instance))
    if verb == "failover" or (verb == "evacuate" and instance.desired != "running"):
        return "instance.failover", {"node": request["target"], "node_is_dead": request["node_is_dead"]}
    if not mobile and verb == "evacuate" and request["target"]:
        return "instance.move", {"node": request["target"]}
    return "instance.migrate", {"node": request["target"]}


def _run_move(verb: str) -> Any:
    async def run(job: JobContext, request: dict[str, Any]) -> Any:
        plan = await job.read("instances", lambda: [(i.id, i.name) for i in instances_on(job.state, request["id"])])
        if verb == "evacuate":

            def drain() -> Changes:
                node = job.state.store.require(Node, request["id"])
                return Changes(put=[node.model_copy(update={"drained": True})])

            was = await job.read("drained before", lambda: job.state.store.require(Node, request["id"]).drained)
            await job.write("drain", drain, Undo("node.drained", {"node": request["id"], "drained": was}))
        outcome: dict[str, str] = {}
        for number, (instance, name) in enumerate(plan):
            job.progress(100 * number / len(plan), f"{verb} {name}")
            key = f"move/{name}"
            try:
                found = job.state.store.get(Instance, instance)
                if found is None and not job.journaled(key):
                    continue
                operation, args = _child(job.state, verb, found, request) if found else ("instance.migrate", {})
                child = await job.ended(await job.child(key, operation, instance, args))
                why = (child.error or {}).get("message", child.reason)
                outcome[name] = "done" if child.state is JobState.DONE else f"{child.state}: {why}"
            except AtollError as error:
                outcome[name] = error.message
        failed = {name: why for name, why in outcome.items() if why != "done"}
        if failed:
            # Those that have moved stay where they are: going back would be another move, which nobody asked for.
            first = next(iter(failed))
            raise WrongState(f"{len(failed)} of {len(outcome)} instances did not move; {first}: {failed[first]}", hint="atoll job list")
        return {"node": request["id"], "moved": sorted(outcome)}

    return run


for _verb in ("migrate", "failover", "evacuate"):
    register(Operation(f"node.{_verb}", NodeMove, _prepare_move(_verb), _run_move(_verb), deadline=24 * 3600.0))


# --- for the master's own loops ---


def _prepare_welcome(state: State, target: str, request: Nothing) -> Prepared:
    node = state.store.find(Node, target)
    pools = [p for p in state.store.all(Pool) if node.group in p.groups]
    return Prepared({"id": node.id}, locks([p.resource for p in pools], [node.resource]), f"prepare the pools on node {node.name}")


async def _run_welcome(job: JobContext, request: dict[str, Any]) -> Any:
    """A new node prepares the pools of its group."""

    def plan() -> dict[str, Any]:
        state: State = job.state
        node = state.store.require(Node, request["id"])
        pools = [
            p
            for p in state.store.all(Pool)
            if not p.observed and node.group in p.groups and node in state.managers(state.driver(p), p.groups)
        ]
        return {"name": node.name, "pools": [(p.id, state.ref(p, node).model_dump(mode="json")) for p in pools]}

    decided = await job.read("plan", plan)
    problems = {}
    for _, ref in decided["pools"]:
        name = ref["name"]
        try:
            local = job.state.driver(job.state.store.require(Pool, ref["id"])).node_local
            status = await job.call(f"prepare/{name}", request["id"], "pool.prepare", {"ref": ref, "create": local})
            if not status["ok"]:
                problems[name] = status["reason"]
        except AtollError as error:
            problems[name] = error.message

    def ready() -> Changes:
        return Changes(put=[job.state.store.require(Node, request["id"]).model_copy(update={"ready": True})])

    await job.write("ready", ready)
    return {"node": request["id"], "problems": problems}


register(Operation("node.welcome", Nothing, _prepare_welcome, _run_welcome, public=False))


def _prepare_readmit(state: State, target: str, request: Nothing) -> Prepared:
    node = state.store.find(Node, target)
    return Prepared({"id": node.id}, locks(exclusive=[node.resource]), f"readmit node {node.name}")


async def _mapped(job: JobContext, node: str) -> set[str]:
    """The instances whose disks are mapped there for somebody. An agent one version behind maps none."""
    try:
        return set(await job.ask(node, "disks.mapped"))
    except NotFound:
        return set()


async def _run_readmit(job: JobContext, request: dict[str, Any]) -> Any:
    """A node that was proved dead is back: kill copies of guests that others may run now, let it refuse them, void the proof."""
    node = request["id"]

    def plan() -> list[tuple[str, int]]:
        state: State = job.state
        return [(i.id, state.claim(i.id).generation) for i in state.store.all(Instance) if node not in state.claim(i.id).nodes]

    running = {g["instance"] for g in await job.ask(node, "guest.list")}
    mapped = await _mapped(job, node)
    for instance, generation in await job.read("others", plan):
        # A copy that still runs here is stale: its claim left this node with a proof. Stopping it includes the promise.
        if generation:
            if await job.read(f"mapped/{instance}", partial(bool, instance in mapped)):
                # A script, or an administrator, had its disks when the node was called dead.
                await job.call(f"end scripts/{instance}", node, "os.unrun", {"instance": instance, "kill": True}, even_dead=True)
                await job.call(f"unmap/{instance}", node, "disks.deactivate", {"owner": instance}, even_dead=True)
            stale = instance in running
            stop = await job.read(f"stale/{instance}", partial(bool, stale))
            method = "guest.stop" if stop else "claim.release"
            args = {"instance": instance, "generation": generation, **({"grace": 0.0} if stop else {})}
            await job.call(f"refuse/{instance}", node, method, args, even_dead=True)
    let_in, kept = await let_in_again(job, node)

    def void() -> Changes:
        proof = job.state.store.get(DeathProof, node)
        return Changes(delete=[proof] if proof else [])

    await job.write("void the proof", void)
    return {"node": node, **({"let_in": let_in} if let_in else {}), **({"still_shut_out": kept} if kept else {})}


register(Operation("node.readmit", Nothing, _prepare_readmit, _run_readmit, public=False))


def _prepare_stale(state: State, target: str, request: Nothing) -> Prepared:
    node_name, _, instance_id = target.partition("/")
    node = state.store.find(Node, node_name)
    return Prepared(
        {"node": node.id, "instance": instance_id},
        locks([node.resource], [f"instance:{instance_id}"]),
        f"kill the stale copy of {instance_id} on node {node.name}",
    )


async def _run_stale(job: JobContext, request: dict[str, Any]) -> Any:
    """A copy on a node that is not among its claim's holders (PROTOCOLS 1)."""

    def decide() -> int | None:
        claim = job.state.claim(request["instance"])
        return None if request["node"] in claim.nodes else claim.generation

    generation = await job.read("still stale", decide)
    if generation is None:
        return {"done": "nothing"}
    args = {"instance": request["instance"], "generation": generation, "grace": 0.0}
    await job.call("kill the stale copy", request["node"], "guest.stop", args)
    return {"instance": request["instance"], "node": request["node"]}


register(Operation("node.kill-stale", Nothing, _prepare_stale, _run_stale, public=False))
