"""Operation: migrate a running instance (PROTOCOLS 1).

Until the source is ordered to go on from its pause, failure and cancel undo everything: the source resumes. From that order on the
job only settles: it looks at both sides and gives the claim to whoever has the guest. The commit point is the source's ``completed``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Attention, Changes, Settled, Undo, undo_function
from atoll.model.errors import (
    UNKNOWN_OUTCOME,
    AtollError,
    GuestError,
    InvalidInput,
    MigrationFailed,
    NodeUnavailable,
    NotMobile,
    WrongState,
)
from atoll.model.objects import Claim, Instance, Migration, Node, Pool, Stored
from atoll.operations.common import PlacementView, frozen, needs_of
from atoll.operations.instance_power import instance_locks
from atoll.operations.registry import Operation, Prepared, register
from atoll.operations.requests import InstanceMigrate
from atoll.operations.running import as_primary, check_runs, connect_disks, guest_spec, note_writers, revoke_rights, start_on, sync_copies
from atoll.operations.state import State
from atoll.placement.choose import choose

#: Seconds that the settling looks at both sides before it asks a person; the guest stands still meanwhile.
SETTLE = 20.0
#: Seconds that a target may take to load what it got from a source that is gone.
ARRIVAL = 10.0
#: The step that remembers that the target's process is gone, before anything is built on it.
LOST = "the target is lost"
#: Seconds from the order to go on until ``completed``: longer than the watchdog of a migration waits, which decides first.
SWITCHOVER = 20.0


def plan_migrate(state: State, instance: Instance, wanted: str | None) -> dict[str, Any]:
    """From where to where. Errors: NotMobile, WrongState, NodeUnavailable, NoPlace."""
    source = check_runs(state, instance)
    for _, volume in state.volumes_of(instance):
        pool = state.store.require(Pool, volume.pool)
        if not state.driver(pool).mirrored:
            raise NotMobile(
                f"disk {volume.name} of {instance.name} is local to node {source.name}",
                hint=f"atoll instance move {instance.name} -n NODE copies the disks too",
            )
    target = state.store.find(Node, wanted) if wanted else None
    if target is not None and target.id == source.id:
        raise InvalidInput(f"instance {instance.name} runs on node {source.name} already", hint="name another node")
    chosen = choose(PlacementView(state), needs_of(state, instance, exclude=[source.id]), target)
    return {
        "source": source.id,
        "source_name": source.name,
        "target": chosen.id,
        "target_name": chosen.name,
        "generation": state.claim(instance.id).generation + 1,
    }


def _prepare(state: State, target: str, request: InstanceMigrate) -> Prepared:
    instance = state.store.find(Instance, target)
    plan = plan_migrate(state, instance, request.node)
    return Prepared(
        frozen(request, id=instance.id, node=plan["target"]),
        instance_locks(state, instance, plan["source"], plan["target"]),
        f"migrate instance {instance.name} from {plan['source_name']} to {plan['target_name']}",
    )


@undo_function("claim.end-migration")
def _end_migration(state: State, args: dict[str, Any]) -> Changes:
    """The target's guest was killed before this: the source holds the claim alone again."""
    claim = state.store.get(Claim, args["instance"])
    if claim is None or claim.migration is None or claim.migration.job != args["job"]:
        return Changes()
    return Changes(put=[claim.model_copy(update={"migration": None})])


async def _run(job: JobContext, request: dict[str, Any]) -> Any:
    plan = await job.read("plan", lambda: plan_migrate(job.state, job.state.store.require(Instance, request["id"]), request["node"]))
    return await migrate(job, request["id"], plan)


async def share_claim(job: JobContext, instance: str, plan: dict[str, Any]) -> None:
    """While it moves, the claim holds source, target and this job; nobody else may start the guest."""

    def share() -> Changes:
        claim: Claim = job.state.claim(instance)
        if claim.holder != plan["source"] or claim.migration is not None or claim.generation != plan["generation"] - 1:
            raise WrongState("the claim has changed; the instance does not run where it did")
        migration = Migration(target=plan["target"], job=job.id)
        return Changes(put=[claim.model_copy(update={"migration": migration, "generation": plan["generation"]})])

    await job.write("share the claim", share, Undo("claim.end-migration", {"instance": instance, "job": job.id}))


