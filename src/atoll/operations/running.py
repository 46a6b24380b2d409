"""Starting and stopping a guest on a node, as steps of larger jobs. Claims change here and in migrate.py only (PROTOCOLS 1)."""

from __future__ import annotations

from functools import partial
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Changes, Undo, undo_function
from atoll.model.errors import DiskInUse, InUse, NodeUnavailable, NotFound, WrongState
from atoll.model.messages import GuestDisk, GuestSpec
from atoll.model.objects import Claim, Instance, Node, Pool, Volume, VolumeState
from atoll.operations.parameters import access_of
from atoll.operations.state import State
from atoll.storage.contract import Mirroring

#: What starting and stopping change of an instance's record.
WANTED = ("desired", "stopped_by", "home")
#: Seconds that a start waits for a dead client's locks to end with their lease.
PATIENCE = 20.0


def guest_spec(state: State, instance: Instance, generation: int) -> dict[str, Any]:
    """What a hypervisor is told of the guest, as JSON; the same on both sides of a migration."""
    disks = [GuestDisk(volume=volume.id, slot=disk.slot, size=volume.size, mode=disk.mode) for disk, volume in state.volumes_of(instance)]
    spec = GuestSpec(
        instance=instance.id,
        name=instance.name,
        generation=generation,
        memory=instance.memory,
        vcpus=instance.vcpus,
        pin=instance.pin,
        boot=instance.boot,
        disks=disks,
        nics=list(instance.nics),
    )
    return spec.model_dump(mode="json")


