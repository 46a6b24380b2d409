"""The contract of storage drivers: a pool half and a node half.

Both halves are plain synchronous classes whose arguments and results are JSON-able messages: the agent runs them in the pool's
worker process, with a deadline, because calls into storage can hang for ever (PROTOCOLS 4). Every call is idempotent:
exists and equal = success, exists and different = ``Conflict``, missing on delete = success. Errors are ``AtollError``;
an outcome that is not known is reported by the deadline, and then ``stat`` decides.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from atoll.model.errors import PoolObserved
from atoll.model.health import Health
from atoll.model.messages import (
    Attached,
    Connection,
    ImageSeen,
    PoolRef,
    PoolStatus,
    Readiness,
    SnapshotStat,
    Space,
    VolumeStat,
    Waiting,
    Writer,
)
from atoll.runtime.worker import Told, nobody


class Mirroring(StrEnum):
    """Who keeps a second copy: nobody, Atoll (``DTS_INT_MIRROR``), or the storage (``DTS_EXT_MIRROR``)."""

    NONE = "none"
    INTERNAL = "internal"
    EXTERNAL = "external"


class Option(BaseModel):
    """An option of a driver. The reference page of the driver is generated from these."""

    model_config = ConfigDict(frozen=True)
    name: str
    description: str
    required: bool = False
    default: str = ""
    choices: tuple[str, ...] = ()


class DriverInfo(BaseModel):
    """What a driver can, as data; nobody outside a driver's folder asks for its name."""

    model_config = ConfigDict(frozen=True)
    name: str
    description: str
    mirroring: Mirroring
    access: frozenset[Literal["kernelspace", "userspace"]]
    #: Storage types: is free space one node's, or the pool's; ``unknown`` where the backend does not tell.
    space: Literal["per-node", "shared", "unknown"]
    adoption: Literal["no", "may", "must"] = "no"
    create: bool = True
    grow: bool = True
    #: ``offline``: the image's own name follows the volume's, while no guest has it open.
    rename: Literal["no", "offline"] = "no"
    #: Its pool half is a ``SnapshotPool``: it makes snapshots, and (``clones``) volumes from them.
    snapshots: bool = False
    clones: bool = False
    exclusive_lock: bool = False
    #: Its images are files of the node, which exports are made from and filled into.
    files: bool = True
    #: Its pool half needs a credential that not every node shall have: it runs on nodes with the role ``storage-controller``, if the pool's
    #: groups have any.
    runs_on: Literal["nodes", "controllers"] = "nodes"
    #: Its pool half is a ``FencingPool``: it can shut out who still writes, whatever he believes.
    fencing: bool = False
    #: Its pool half is a ``WatchedPool``: the storage is a service that tells how it is.
    health: bool = False
    #: Its pool half is an ``ObservingPool``: it can look at storage that is nobody's pool, with rights that only allow that.
    observe: bool = False
    #: Making a volume, also from a snapshot, takes a moment whatever its size: no data are written.
    quick: bool = False
    #: Largest size of a volume, in bytes.
    max_size: int = 1 << 60
    #: Sizes are rounded up to a multiple of this, in bytes.
    granularity: int = 512
    options: tuple[Option, ...] = ()
    #: What the cluster and its groups may set for all its disks (``-D DRIVER:KEY=VALUE``); it holds for a disk when it is attached next.
    #: One that is called ``access`` chooses one of the driver's ways of access.
    parameters: tuple[Option, ...] = ()
    #: Roles of nodes in a storage cluster that keep its data: such a node should not have block devices of that data.
    data_roles: frozenset[str] = frozenset()

    @property
    def mirrored(self) -> bool:
        """``DTS_MIRRORED``: instances on it can migrate and fail over."""
        return self.mirroring is not Mirroring.NONE

    @property
    def plain_access(self) -> Literal["kernelspace", "userspace"]:
        """How a volume is used where nothing else was asked for, and by Atoll itself: without a block device, where the driver can."""
        return "userspace" if "userspace" in self.access else "kernelspace"

    @property
    def node_local(self) -> bool:
        """Whether only the volume's own node (and its secondary) can reach it."""
        return self.mirroring is not Mirroring.EXTERNAL


class VolumeSpec(BaseModel):
    """A volume to make. ``size`` in bytes."""

    model_config = ConfigDict(frozen=True)
    volume: str
    name: str
    size: int
    options: dict[str, str] = Field(default_factory=dict)