async def migrate(
    job: JobContext, instance: str, plan: dict[str, Any], *, disks: list[dict[str, Any]] | None = None, copy: list[str] | None = None
) -> dict[str, Any]:
    """Move the guest alive. ``disks``: the target's connections, if they differ from the source's; ``copy``: volumes to copy too."""
    source, target, generation = plan["source"], plan["target"], plan["generation"]
    await share_claim(job, instance, plan)
    job.progress(3, f"preparing {plan['target_name']}")
    if disks is None:
        disks = await connect_disks(job, instance, target, expect_writer=True)
    spec = await job.read("spec", lambda: guest_spec(job.state, job.state.store.require(Instance, instance), generation))
    endpoint = await job.call(
        "prepare the target",
        target,
        "guest.incoming",
        {"spec": spec, "disks": disks, "copy": copy or [], "peer": plan["source_name"]},
        undo=Undo("guest.stop", {"instance": instance, "generation": generation, "grace": 0.0}, node=target, dies=True),
        deadline=60.0,
        span=(3.0, 8.0),
    )
    await note_writers(job, instance, target)
    await job.call(
        "move the memory",
        source,
        "guest.migrate_out",
        {"instance": instance, "endpoint": endpoint, "copy": copy or []},
        undo=Undo("guest.migrate_cancel", {"instance": instance}, node=source, dies=True),
        deadline=3000.0,
        span=(8.0, 90.0),
    )
    # The guest is paused here: what is not yet equal on both sides becomes equal, and what one side holds is handed over.
    await sync_copies(job, instance, source)
    await job.commit()
    job.progress(92, "switching over")
    return await settle(job, instance, plan, bool(copy))


async def settle(job: JobContext, instance: str, plan: dict[str, Any], copied: bool, *, go_on: bool = True) -> dict[str, Any]:
    """Give the claim to whoever has the guest. ``go_on``: order the source to complete first; else only look, and cancel what has not."""
    source, target, generation = plan["source"], plan["target"], plan["generation"]
    figures: dict[str, Any] = {}
    if job.journaled("verdict"):
        verdict = ""
    elif not go_on:
        verdict = await _look(job, instance, plan)
    else:
        try:
            figures = await job.call(
                "go on to completed", source, "guest.migrate_continue", {"instance": instance}, deadline=SWITCHOVER, span=(92.0, 97.0)
            )
            verdict = "target"
        except AtollError:
            verdict = await _look(job, instance, plan)

    def decide() -> Changes:
        claim: Claim = job.state.claim(instance)
        if verdict == "target":
            claim = claim.model_copy(update={"holder": target, "migration": None})
        elif verdict == "source":
            claim = claim.model_copy(update={"migration": None})
        return Changes(put=[claim], result={"verdict": verdict, "figures": figures})

    decided = await job.write("verdict", decide)
    if decided["verdict"] == "source":
        args = {"instance": instance, "generation": generation, "grace": 0.0}
        await _call_unless_dead(job, "kill the target", target, "guest.stop", args)
        await revoke_rights(job, instance, target)
        raise Settled(MigrationFailed(f"the guest runs on at {plan['source_name']}: the migration did not complete"))
    if decided["verdict"] == "target" and await _resume_target(job, instance, plan, copied):
        args = {"instance": instance, "generation": generation - 1, "grace": 0.0}
        await _call_unless_dead(job, "clear away the source", source, "guest.stop", args)
        await revoke_rights(job, instance, source)
        await job.write("record home", lambda: Changes(put=_home(job, instance, target)))
        return {"instance": instance, "node": plan["target_name"], **decided["figures"]}
    return await _cold_start(job, instance, plan)


def _home(job: JobContext, instance: str, node: str) -> list[Stored]:
    found: Instance = job.state.store.require(Instance, instance)
    swapped = as_primary(job.state, found, node)
    update = {"home": node, **({"secondary": swapped[0].secondary} if swapped else {})}
    return [found.model_copy(update=update), *swapped]


async def _status(job: JobContext, instance: str, node: str) -> str | None:
    """The guest's state on the node; ``gone`` for a node that is proved dead; None when the node does not answer."""
    if job.state.proved_dead(node):
        return "gone"
    try:
        status = await job.ask(node, "guest.status", {"instance": instance}, deadline=5.0)
    except UNKNOWN_OUTCOME:
        return None
    return str(status["state"])


