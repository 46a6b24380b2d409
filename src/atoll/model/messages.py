"""What masters and agents say to each other, and what drivers hand to hypervisors. Data only; secrets are references."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from atoll.model.objects import Boot, MachinePin, Nic

#: The number of the conversation between masters and agents. It grows with each release that adds orders or changes what one means.
PROTOCOL = 2


def compatible(protocol: int) -> bool:
    """Whether this version can work with a master or agent of that protocol: one step of difference is allowed, for rolling upgrades."""
    return abs(protocol - PROTOCOL) <= 1


class Wire(BaseModel):
    """A message. Unknown fields are ignored, so that an agent one version behind still understands."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# --- orders ---


def instance_of(args: dict[str, Any]) -> str:
    """The id of the instance that an order with these arguments is about; empty: none."""
    spec = args.get("spec")
    return str(args.get("instance") or (spec.get("instance") if isinstance(spec, dict) else "") or "")


class Call(Wire):
    """An order from a master to an agent.

    ``job`` and ``step`` name it: the agent carries out each (job, step) once, joins a running one, and refuses a ``do`` after
    its ``undo``. Orders that change nothing have job 0. ``oldest_job`` is the oldest job that has not ended; orders of older
    jobs are late copies and are refused. ``turn`` orders the jobs of one term that have an instance for themselves, one after the other:
    once the agent has heard a later one, an order of an earlier one is a late copy, too. ``deadline`` is in seconds from arrival.
    """

    term: int
    #: The master's protocol; release 0.1.0 says nothing and has 1.
    protocol: int = 1
    job: int = 0
    step: str = ""
    method: str
    #: The id of the node whose master speaks; a term belongs to one master only. Empty: not told.
    master: str = ""
    args: dict[str, Any] = Field(default_factory=dict)
    undo: bool = False
    oldest_job: int = 0
    #: 0: not told, as by release 0.1.0, or the job has no instance for itself.
    turn: int = 0
    deadline: float = 60.0

    @property
    def instance(self) -> str:
        """The instance that the order is about; empty: none."""
        return instance_of(self.args)


class Progress(Wire):
    """How far something is: percent (None = not known) and a line of text."""

    percent: float | None = None
    text: str = ""


class Hello(Wire):
    """An agent's answer to a new term: what it is still doing."""

    node: str
    term: int
    running: list[tuple[int, str]] = Field(default_factory=list)
    version: str = ""
    #: The agent's protocol; release 0.1.0 says nothing and has 1.
    protocol: int = 1


# --- storage ---


class PoolRef(Wire):
    """A pool as drivers see it. ``node`` is the name of the node that works."""

    id: str
    name: str
    driver: str
    options: dict[str, str] = Field(default_factory=dict)
    node: str = ""
    #: The cluster's id, to tell one cluster's pool from another's on the same storage.
    cluster: str = ""
    #: It is only looked at: nothing is ever written to it.
    observed: bool = False


class Space(Wire):
    """Space of a pool (on this node, where it is node-local), in bytes."""

    total: int
    free: int


class VolumeStat(Wire):
    """What the storage itself says of a volume. Sizes in bytes; ``allocated`` is what it really takes."""

    logical_id: str
    size: int
    allocated: int = 0
    #: The volume id in the image's name, or None for other people's images.
    volume: str | None = None
    modified: float = 0.0


class SnapshotStat(Wire):
    """What the storage itself says of a snapshot. ``size`` in bytes; ``source`` is the image that it is of, as it is called now."""

    logical_id: str
    snapshot: str
    size: int
    source: str = ""


class Waiting(Wire):
    """Something that was deleted and is still on the storage, and why."""

    what: str
    why: str


class Writer(Wire):
    """Somebody who has a volume open for writing, as the storage tells it: who in words, and the node if it can be told."""

    who: str
    node: str | None = None


class ImageSeen(Wire):
    """An image of a pool, whosever it is, as the storage tells it. ``writers``: who has it open, in words; ``parent``: what it reads of."""

    name: str
    size: int
    volume: str | None = None
    modified: float | None = None
    writers: list[str] = Field(default_factory=list)
    snapshots: list[str] = Field(default_factory=list)
    parent: str = ""


class Readiness(Wire):
    """Whether a guest may have an image now. ``stat`` None: it is not there. ``out``: who was shut out for that."""

    stat: VolumeStat | None
    out: list[str] = Field(default_factory=list)
    writers: list[Writer] = Field(default_factory=list)


class PoolStatus(Wire):
    """The outcome of a pool check on one node. ``ok`` False comes with ``reason``, and where it can with what to type (``hint``)."""

    ok: bool
    reason: str = ""
    hint: str = ""
    space: Space | None = None
    details: dict[str, str] = Field(default_factory=dict)


class Connection(Wire):
    """How a node reaches one volume: made by the pool half, used by the connector of the same ``driver``, opaque in between.

    Needs no Atoll state. ``secrets`` maps names to references (``secret:ID``, ``file:PATH``, ``fd:N``), never values.
    """

    driver: str
    volume: str
    size: int
    data: dict[str, Any] = Field(default_factory=dict)
    secrets: dict[str, str] = Field(default_factory=dict)


