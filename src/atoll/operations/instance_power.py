"""Operations: start, stop, reboot an instance, and what the master's own reconcile loop asks for."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import UNKNOWN_OUTCOME, InUse, NeedsProof, NodeAnswers, NodeUnavailable, NotMobile, WrongState
from atoll.model.objects import Claim, DeathProof, Instance, Node, Pool, Writers
from atoll.operations.common import PlacementView, frozen, locks, needs_of
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceReboot, InstanceStart, InstanceStop, Nothing
from atoll.operations.running import PATIENCE, check_runs, release_from, start_on, stop_on
from atoll.operations.state import State
from atoll.placement.choose import choose


def instance_locks(state: State, instance: Instance, *nodes: str | None) -> Any:
    """The locks of an operation that changes one instance: it and its volumes alone; pools, group and nodes shared."""
    volumes = [v for _, v in state.volumes_of(instance)]
    shared = [f"pool:{v.pool}" for v in volumes] + [f"group:{instance.group}"] + [f"node:{n}" for n in nodes if n]
    return locks(shared, [instance.resource, *(v.resource for v in volumes)])


def proof_of_death(state: State, instance: Instance, node: Node, node_is_dead: bool) -> None:
    """Whether a claim may leave a node that cannot be asked. Errors: NeedsProof, NodeAnswers."""
    if node_is_dead and state.health.alive(node.id):
        raise NodeAnswers(f"node {node.name} answers; it is not dead")
    if node_is_dead or state.proved_dead(node.id):
        return
    weak = [
        pool.name for _, volume in state.volumes_of(instance) if (pool := state.store.require(Pool, volume.pool)).writers is Writers.NONE
    ]
    risk = "if it still runs there, two guests will write the same disks and destroy them"
    if weak:
        risk += f" (pool {', '.join(sorted(set(weak)))} cannot even tell who writes)"
    raise NeedsProof(
        f"node {node.name} does not answer, and instance {instance.name} may run there: {risk}",
        hint=f"make sure that {node.name} is off, then: atoll instance failover {instance.name} --node-is-dead",
    )


def plan_start(
    state: State, instance: Instance, wanted: str | None, node_is_dead: bool, *, exclude: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Where it will start, and how the claim gets there: ``release`` names the node to ask, ``proof`` the one proved dead."""
    claim = state.claim(instance.id)
    if claim.migration is not None:
        raise WrongState(f"instance {instance.name} is being migrated", hint="atoll job list")
    plan: dict[str, Any] = {"release": None, "proof": None}
    target = state.store.find(Node, wanted) if wanted else None
    if claim.holder is not None:
        holder = state.store.require(Node, claim.holder)
        if not state.health.alive(holder.id):
            proof_of_death(state, instance, holder, node_is_dead)
            plan["proof"] = holder.id
            exclude = (*exclude, holder.id)
        else:
            if node_is_dead:
                raise NodeAnswers(f"node {holder.name} answers; it is not dead")
            plan["release"] = holder.id
            if target is None and holder.id not in exclude and state.usable(holder):
                target = holder
    needs = needs_of(state, instance, exclude=exclude)
    view = PlacementView(state)
    if target is not None and needs.nodes is not None and target.id not in needs.nodes:
        names = ", ".join(state.store.require(Node, n).name for n in sorted(needs.nodes))
        raise NotMobile(
            f"node {target.name} cannot reach the node-local disks of {instance.name}, which are on {names}",
            hint=f"atoll instance move {instance.name} -n {target.name} copies them",
        )
    if target is None and instance.home and instance.home not in exclude:
        home = state.store.get(Node, instance.home)
        if home is not None and state.usable(home) and (needs.nodes is None or home.id in needs.nodes):
            try:
                target = choose(view, needs, home)
            except NodeUnavailable:
                target = None
    plan["node"] = (target if target and target.id == plan["release"] else choose(view, needs, target)).id
    return plan


async def answers(job: JobContext, node: str) -> bool:
    """Ask the node itself, now."""
    try:
        await job.ask(node, "guest.list", deadline=2.0)
    except UNKNOWN_OUTCOME:
        return False
    return True