def connect_plan(state: State, instance: Instance, node: str, fence: str = "") -> list[tuple[str, list[dict[str, Any]]]]:
    """Which pool halves must be asked for the disks' connections: (node, disks) pairs. ``fence``: see ``connect_disks``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _, volume in state.volumes_of(instance):
        pool = state.store.require(Pool, volume.pool)
        owner = node if volume.node and node in (volume.node, volume.secondary) else volume.node
        worker = state.pool_node(pool, prefer=node, owner=owner)
        ref = state.ref(pool, worker).model_dump(mode="json")
        disk = {
            "ref": ref,
            "volume": volume.id,
            "logical_id": volume.logical_id,
            "size": volume.size,
            "access": access_of(state, pool, node),
        }
        found.setdefault(worker.id, []).append({**disk, **connecting(state, pool, node, fence)})
    return sorted(found.items())


def connecting(state: State, pool: Pool, node: str, fence: str) -> dict[str, Any]:
    """What else the pool half is told of a disk that shall be used on ``node``, where the storage can shut writers out."""
    return {"node": state.store.require(Node, node).name, "fence": fence} if state.driver(pool).fencing else {}


def check_connections(answer: list[dict[str, Any]], *, expect_writer: bool = False) -> None:
    """Refuse disks that are not there, or that somebody writes. Errors: NotFound, DiskInUse."""
    for found in answer:
        if found["stat"] is None:
            raise NotFound(
                f"the image of volume {found['volume']} is not on its storage", hint="atoll cluster verify; atoll instance recreate"
            )
        if found["writers"] and not expect_writer:
            who = ", ".join(writer["who"] for writer in found["writers"])
            raise DiskInUse(f"volume {found['volume']} is being written by {who}")


async def connect_disks(
    job: JobContext,
    instance: str,
    node: str,
    *,
    suffix: str = "",
    expect_writer: bool = False,
    patience: float = 0.0,
    fence: str = "",
) -> list[dict[str, Any]]:
    """The connections of all disks, for a guest on ``node``; refuses a disk that somebody writes (but for a migration's source).

    ``fence``: whom storage that can do so shuts out first: ``known``, the instance's own earlier guests, which are proved gone; or
    ``all``, whoever has them open, because the node where the guest was cannot be asked.
    Errors: DiskInUse, NotFound (an image is missing), PoolUnavailable.
    """
    plan = await job.read(
        f"disks to connect{suffix}", lambda: connect_plan(job.state, job.state.store.require(Instance, instance), node, fence)
    )
    ready = []
    for worker, disks in plan:
        await undo_rights(job, worker, disks, suffix=suffix)
        answer = await job.look(
            f"connect disks at {worker}{suffix}",
            worker,
            "disks.connect",
            {"disks": disks, "patience": patience},
            accept=partial(check_connections, expect_writer=expect_writer),
            deadline=100 + patience,
        )
        access = {disk["volume"]: disk["access"] for disk in disks}
        for found in answer:
            ready.append({"pool": found["pool"], "connection": found["connection"], "access": access[found["volume"]]})
    return ready


async def undo_rights(job: JobContext, worker: str, disks: list[dict[str, Any]], *, suffix: str = "") -> None:
    """Before a node gets rights for disks: from here on, the job's undo takes them again."""
    given = [disk for disk in disks if "node" in disk]
    if given:
        undo = Undo("disks.revoke", {"disks": given, "node": given[0]["node"]}, node=worker, dies=True)
        await job.write(f"rights for disks by {worker}{suffix}", Changes, undo)


async def note_writers(job: JobContext, instance: str, node: str, *, volume: str = "", suffix: str = "") -> None:
    """Let storage that can shut writers out remember the guest's clients (or those of one volume): once its claim has left the node, they
    are shut out by name."""

    def plan() -> list[tuple[str, list[dict[str, Any]]]]:
        state: State = job.state
        found = connect_plan(state, state.store.require(Instance, instance), node)
        return [(w, kept) for w, disks in found if (kept := [d for d in disks if "node" in d and volume in ("", d["volume"])])]

    for worker, disks in await job.read(f"disks to note{suffix}", plan):
        # Asked again until it is answered, and not journaled before: it changes nothing that an undo would take back.
        await job.look(f"note who writes at {worker}{suffix}", worker, "disks.note", {"disks": disks}, accept=lambda _: None, deadline=60.0)


async def revoke_rights(job: JobContext, instance: str, node: str, *, volume: str = "", suffix: str = "") -> None:
    """Take the rights that the node had for the instance's disks (or one volume), where storage gives nodes rights of their own. The
    guest there has ended, or has let go of the disk. What cannot be asked now takes them before the next start: it may fail."""

    def plan() -> list[tuple[str, list[dict[str, Any]]]]:
        state: State = job.state
        disks = connect_plan(state, state.store.require(Instance, instance), node)
        return [(w, kept) for w, found in disks if (kept := [d for d in found if "node" in d and volume in ("", d["volume"])])]

    name = await job.read(f"whose rights end{suffix}", lambda: job.state.store.require(Node, node).name)
    for worker, disks in await job.read(f"rights to end{suffix}", plan):
        await job.call(f"end rights at {worker}{suffix}", worker, "disks.revoke", {"disks": disks, "node": name}, deadline=60.0)


@undo_function("claim.free")
def _free_claim(state: State, args: dict[str, Any]) -> Changes:
    """Only after the agent's acknowledgement: the undo of the start, which runs before this one, brought it."""
    claim = state.store.get(Claim, args["instance"])
    if claim is None or claim.holder != args["node"] or claim.generation != args["generation"]:
        return Changes()
    return Changes(put=[claim.model_copy(update={"holder": None})])


@undo_function("instance.desired")
def _restore_desired(state: State, args: dict[str, Any]) -> Changes:
    found = state.store.get(Instance, args["instance"])
    return Changes(put=[found.model_copy(update={field: args[field] for field in WANTED})] if found else [])


def wanted(state: State, instance: str) -> dict[str, Any]:
    """What starting and stopping change of an instance, as the argument of the undo."""
    found = state.store.require(Instance, instance)
    return {"instance": instance, **{field: getattr(found, field) for field in WANTED}}


def mirrored_disks(state: State, instance: Instance) -> list[Volume]:
    """The disks of which Atoll itself keeps two copies."""
    return [
        volume
        for _, volume in state.volumes_of(instance)
        if state.driver(state.store.require(Pool, volume.pool)).mirroring is Mirroring.INTERNAL and volume.secondary
    ]


async def sync_copies(job: JobContext, instance: str, primary: str, *, suffix: str = "") -> None:
    """Syncing: only for internally mirrored disks. Brings the second copies up to the primary node's, while nothing writes them."""

    def plan() -> list[dict[str, Any]]:
        state: State = job.state
        node = state.store.require(Node, primary)
        found = []
        for volume in mirrored_disks(state, state.store.require(Instance, instance)):
            other = volume.secondary if volume.node == primary else volume.node
            ref = state.ref(state.store.require(Pool, volume.pool), node).model_dump(mode="json")
            second = state.store.require(Node, other or "").name
            found.append({"ref": ref, "logical_id": volume.logical_id, "primary": node.name, "secondary": second})
        return found

    for number, args in enumerate(await job.read(f"copies to sync{suffix}", plan)):
        await job.call(f"sync copy {number}{suffix}", primary, "volume.sync", args, deadline=3600.0)


def as_primary(state: State, instance: Instance, node: str) -> list[Volume]:
    """Its internally mirrored disks with ``node`` as the primary; the former primary becomes the secondary."""
    swapped = []
    for volume in mirrored_disks(state, instance):
        if volume.node != node:
            swapped.append(volume.model_copy(update={"node": node, "secondary": volume.node}))
    return swapped


async def take_by_hand(job: JobContext, instance: str, node: str, *, suffix: str = "") -> int:
    """The claim goes to the node although no guest starts: nothing may start elsewhere while somebody works on the disks. Its generation.

    Errors: InUse (another node holds it).
    """

    def take() -> Changes:
        claim = job.state.claim(instance)
        if claim.holder not in (None, node):
            raise InUse("its claim is held by another node", hint="atoll instance info")
        return Changes(put=[claim.model_copy(update={"holder": node, "generation": claim.generation + 1})])

    generation: int = await job.read(f"next generation{suffix}", lambda: job.state.claim(instance).generation + 1)
    undo = Undo("claim.free", {"instance": instance, "node": node, "generation": generation})
    await job.write(f"take the claim{suffix}", take, undo)
    return generation


async def activate_on(job: JobContext, instance: str, node: str, *, suffix: str = "") -> tuple[int, dict[str, str]]:
    """Take the claim and make the disks block devices of the node: the claim's generation, and volume -> path.

    Errors: InUse, DiskInUse (somebody writes one of them), NotFound, PoolUnavailable.
    """
    generation = await take_by_hand(job, instance, node, suffix=suffix)
    disks = await connect_disks(job, instance, node, suffix=suffix, fence="known")
    modes = await job.read(f"modes{suffix}", lambda: {d.volume: d.mode for d in job.state.store.require(Instance, instance).disks})
    disks = [{**disk, "mode": modes[disk["connection"]["volume"]]} for disk in disks]
    undo = Undo("disks.deactivate", {"owner": instance}, node=node, dies=True)
    args = {"owner": instance, "disks": disks, "generation": generation}
    paths = await job.call(f"activate{suffix}", node, "disks.activate", args, undo=undo)
    # A mapping writes as a guest does, and is shut out like one.
    await note_writers(job, instance, node, suffix=suffix)
    return generation, paths


async def start_on(
    job: JobContext,
    instance: str,
    node: str,
    *,
    suffix: str = "",
    patience: float = 0.0,
    span: tuple[float, float] = (60.0, 100.0),
    fence: str = "known",
) -> None:
    """Take the claim, ask the storage who writes, let the agent start the guest. The claim must be free or the node's own.
    ``fence``: as in ``connect_disks``.

    Errors: WrongState (somebody else holds the claim), DiskInUse, GuestError, PoolUnavailable.
    """

    def take() -> Changes:
        state: State = job.state
        claim = state.claim(instance)
        if claim.migration is not None or claim.holder not in (None, node):
            holder = state.store.get(Node, claim.holder or "")
            raise WrongState(f"the claim is held by node {holder.name if holder else claim.holder}")
        new = claim.model_copy(update={"holder": node, "generation": claim.generation + 1})
        return Changes(put=[new], result=new.generation)

    # The generation is fixed by a read first, so that the undo can name it before the claim is written.
    generation = await job.read(f"next generation{suffix}", lambda: job.state.claim(instance).generation + 1)
    undo = Undo("claim.free", {"instance": instance, "node": node, "generation": generation})
    await job.write(f"take the claim{suffix}", take, undo)
    await _make_primary(job, instance, node, suffix)
    disks = await connect_disks(job, instance, node, suffix=suffix, patience=patience, fence=fence)
    spec = await job.read(f"spec{suffix}", lambda: guest_spec(job.state, job.state.store.require(Instance, instance), generation))
    await job.call(
        f"start guest{suffix}",
        node,
        "guest.start",
        {"spec": spec, "disks": disks},
        undo=Undo("guest.stop", {"instance": instance, "generation": generation, "grace": 0.0}, node=node, dies=True),
        deadline=120.0,
        span=span,
    )
    await note_writers(job, instance, node, suffix=suffix)

    before = await job.read(f"desired before{suffix}", lambda: wanted(job.state, instance))

    def record() -> Changes:
        found = job.state.store.require(Instance, instance)
        return Changes(put=[found.model_copy(update={"desired": "running", "home": node, "stopped_by": ""})])

    await job.write(f"record running{suffix}", record, Undo("instance.desired", before))


async def _make_primary(job: JobContext, instance: str, node: str, suffix: str) -> None:
    """Internally mirrored disks: before the guest writes the node's copies, they are brought up if they can be, and are the primaries.

    There is no way back: from then on the other copies are the older ones.
    """

    def plan() -> str | None:
        state: State = job.state
        others = [v.node for v in mirrored_disks(state, state.store.require(Instance, instance)) if v.node != node]
        return others[0] if others else None

    other = await job.read(f"other primary{suffix}", plan)
    if other is None:
        return
    if await job.read(f"other primary answers{suffix}", lambda: job.state.answers(other)):
        await sync_copies(job, instance, other, suffix=f" before start{suffix}")

    def swap() -> Changes:
        found = job.state.store.require(Instance, instance)
        swapped = as_primary(job.state, found, node)
        return Changes(put=[found.model_copy(update={"secondary": swapped[0].secondary}), *swapped] if swapped else [])

    await job.write(f"make primary{suffix}", swap)


async def stop_on(job: JobContext, instance: str, node: str, grace: float, *, by: str = "", suffix: str = "") -> bool:
    """Stop the guest where it may be; the agent's acknowledgement frees the claim. True if it went by itself.

    Errors: Unreachable (then nothing has changed for the claim).
    """

    def want_stopped() -> Changes:
        found = job.state.store.require(Instance, instance)
        return Changes(put=[found.model_copy(update={"desired": "stopped", "stopped_by": by})], result=found.desired)

    before = await job.read(f"desired before stop{suffix}", lambda: wanted(job.state, instance))
    await job.write(f"want stopped{suffix}", want_stopped, Undo("instance.desired", before))
    generation = await job.read(f"generation to stop{suffix}", lambda: job.state.claim(instance).generation)
    answer = await job.call(
        f"stop guest{suffix}",
        node,
        "guest.stop",
        {"instance": instance, "generation": generation, "grace": grace},
        deadline=grace + 60.0,
    )
    await free_claim(job, instance, node, generation, suffix=suffix)
    await revoke_rights(job, instance, node, suffix=f" after stop{suffix}")
    await sync_copies(job, instance, node, suffix=suffix)
    return bool(answer["clean"])


async def free_claim(job: JobContext, instance: str, node: str, generation: int, *, suffix: str = "") -> None:
    """The agent has acknowledged: the claim leaves the node."""

    def free() -> Changes:
        claim = job.state.claim(instance)
        if claim.holder != node or claim.generation != generation:
            return Changes()
        return Changes(put=[claim.model_copy(update={"holder": None, "migration": None})])

    await job.write(f"free the claim{suffix}", free)


async def release_from(job: JobContext, instance: str, node: str, *, suffix: str = "") -> None:
    """Proof (a) for a guest that does not run: the agent looks, promises to refuse its generations, and the claim is free.

    Errors: InUse (it runs there), Unreachable.
    """
    generation = await job.read(f"generation to release{suffix}", lambda: job.state.claim(instance).generation)
    await job.call(f"release claim{suffix}", node, "claim.release", {"instance": instance, "generation": generation})
    await free_claim(job, instance, node, generation, suffix=suffix)


def check_runs(state: State, instance: Instance) -> Node:
    """The node that an instance runs on. Errors: WrongState when it does not run, NodeUnavailable when its node does not answer."""
    claim = state.claim(instance.id)
    if claim.holder is None or instance.desired != "running":
        raise WrongState(f"instance {instance.name} does not run", hint=f"atoll instance start {instance.name}")
    node = state.store.require(Node, claim.holder)
    if not state.health.alive(node.id):
        hint = f"atoll instance failover {instance.name} --node-is-dead, once you have made sure that it is off"
        raise NodeUnavailable(f"node {node.name}, which runs instance {instance.name}, does not answer", hint=hint)
    return node


def attached(volume: Volume, instance: str) -> Volume:
    """The volume as a disk of the instance."""
    return volume.model_copy(update={"instance": instance, "state": VolumeState.IN_USE})


def detached(volume: Volume) -> Volume:
    """The volume on its own."""
    return volume.model_copy(update={"instance": None, "state": VolumeState.AVAILABLE})
