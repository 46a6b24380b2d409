"""The objects of a cluster, as the store keeps them. All are frozen; a change is a new object."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Stored(BaseModel):
    """What the store keeps under ``<kind>/<id>``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    #: How people call one of these, and the prefix of its lock (``instance:i-...``).
    noun: ClassVar[str]

    id: str

    @property
    def resource(self) -> str:
        """The name of this object's lock."""
        return f"{self.noun}:{self.id}"

    @property
    def over(self) -> bool:
        """Whether it is kept only so that it can be looked up: it will not change, and is asked for rarely."""
        return False


class MachinePin(BaseModel):
    """What must be equal on both sides of a live migration; chosen once, kept for the life of the instance."""

    model_config = ConfigDict(frozen=True)
    machine: str = "pc-q35-7.2"
    cpu_model: str = "qemu64"
    accelerator: Literal["tcg", "kvm"] = "tcg"


class Cluster(Stored):
    """The cluster itself; there is one, with id ``cluster``."""

    kind, noun = "cluster", "cluster"
    name: str
    #: sha256 of the DER form of the cluster's CA certificate, lower-case hex.
    ca_fingerprint: str = ""
    #: What marks on storage call the cluster: the fingerprint of its first CA, whatever CA it has now. Empty: it has that one still.
    identity: str = ""
    #: Masters have their own certificates renewed that are older than this (seconds since 1970).
    certificates_since: float = 0.0
    hypervisor: str = "qemu"
    #: Driver -> option -> value: defaults of new pools (``shared_file_dir`` of Ganeti is ``{"sharedfile": {"path": ...}}``).
    driver_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: Driver -> parameter -> value: how disks are attached from now on. Groups override it.
    disk_parameters: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: Kind of storage cluster -> option -> value: how storage clusters are to be made (``-S`` of Ganeti). Groups and nodes override it.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()


class Group(Stored):
    """A node group: nodes that share storage. Pins what migration needs to be equal."""

    kind, noun = "groups", "group"
    name: str
    pin: MachinePin = MachinePin()
    #: Driver -> pool id: what ``-t DRIVER`` means where several pools have that driver.
    default_pools: dict[str, str] = Field(default_factory=dict)
    #: Driver -> parameter -> value, where disks are attached in another way than the cluster's.
    disk_parameters: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: Kind of storage cluster -> option -> value, where this group differs from the cluster.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: The storage cluster (its id) that this group's nodes form; empty: they form none.
    storage: str = ""
    tags: tuple[str, ...] = ()


class Node(Stored):
    """A node and what the administrator said of it. Whether it answers is not stored: the master watches that."""

    kind, noun = "nodes", "node"
    name: str
    group: str
    address: str
    port: int = 7771
    roles: tuple[str, ...] = ("vm",)
    offline: bool = False
    drained: bool = False
    certificate_serial: str = ""
    #: While its certificate is being renewed: the serial of the one that it used until then. It is accepted, too.
    previous_serial: str = ""
    #: When its certificate was made, and when it ends, in seconds since 1970; 0 = not known.
    certificate_issued: float = 0.0
    certificate_expires: float = 0.0
    #: Whether the pools of its group have been prepared on it.
    ready: bool = False
    #: Whether it may hold a copy of the store and the keys of a master, so that it may have become the master.
    holds_keys: bool = False
    #: Kind of storage cluster -> option -> value, where this node differs from its group.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: What it is in its group's storage cluster: nothing yet, ``wanted`` (it shall join), ``joined``, or ``stopped`` (its data is kept).
    storage: Literal["", "wanted", "joined", "stopped"] = ""
    #: The daemons that it has there, such as ``mon``, ``mgr`` and ``osd``.
    storage_roles: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class StorageCluster(Stored):
    """A storage cluster that Atoll has made of the nodes of a group. ``layout`` is what it consists of, as its kind describes it."""

    kind, noun = "storages", "storage"
    name: str
    type: str
    group: str
    options: dict[str, str] = Field(default_factory=dict)
    #: Empty while it is only marked: the group had no node.
    layout: dict[str, Any] = Field(default_factory=dict)
    #: Its keys, sealed under the key file of the masters.
    keys: str = Field(default="", repr=False)
    created: float = 0.0
    tags: tuple[str, ...] = ()


class Writers(StrEnum):
    """How well a pool's storage tells who writes a volume; measured by ``pool check``, never assumed."""

    ENFORCED = "enforced"
    ADVISORY = "advisory"
    NONE = "none"