async def take_from_dead(job: JobContext, instance: str, node: str) -> None:
    """Proof (c): a human's word for this node and this moment. The claim is freed; the node is told when it comes back."""
    step = "record the proof of death"
    if not job.journaled(step):
        await job.state.listen(node)
    if not job.journaled(step) and await answers(job, node):
        raise NodeAnswers(f"node {job.state.store.require(Node, node).name} answers; it is not dead")

    def write() -> Changes:
        state: State = job.state
        state.check_silent(node)
        proof = state.store.get(DeathProof, node) or DeathProof(id=node, method="human", who="node-is-dead", at=state.clock.now())
        claim = state.claim(instance)
        put: list[Any] = [proof]
        if claim.holder == node:
            put.append(claim.model_copy(update={"holder": None, "migration": None}))
        return Changes(put=put)

    await job.write(step, write, Undo("claim.return", {"instance": instance, "node": node}))


@undo_function("claim.return")
def _return_claim(state: State, args: dict[str, Any]) -> Changes:
    """It could not start elsewhere, perhaps because the storage sees that the dead node writes: it is that node's again until a person
    tries once more. Only while the proof stands; a readmitted node has been told that it holds nothing."""
    claim = state.store.get(Claim, args["instance"])
    if claim is None or claim.holder is not None or claim.migration is not None or not state.proved_dead(args["node"]):
        return Changes()
    return Changes(put=[claim.model_copy(update={"holder": args["node"]})])


async def bring_claim(job: JobContext, instance: str, plan: dict[str, Any]) -> None:
    """Free the claim, the way the plan says."""
    if plan["proof"]:
        await take_from_dead(job, instance, plan["proof"])
    elif plan["release"]:
        await release_from(job, instance, plan["release"])


def after_proof(plan: dict[str, Any]) -> dict[str, Any]:
    """How to start where a person's word has freed the claim: the guest may still live, cut off, so that everybody is shut out."""
    return {"patience": PATIENCE, "fence": "all"} if plan["proof"] else {}


def _prepare_start(state: State, target: str, request: InstanceStart) -> Prepared:
    instance = state.store.find(Instance, target)
    if instance.desired == "running" and state.claim(instance.id).holder and not request.node_is_dead:
        holder = state.store.require(Node, state.claim(instance.id).holder or "")
        if not state.health.alive(holder.id):
            proof_of_death(state, instance, holder, False)
        report = state.health.report(holder.id)
        guest = next((g for g in report.guests if g.instance == instance.id and g.state != "gone"), None) if report else None
        if guest and guest.state == "paused":
            words = f"instance {instance.name} stands still on node {holder.name}: {guest.reason}"
            raise WrongState(words, hint=f"atoll instance resume {instance.name}")
        if guest:
            raise WrongState(f"instance {instance.name} runs on node {holder.name}", hint=f"atoll instance info {instance.name}")
    plan = plan_start(state, instance, request.node, request.node_is_dead)
    node = state.store.require(Node, plan["node"])
    return Prepared(
        frozen(request, id=instance.id, node=node.id),
        instance_locks(state, instance, node.id),
        f"start instance {instance.name} on {node.name}",
    )


async def _run_start(job: JobContext, request: dict[str, Any]) -> Any:
    def decide() -> dict[str, Any]:
        instance = job.state.store.require(Instance, request["id"])
        return plan_start(job.state, instance, request["node"], request["node_is_dead"])

    plan = await job.read("plan", decide)
    try:
        await bring_claim(job, request["id"], plan)
    except InUse as error:
        raise WrongState(f"the instance runs already: {error.message}", hint="atoll instance list") from error
    await start_on(job, request["id"], plan["node"], **after_proof(plan))
    return {"instance": request["id"], "node": plan["node"]}


register(Operation("instance.start", InstanceStart, _prepare_start, _run_start))


def _prepare_stop(state: State, target: str, request: InstanceStop) -> Prepared:
    instance = state.store.find(Instance, target)
    claim = state.claim(instance.id)
    if claim.holder is None and instance.desired == "stopped":
        raise WrongState(f"instance {instance.name} is stopped", hint=f"atoll instance start {instance.name}")
    if claim.holder is not None and not state.health.alive(claim.holder):
        name = state.store.require(Node, claim.holder).name
        raise NodeUnavailable(
            f"node {name}, which runs instance {instance.name}, does not answer; the guest may go on there", hint="atoll node list"
        )
    return Prepared(frozen(request, id=instance.id), instance_locks(state, instance, claim.holder), f"stop instance {instance.name}")