@runtime_checkable
class PoolDriver(Protocol):
    """The pool half. Made with ``(ref: PoolRef)``; cheap to make, touches nothing until it is called."""

    ref: PoolRef

    def prepare(self, *, create: bool) -> PoolStatus:
        """Make the pool usable on this node, idempotently. ``create``: the first node marks the storage as this pool's.

        Errors: PoolUnavailable (not mounted, marker of another pool, directory missing), InvalidInput (bad options).
        """

    def mark(self, expected: list[str]) -> None:
        """Mark the storage as this pool's again, where somebody has removed the mark; marked already is success. ``expected``: logical ids
        that it should hold. Errors: PoolUnavailable (it holds none of them: it is another place), Conflict (it is another pool's)."""

    def forget(self) -> None:
        """Remove the pool's own mark; volumes and other people's files stay."""

    def check(self) -> PoolStatus:
        """Is the storage there, is it this pool's, how much room has it? A reason instead of an error."""

    def space(self) -> Space:
        """Total and free bytes. Errors: PoolUnavailable."""

    def create(self, spec: VolumeSpec) -> str:
        """Make the volume durable and give its logical id. Errors: PoolFull, PoolUnavailable, Conflict."""

    def delete(self, logical_id: str) -> None:
        """Remove it durably; missing is success. Errors: PoolUnavailable, DiskInUse."""

    def grow(self, logical_id: str, size: int) -> int:
        """Make it at least ``size`` bytes, never smaller; gives the size. Errors: NotFound, PoolFull, ShrinkRefused."""

    def rename(self, logical_id: str, volume: str, name: str) -> str:
        """Let the image's name follow the volume's; gives the logical id. Repeating a finished rename is success."""

    def stat(self, logical_id: str) -> VolumeStat | None:
        """What the storage says, or None when it is not there. Errors: PoolUnavailable, Conflict (what is there is no image)."""

    def volumes(self) -> list[VolumeStat]:
        """All images, other people's included (their ``volume`` is None)."""

    def adopt(self, source: str, volume: str) -> VolumeStat:
        """Look at an existing image that shall become a volume; nothing is written. Errors: NotFound, DiskInUse, InvalidInput, Conflict."""

    def writers(self, logical_id: str) -> list[Writer]:
        """Who has it open for writing, as the storage tells it."""

    def probe_writers(self, action: Literal["hold", "look", "drop"]) -> bool:
        """The measurement behind ``Writers``: ``hold`` takes a lock on a probe and keeps it while this process lives, ``look``
        says whether somebody else's lock is seen, ``drop`` lets go."""

    def connection(self, logical_id: str, volume: str, size: int, node: str = "") -> Connection:
        """How a node reaches it; needs nothing else than what it holds. ``node``: its name, where a node gets rights of its own."""

    def sync(self, logical_id: str, primary: str, secondary: str) -> None:
        """Internally mirrored only: bring the second copy up to the first. Others: NotSupported."""


@runtime_checkable
class FencingPool(PoolDriver, Protocol):
    """The pool half of storage that can shut writers out (``DriverInfo.fencing``)."""

    def note(self, logical_id: str, node: str = "") -> list[str]:
        """Remember who has it open now: the guest that was just started on the node (its name), or both sides of a migration to it."""

    def readmit(self, node: str) -> list[str]:
        """Let those in again who were shut out as guests of the node: it is back, and has said that none of them is left. Others stay shut
        out. Who was let in."""

    def fence(self, logical_id: str, whom: Literal["none", "known", "all"], volume: str = "") -> list[str]:
        """Shut out, for good, who may still write it: nobody, those that were noted (who are known to be gone), or everybody; and remove
        what the dead have left. With a ``volume``, the rights that nodes had for it go first. Who was shut out. Errors: NotFound."""

    def ready(self, logical_id: str, whom: Literal["none", "known", "all"], volume: str = "") -> Readiness:
        """``stat``, ``fence`` and ``writers`` in one, for a guest that shall start: with one look where nobody has the image open."""

    def revoke(self, volume: str, node: str = "") -> None:
        """Take the rights that a node (all: empty) had for a volume; none is success."""


@runtime_checkable
class WatchedPool(PoolDriver, Protocol):
    """The pool half of storage that tells how it is (``DriverInfo.health``)."""

    def health(self) -> Health:
        """One sample. It is taken every few seconds, also while calls that touch data hang: it waits for nothing that does. What cannot be
        told in a second or two is left out, and the sample says so. Errors: PoolUnavailable (nobody answers)."""


#: What the pool half does for a pool that is only looked at. None of these writes.
LOOKS = frozenset({"check", "space", "health", "volumes", "stat", "writers", "snapshots", "waiting", "images"})