class Pool(Stored):
    """A storage pool: a driver, its options, and the node groups that can reach it."""

    kind, noun = "pools", "pool"
    name: str
    driver: str
    options: dict[str, str] = Field(default_factory=dict)
    groups: tuple[str, ...] = ()
    writers: Writers = Writers.NONE
    #: ``ready`` takes new volumes; ``closed`` does not (its reason is in ``state_reason``).
    state: Literal["ready", "closed"] = "ready"
    state_reason: str = ""
    #: It is only looked at: nothing is ever written there.
    observed: bool = False
    tags: tuple[str, ...] = ()


class VolumeState(StrEnum):
    """EBS's volume states."""

    CREATING = "creating"
    AVAILABLE = "available"
    IN_USE = "in-use"
    DELETING = "deleting"
    ERROR = "error"


class Volume(Stored):
    """A disk. It lives in one pool; ``logical_id`` is the driver's own handle."""

    kind, noun = "volumes", "volume"
    name: str
    pool: str
    size: int
    logical_id: str = ""
    state: VolumeState = VolumeState.CREATING
    generation: int = 1
    #: The node that owns the disk, for node-local pools; else None.
    node: str | None = None
    #: The second copy's node, for internally mirrored pools; else None.
    secondary: str | None = None
    #: The instance it is attached to; else None.
    instance: str | None = None
    adopted: bool = False
    #: The snapshot (its id) that it was made from; it may be gone.
    snapshot: str = ""
    created: float = 0.0
    tags: tuple[str, ...] = ()


class SnapshotState(StrEnum):
    """EBS's snapshot states, and ``deleting``."""

    PENDING = "pending"
    COMPLETED = "completed"
    DELETING = "deleting"


class Snapshot(Stored):
    """What a volume held at one moment. It stays when the volume is deleted; ``logical_id`` is the driver's own handle."""

    kind, noun = "snapshots", "snapshot"
    name: str
    pool: str
    #: In bytes: as large as the volume was.
    size: int
    #: The volume (its id) that it is of, and how that was called then; it may be gone.
    volume: str
    volume_name: str = ""
    logical_id: str = ""
    state: SnapshotState = SnapshotState.PENDING
    created: float = 0.0
    tags: tuple[str, ...] = ()


class Disk(BaseModel):
    """A place for a volume in an instance. ``slot`` fixes the PCI address; it never changes while the disk is attached."""

    model_config = ConfigDict(frozen=True)
    volume: str
    slot: int
    mode: Literal["rw", "ro"] = "rw"


class Nic(BaseModel):
    """A network card. ``user`` is QEMU's own NAT; ``bridged`` a tap on the bridge ``link``."""

    model_config = ConfigDict(frozen=True)
    mac: str
    mode: Literal["user", "bridged"] = "user"
    link: str = ""


class Boot(BaseModel):
    """How a guest boots: from its first disk, or directly from a kernel on the node."""

    model_config = ConfigDict(frozen=True)
    kernel: str = ""
    initrd: str = ""
    append: str = ""


class Instance(Stored):
    """A virtual machine as wanted. Who may run it says its claim; whether it runs say the agents."""

    kind, noun = "instances", "instance"
    name: str
    group: str
    memory: int
    vcpus: int = 1
    hypervisor: str = "qemu"
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    boot: Boot = Boot()
    pin: MachinePin = MachinePin()
    os: str = ""
    #: Parameters of its OS definition, and whether that definition's scripts have installed it.
    os_parameters: dict[str, str] = Field(default_factory=dict)
    os_scripts: bool = False
    desired: Literal["running", "stopped"] = "stopped"
    #: Why ``desired`` became ``stopped`` when nobody asked Atoll for it, such as ``by the guest``.
    stopped_by: str = ""
    #: Only for internally mirrored disks: the node of the second copy.
    secondary: str | None = None
    #: The node that owns its node-local disks, or ran it last; a hint for the next start.
    home: str | None = None
    created: float = 0.0
    tags: tuple[str, ...] = ()


class Migration(BaseModel):
    """The second holder of a claim while a migration runs."""

    model_config = ConfigDict(frozen=True)
    target: str
    job: int


class Claim(Stored):
    """Who may write an instance's disks (PROTOCOLS 1). Its id is the instance's id.

    ``generation`` grows by one with each change of holder. ``holder`` None: some agent's acknowledgement freed it.
    """

    kind, noun = "claims", "claim"
    holder: str | None = None
    generation: int = 0
    migration: Migration | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes on which the guest may be."""
        found = [self.holder] if self.holder else []
        return tuple(found + ([self.migration.target] if self.migration else []))


class DeathProof(Stored):
    """A proof that a node is dead, given for this node and this moment. Its id is the node's id. A node that answers voids it."""

    kind, noun = "proofs", "proof"
    method: Literal["human", "fence"]
    who: str
    at: float
    #: Somebody's word that what was on the node's own disks will not come back: records of it may be forgotten.
    disks_are_lost: bool = False