async def _look(job: JobContext, instance: str, plan: dict[str, Any]) -> str:
    """The table of PROTOCOLS 1: who has the guest now? ``source``, ``target`` or ``nobody``."""
    source, target = plan["source"], plan["target"]
    loop = asyncio.get_running_loop()
    end = loop.time() + SETTLE
    while True:
        there, here = await _status(job, instance, source), await _status(job, instance, target)
        if there == "migrated":
            return "target"
        if there in ("running", "paused"):
            # Alive and not completed, or just now: the cancel tells which, for good.
            try:
                after = await job.ask(source, "guest.migrate_cancel", {"instance": instance}, deadline=20.0)
                if after["state"] == "migrated":
                    return "target"
                if after["state"] == "running" or (after["state"] == "paused" and after["migration"] in ("cancelled", "failed")):
                    return "source"  # paused: by an error of its disks, which is not the migration's affair
            except AtollError as error:
                job.progress(None, f"cancelling at the source: {error.message}")
        if there in ("gone", "shutdown"):
            if here in ("paused", "running"):
                return "target"
            if here == "gone":
                return "nobody"
            # What has not arrived long after the source has gone will not arrive any more.
            if here == "incoming" and loop.time() >= end - SETTLE + ARRIVAL:
                return "nobody"
        if loop.time() >= end:
            names = [plan["source_name"]] if there is None else []
            names += [plan["target_name"]] if here is None and there in ("gone", "shutdown") else []
            silent = " and ".join(names) or "the guest"
            raise Attention(
                f"{silent} does not answer, so nobody knows where the guest is (source: {there or 'silent'}, target: {here or 'silent'}); "
                "the target stays paused",
                (f"atoll job resume {job.id}", *(f"atoll job resume {job.id} --node-is-dead {name}" for name in names)),
            )
        await asyncio.sleep(0.5)


async def _resume_target(job: JobContext, instance: str, plan: dict[str, Any], copied: bool) -> bool:
    """Let the loaded guest run at the target. False: its process is gone, with everything in it.

    ``copied``: from the order on, the target's disks may be newer than the source's; then whatever becomes of the guest, it is there.
    """
    if job.journaled(LOST):
        return False
    target, generation = plan["target"], plan["generation"]
    loop = asyncio.get_running_loop()
    end = loop.time() + SETTLE
    while not job.journaled("resume at the target"):
        state = await _status(job, instance, target)
        if state == "gone":
            return not await job.read(LOST, lambda: True)
        if state == "incoming":
            try:
                loaded = await job.ask(target, "guest.await_incoming", {"instance": instance, "timeout": 15.0}, deadline=20.0)
                state = loaded["state"]
            except AtollError as error:
                job.progress(None, f"waiting for the target: {error.message}")
        if state in ("paused", "running"):
            break
        if loop.time() >= end:
            raise Attention(
                f"node {plan['target_name']} has the guest, but does not answer",
                (f"atoll job resume {job.id}", f"atoll job resume {job.id} --node-is-dead {plan['target_name']}"),
            )
        await asyncio.sleep(0.5)
    try:
        await job.call("resume at the target", target, "guest.resume", {"instance": instance, "generation": generation}, deadline=30.0)
    except (GuestError, NodeUnavailable):
        if await _status(job, instance, target) != "gone":
            raise
        return copied or not await job.read(LOST, lambda: True)
    return True


async def _call_unless_dead(job: JobContext, key: str, node: str, method: str, args: dict[str, Any]) -> None:
    """An order to a node that may be dead: the proof stands for the order's effect."""
    dead = await job.read(f"{key}: dead", lambda: job.state.proved_dead(node))
    if dead:
        return
    try:
        await job.call(key, node, method, args, deadline=60.0)
    except NodeUnavailable:
        if not job.state.proved_dead(node):
            raise


async def _cold_start(job: JobContext, instance: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Both are gone: proof (a) from both nodes, then a start from the disks, where they can be reached."""
    for key, node in (("source", plan["source"]), ("target", plan["target"])):
        # A source that has handed everything over still has its process, though it never runs again: the stop ends that, too.
        args = {"instance": instance, "generation": plan["generation"], "grace": 0.0}
        await _call_unless_dead(job, f"release the {key}", node, "guest.stop", args)

    def free() -> Changes:
        claim: Claim = job.state.claim(instance)
        return Changes(put=[claim.model_copy(update={"holder": None, "migration": None})])

    await job.write("free the claim of both", free)

    def where() -> str:
        state: State = job.state
        found = state.store.require(Instance, instance)
        return choose(PlacementView(state), needs_of(state, found)).id

    node = await job.read("cold start where", where)
    await start_on(job, instance, node, suffix=" (cold)", patience=20.0, fence="all")
    name = await job.read("cold start name", lambda: job.state.store.require(Node, node).name)
    return {"instance": instance, "node": name, "cold_start": True}


register(Operation("instance.migrate", InstanceMigrate, _prepare, _run))