def refuse_observed(ref: PoolRef, method: str) -> None:
    """Errors: PoolObserved for what might write to a pool that is only looked at."""
    if ref.observed and method not in LOOKS:
        raise PoolObserved(f"pool {ref.name} is only observed: {method} might write to it")


@runtime_checkable
class ObservingPool(PoolDriver, Protocol):
    """The pool half of storage that can be looked at without being marked (``DriverInfo.observe``). With ``ref.observed`` it looks at no
    mark, and leaves nothing of itself."""

    def images(self) -> list[ImageSeen]:
        """All images, other people's included, and who has them open. Errors: PoolUnavailable."""


@runtime_checkable
class SnapshotPool(PoolDriver, Protocol):
    """The pool half of storage that makes snapshots (``DriverInfo.snapshots``) and volumes from them (``clones``).

    A snapshot stays when its volume is deleted, and a volume made from one stays when the snapshot is deleted.
    """

    def snapshot(self, logical_id: str, snapshot: str) -> SnapshotStat:
        """What the image holds at one moment, also while a guest writes it. ``snapshot``: the id; there already is success.

        Errors: NotFound, NotSupported (this image cannot have any), PoolUnavailable."""

    def delete_snapshot(self, snapshot: str, logical_id: str = "", source: str = "") -> None:
        """Remove it; missing is success. Where its logical id was never told, it is found by the image that it was made of (``source``).
        Errors: DiskInUse."""

    def snapshots(self) -> list[SnapshotStat]:
        """All that have ids of ours, with those of deleted volumes."""

    def clone(self, spec: VolumeSpec, snapshot: str) -> str:
        """Make a volume that begins with what the snapshot (a logical id) holds; gives its logical id.
        Errors: NotFound, ShrinkRefused (it is larger), PoolFull, Conflict."""

    def flatten(self, logical_id: str) -> bool:
        """Give the image all that it still reads of what it was made from, also while a guest writes it; whether there was anything.
        What was copied before it was broken off stays copied: repeating it goes on. It tells how far it is (``runtime.percent``).
        Errors: NotFound, DiskInUse (its guest may not write to what it reads)."""

    def waiting(self) -> list[Waiting]:
        """What was deleted and is still there, and why."""


@runtime_checkable
class Connector(Protocol):
    """The node half: makes a volume usable here, from its connection alone. Made without arguments."""

    def attach(self, connection: Connection, access: Literal["kernelspace", "userspace"]) -> Attached:
        """Make it usable; attaching twice is success. Errors: PoolUnavailable, NotFound."""

    def detach(self, connection: Connection) -> None:
        """Undo that; not attached is success."""

    def resized(self, connection: Connection) -> int:
        """After a grow (``connection.size`` is the new size): let what is attached here be as large; the size seen here, in bytes."""

    def attached(self) -> list[str]:
        """Volume ids that are attached here by this driver, as the node itself tells it."""

    def map(self, connection: Connection, *, read_only: bool) -> Attached:
        """Make it a block device of this node, for administrators and OS scripts, also where guests need none. Twice is success.

        The caller holds the instance's claim: a mapping takes no lock that other nodes see.
        Errors: PoolUnavailable, NotFound, Conflict (mapped with the other mode), HostError.
        """

    def unmap(self, connection: Connection) -> None:
        """Undo that, when all that was written through it is durable; not mapped is success. By then nobody has it open.

        Errors: DiskInUse (somebody has it open still), HostError.
        """

    def unmap_others(self, keep: list[str]) -> list[str]:
        """End those mappings of this node that are of none of these volumes: what an agent that forgot them has left. Gives the volumes."""


def as_json(value: Any) -> Any:
    """A driver's result as JSON-able data."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return value


class StorageAccess(Protocol):
    """What an agent uses: both halves of every driver, each call in the pool's worker and within a deadline (seconds).

    Results and arguments are JSON-able. Errors: the driver's; DeadlineExceeded or Unreachable when the outcome is not known;
    PoolUnavailable when the pool is stalled.
    """

    async def pool(self, ref: PoolRef, method: str, deadline: float, told: Told = nobody, **args: Any) -> Any:
        """Call the pool half. ``told`` hears how far it is, in percent, where the driver tells."""

    async def connector(self, pool: str, driver: str, method: str, deadline: float, **args: Any) -> Any:
        """Call the node half, in the worker of the pool with this id."""

    def stalled(self) -> dict[str, str]:
        """Pools (by id) whose storage hangs, with the reason."""

    def stalled_for(self) -> dict[str, float]:
        """The same pools, and for how many seconds they have not answered."""

    async def close(self) -> None:
        """End all workers."""