class Hold(Stored):
    """A resource that a job which needs attention holds. Its id is the resource, such as ``instance:i-...``."""

    kind, noun = "holds", "hold"
    job: int
    reason: str
    commands: tuple[str, ...]


class JobState(StrEnum):
    """A job's states; the last three are its ends."""

    QUEUED = "queued"
    RUNNING = "running"
    UNDOING = "undoing"
    NEEDS_ATTENTION = "needs-attention"
    DONE = "done"
    UNDONE = "undone"

    @property
    def active(self) -> bool:
        """Whether the engine still works on it."""
        return self in (JobState.QUEUED, JobState.RUNNING, JobState.UNDOING)

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self in (JobState.DONE, JobState.UNDONE)


class Locks(BaseModel):
    """What a job may touch. Resource names are ``noun:id``."""

    model_config = ConfigDict(frozen=True)
    shared: tuple[str, ...] = ()
    exclusive: tuple[str, ...] = ()


class Job(Stored):
    """A durable piece of work. Its id is a number with ten digits, so that ids sort by age; ``number`` is what people see."""

    kind, noun = "jobs", "job"
    operation: str
    version: int = 1
    request: dict[str, Any] = Field(default_factory=dict)
    locks: Locks = Locks()
    state: JobState = JobState.QUEUED
    key: str = ""
    who: str = ""
    parent: int | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    committed: bool = False
    cancel_asked: bool = False
    #: Whether it is (or was, when it began to need attention) being undone.
    undoing: bool = False
    #: Seconds from its start after which the job is undone, or needs attention past its commit.
    deadline: float = 3600.0
    result: Any = None
    error: dict[str, Any] | None = None
    #: One sentence on what the job does, for people: ``migrate instance web1 to node2``.
    summary: str = ""
    #: Why it needs attention, and what a person can do.
    reason: str = ""
    commands: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """The id as a number; later jobs have larger ones."""
        return int(self.id)

    @property
    def over(self) -> bool:
        """See ``Stored``."""
        return self.state.ended


class StepState(StrEnum):
    """A step's states: journaled before its effect, after it, and after its undo."""

    INTENT = "intent"
    DONE = "done"
    UNDONE = "undone"


class Step(Stored):
    """One journaled step of a job. Its id is ``<job>/<index>``, both with leading zeros, so that a range read gives their order."""

    kind, noun = "steps", "step"
    key: str
    #: ``call`` orders a node, ``write`` changes the store in the journal's own transaction, ``read`` fixes a value.
    what: Literal["call", "write", "read"]
    node: str | None = None
    method: str = ""
    args_hash: str = ""
    undo: dict[str, Any] | None = None
    state: StepState = StepState.INTENT
    result: Any = None
    at: float = 0.0


class IdempotencyKey(Stored):
    """A request's key, as its sha256; with it the same request gives the same job again."""

    kind, noun = "keys", "key"
    job: int
    #: sha256 of operation, target and request: another request with the same key is refused.
    digest: str

    @property
    def over(self) -> bool:
        """See ``Stored``."""
        return True


class Token(Stored):
    """A credential, kept as a hash only. Join tokens are bound to a node name, work once and expire."""

    kind, noun = "tokens", "token"
    purpose: Literal["join", "api"]
    digest: str
    name: str
    role: Literal["admin", "operator", "reader", "node"] = "reader"
    group: str = ""
    #: The id of the node that may come back with it; empty: a new one joins.
    node: str = ""
    #: When it was made (seconds since 1970); 0 = not known.
    created: float = 0.0
    expires: float | None = None
    used: bool = False


class Authority(Stored):
    """A certificate authority of the cluster. There is one, but for a rotation: then the new one is ``coming`` until all trust it, and
    the old one ``leaving`` until nobody needs it. Its id is the beginning of its fingerprint."""

    kind, noun = "authorities", "authority"
    certificate: str
    #: The private key, sealed under the key file of the masters.
    key: str = Field(repr=False)
    state: Literal["coming", "current", "leaving"] = "current"
    number: int = 1


KINDS: tuple[type[Stored], ...] = (
    Cluster,
    Group,
    Node,
    Pool,
    Volume,
    Snapshot,
    Instance,
    Claim,
    DeathProof,
    Hold,
    Job,
    Step,
    IdempotencyKey,
    Token,
    Authority,
    StorageCluster,
)