async def _run_stop(job: JobContext, request: dict[str, Any]) -> Any:
    holder = await job.read("holder", lambda: job.state.claim(request["id"]).holder)
    clean = True
    if holder:
        clean = await stop_on(job, request["id"], holder, request["timeout"], by=request.get("by", ""))
    else:

        def stopped() -> Changes:
            return Changes(put=[job.state.store.require(Instance, request["id"]).model_copy(update={"desired": "stopped"})])

        await job.write("want stopped", stopped)
    return {"instance": request["id"], "clean": clean}


register(Operation("instance.stop", InstanceStop, _prepare_stop, _run_stop))


def _prepare_reboot(state: State, target: str, request: InstanceReboot) -> Prepared:
    instance = state.store.find(Instance, target)
    node = check_runs(state, instance)
    return Prepared(
        frozen(request, id=instance.id), instance_locks(state, instance, node.id), f"reboot instance {instance.name} ({request.type})"
    )


async def _run_reboot(job: JobContext, request: dict[str, Any]) -> Any:
    node = await job.read("node", lambda: check_runs(job.state, job.state.store.require(Instance, request["id"])).id)
    if request["type"] == "full":
        await stop_on(job, request["id"], node, 120.0)
        await start_on(job, request["id"], node)
    else:
        await job.call("reboot guest", node, "guest.reboot", {"instance": request["id"], "hard": request["type"] == "hard"})
    return {"instance": request["id"]}


register(Operation("instance.reboot", InstanceReboot, _prepare_reboot, _run_reboot))


# --- for the master's reconcile loop ---


def _prepare_loop(words: str) -> Any:
    def prepare(state: State, target: str, request: Nothing) -> Prepared:
        instance = state.store.find(Instance, target)
        node = state.claim(instance.id).holder
        return Prepared({"id": instance.id, "node": node}, instance_locks(state, instance, node), f"{words} {instance.name}")

    return prepare


def _prepare_restart(state: State, target: str, request: Nothing) -> Prepared:
    """It locks the node that it starts on, as every start does: a readmission must not end in the middle (docs/adr/0009)."""
    instance = state.store.find(Instance, target)
    node = state.claim(instance.id).holder or plan_start(state, instance, None, False)["node"]
    frozen_request = {"id": instance.id, "node": node}
    return Prepared(frozen_request, instance_locks(state, instance, node), f"restart the missing guest of {instance.name}")


async def _run_restart(job: JobContext, request: dict[str, Any]) -> Any:
    """A guest is missing. On its claim's node: proof (a) from that node, then a start there. With a free claim, which an agent's
    word has freed, it starts where placement says."""

    def decide() -> dict[str, Any] | None:
        state: State = job.state
        instance = state.store.require(Instance, request["id"])
        claim = state.claim(instance.id)
        if instance.desired != "running" or claim.migration is not None:
            return None
        # A job of release 0.1.0 names no node.
        node = request.get("node") or claim.holder or plan_start(state, instance, None, False)["node"]
        if claim.holder is not None:
            return {"node": node, "release": node} if claim.holder == node else None
        return {"node": plan_start(state, instance, state.store.require(Node, node).name, False)["node"], "release": None}

    plan = await job.read("still missing", decide)
    if plan is None:
        return {"instance": request["id"], "done": "nothing"}
    if plan["release"]:
        await release_from(job, request["id"], plan["release"])
    await start_on(job, request["id"], plan["node"])
    return {"instance": request["id"], "node": plan["node"]}


register(Operation("instance.restart-missing", Nothing, _prepare_restart, _run_restart, public=False))


async def _run_powered_off(job: JobContext, request: dict[str, Any]) -> Any:
    """The guest ended itself: let go of its process and remember that it wanted to."""
    node = await job.read("holder", lambda: job.state.claim(request["id"]).holder)
    if node is None:
        return {"instance": request["id"], "done": "nothing"}
    state = "" if job.journaled("state") else (await job.ask(node, "guest.status", {"instance": request["id"]}))["state"]
    if await job.read("state", lambda: state) not in ("shutdown", "gone"):
        return {"instance": request["id"], "done": "nothing"}
    await stop_on(job, request["id"], node, 0.0, by="by the guest")
    return {"instance": request["id"], "node": node}


register(Operation("instance.powered-off", Nothing, _prepare_loop("clear away the powered-off guest of"), _run_powered_off, public=False))