class Attached(Wire):
    """A volume made usable on a node: a path (block device or file), and/or QEMU's protocol-level blockdev options
    (a dict without node-name, such as ``{"driver": "file", "filename": ...}``). ``secrets``: names that those options refer to, and the
    files (in memory, the guests' user's) that hold the secrets in base64. ``way``: how a block device was made of
    it; ``warning``: what to mind of that on this node."""

    volume: str
    path: str | None = None
    blockdev: dict[str, Any] | None = None
    secrets: dict[str, str] = Field(default_factory=dict)
    way: str = ""
    warning: str = ""


# --- guests ---


class GuestDisk(Wire):
    """A disk of a guest. ``serial`` is the volume id; the guest sees its first 20 characters."""

    volume: str
    slot: int
    size: int
    mode: Literal["rw", "ro"] = "rw"
    attached: Attached | None = None


class GuestSpec(Wire):
    """All that a hypervisor needs to start a guest; equal on both sides of a migration but for ``attached``. Memory in bytes."""

    instance: str
    name: str
    generation: int
    memory: int
    vcpus: int = 1
    pin: MachinePin = MachinePin()
    boot: Boot = Boot()
    disks: list[GuestDisk] = Field(default_factory=list)
    nics: list[Nic] = Field(default_factory=list)


class GuestStatus(Wire):
    """A guest as its hypervisor sees it.

    ``running`` writes; ``paused`` is stopped by somebody or by an I/O error (``reason``); ``incoming`` waits for a migration;
    ``migrated`` has given everything to the target and must never run again here; ``shutdown`` was ended by the guest itself;
    ``hung`` does not answer; ``gone`` has no process.
    """

    instance: str
    name: str = ""
    generation: int = 0
    state: Literal["running", "paused", "incoming", "migrated", "shutdown", "hung", "gone"]
    reason: str = ""
    migration: str = ""
    pid: int | None = None
    memory: int = 0
    vcpus: int = 0
    #: Why its storage stopped it: volume -> ``full`` (no space was left for a write) or ``failed`` (any other error).
    disk_errors: dict[str, str] = Field(default_factory=dict)
    #: Volume -> how it is attached (``userspace``, ``kernelspace``), and where that is by a device, how that was made.
    access: dict[str, str] = Field(default_factory=dict)
    ways: dict[str, str] = Field(default_factory=dict)
    #: What is to be minded of how they are attached here.
    warnings: list[str] = Field(default_factory=list)


class Endpoint(Wire):
    """Where an incoming guest listens: addresses for the migration stream and, with disks to copy, for NBD. ``node`` is the name
    that its certificate must carry."""

    node: str
    host: str
    port: int
    nbd_port: int | None = None
    tls: bool = True


class MigrationFigures(Wire):
    """What a completed migration took, as the hypervisor measured it."""

    total_ms: int = 0
    downtime_ms: int = 0
    ram_bytes: int = 0


class ReplicaState(Wire):
    """What a master candidate holds of the store: ``stream`` is the term of the master that shipped it, ``number`` the revision up to
    which it is complete; 0 = nothing yet. Sizes in bytes, ``at`` the master's time (seconds since 1970) of the newest change."""

    stream: int = 0
    number: int = 0
    base_size: int = 0
    log_size: int = 0
    at: float = 0.0
    #: The id of the node whose master shipped it.
    master: str = ""
    #: Whether the keys of a master lie on the node.
    keys: bool = False


class Recalled(Wire):
    """What an agent tells a master that begins anew, whatever that master's term: everything that orders things in time, and its guests."""

    node: str
    term: int
    #: The highest job number that it has heard of.
    job: int = 0
    #: Instance -> the highest generation that it has promised to refuse.
    refused: dict[str, int] = Field(default_factory=dict)
    guests: list[GuestStatus] = Field(default_factory=list)
    #: Steps that it is carrying out now.
    running: list[tuple[int, str]] = Field(default_factory=list)
    #: Seconds since a master last answered it; None = not since it began.
    heard: float | None = None
    #: The process that leads on this very node; None = none does.
    master_pid: int | None = None
    #: The masters that it reports to.
    masters: list[str] = Field(default_factory=list)
    replica: ReplicaState = ReplicaState()
    version: str = ""


class NodeReport(Wire):
    """An agent's heartbeat. Memory in bytes; ``refuses`` is instance -> highest refused generation."""

    node: str
    term: int
    version: str = ""
    #: The agent's protocol; release 0.1.0 says nothing and has 1.
    protocol: int = 1
    #: The node's clock when it reported, in seconds since 1970; None where it does not tell.
    clock: float | None = None
    boot_id: str = ""
    memory_total: int = 0
    memory_free: int = 0
    cpus: int = 0
    guests: list[GuestStatus] = Field(default_factory=list)
    #: Pool id -> why its storage does not answer here, and for how many seconds it has not.
    stalled_pools: dict[str, str] = Field(default_factory=dict)
    stalled_for: dict[str, float] = Field(default_factory=dict)
    accelerator: str = ""
    replica: ReplicaState = ReplicaState()
    #: The serial of the certificate that it uses, when that was made and when it ends; and the fingerprints of the CAs that it trusts.
    certificate: str = ""
    certificate_issued: float = 0.0
    certificate_expires: float = 0.0
    trusts: tuple[str, ...] = ()
