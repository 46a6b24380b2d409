"""The requests of all operations, as they come from the edge. Objects are named by name or id; sizes are bytes.

They are checked here for form only; whether they fit the cluster is checked by each operation's ``prepare``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from atoll.model.places import OPEN_DIRECTORY
from atoll.model.units import MAX_SIZE, MIB
from atoll.operations.image_requests import EXPORTS, CloudInit, ImageSource, NodePath, OsName, OsParameters, OsTimeout

Name = Annotated[str, StringConstraints(min_length=1, max_length=63)]
Ref = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/=+@-]+$")]
Size = Annotated[int, Field(gt=0, le=MAX_SIZE, description="bytes")]


class Request(BaseModel):
    """The root of requests: unknown fields are errors, so that a typing mistake never passes for a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def only_admins(self) -> str:
        """Why this request is for admins only although its operation is for operators too; empty = it is not."""
        return ""


def _outside(path: str) -> str:
    return "" if path.startswith(EXPORTS + "/") else f"{path} is outside of {EXPORTS}, where operators may have exports"


def _foreign(images: list[ImageSource | None]) -> str:
    outside = next((image for image in images if image and not image.open_to_operators), None)
    return f"{outside.path} is outside of {OPEN_DIRECTORY}, where operators may take images from" if outside else ""


class Nothing(Request):
    """No parameters."""


# --- cluster ---


class ClusterModify(Request):
    """Change defaults of the cluster."""

    #: Driver -> key -> value: defaults of new pools, and disk parameters (``access``); an empty value removes one.
    driver_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    hypervisor: Literal["qemu", "fake"] | None = None
    #: Kind of storage cluster -> option -> value; an empty value removes it. Only while no storage cluster is initialised.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)


class ClusterRenewCertificates(Request):
    """Give every node that answers, and the master, a new certificate."""


class RotateCa(Request):
    """Change the cluster's CA: all trust old and new, everything is signed anew, the old one is destroyed."""

    #: Go on without nodes that do not answer; they come back by a token.
    leave_behind: bool = False


class TagsChange(Request):
    """Add and remove tags."""

    add: list[Tag] = Field(default_factory=list)
    remove: list[Tag] = Field(default_factory=list)


# --- groups ---


class GroupAdd(Request):
    """Make a node group."""

    name: Name
    cpu_model: str = ""
    accelerator: Literal["tcg", "kvm", ""] = ""
    machine: str = ""
    #: Driver -> disk parameter -> value, where disks shall be attached in another way than the cluster's.
    driver_options: dict[str, dict[str, str]] = Field(default_factory=dict)


class GroupModify(Request):
    """Change a group; a new pin holds for instances made from then on."""

    cpu_model: str | None = None
    accelerator: Literal["tcg", "kvm"] | None = None
    machine: str | None = None
    #: Driver -> pool: what ``-t DRIVER`` means in this group; an empty pool removes the entry.
    default_pools: dict[str, str] = Field(default_factory=dict)
    #: Driver -> disk parameter -> value, where disks shall be attached in another way than the cluster's; an empty value removes one.
    driver_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: Where this group's storage cluster shall differ from the cluster's options; only before it is initialised.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)


class Rename(Request):
    """Give a new name."""

    new_name: Name


class AssignNodes(Request):
    """Put nodes into this group."""

    nodes: list[Ref] = Field(min_length=1)


# --- nodes ---


class NodeModify(Request):
    """Change what the administrator says of a node."""

    offline: bool | None = None
    drained: bool | None = None
    #: Stop its part of a storage cluster even if guests could no longer read and write.
    io_may_stop: bool = False
    roles: list[str] | None = None
    #: Where this node shall differ from its group's options for storage clusters, such as its disks; only before it has a part in one.
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)


class NodeRenew(Request):
    """Give the node a new key and certificate."""


class NodeRemove(Request):
    """Take a node out of the cluster for good."""

    keys_are_lost: bool = False
    #: It died for good: its part of a storage cluster is given up, too.
    dead: bool = False


class NodeMove(Request):
    """Move all (or the named) instances of a node: migrate, failover, evacuate."""

    target: Ref | None = None
    node_is_dead: bool = False


class NodeDeclareDead(Request):
    """A human's word that the node is off, for this moment. Refused for a node that answers.

    ``disks_are_lost``: what was on its own disks will not come back, so that jobs may forget it.
    """

    disks_are_lost: bool = False


# --- pools ---


class PoolAdd(Request):
    """Make a storage pool and connect it to groups (all of them if none is named)."""

    name: Name
    driver: Name
    options: dict[str, str] = Field(default_factory=dict)
    groups: list[Ref] = Field(default_factory=list)
    #: Only look at it: nothing is ever written there.
    observe: bool = False


class PoolRemove(Request):
    """Remove a pool without volumes; foreign files on it stay."""


class PoolConnect(Request):
    """Let a group reach the pool, or end that."""

    group: Ref


class PoolMark(Request):
    """Mark the storage as this pool's again, as ``node`` sees it; node-local pools need a node."""

    node: Ref | None = None


class PoolModify(Request):
    """Open a pool for new volumes, or close it."""

    state: Literal["ready", "closed"]
    reason: str = ""


# --- volumes ---


class VolumeCreate(Request):
    """Make a volume. ``pool`` is a pool, or a driver with one candidate; ``node`` is needed for node-local pools."""

    name: Name | None = None
    #: May be left away with ``snapshot``: the volume is made in the snapshot's pool.
    pool: Ref | None = None
    size: Size | None = None
    node: Ref | None = None
    #: Name of an existing image in the pool, to adopt instead of making one.
    adopt: str | None = None
    #: A file to fill it from; then the size may be left away.
    image: ImageSource | None = None
    #: A snapshot whose content it begins with; then the size may be left away.
    snapshot: Ref | None = None
    options: dict[str, str] = Field(default_factory=dict)
    tags: list[Tag] = Field(default_factory=list)

    @property
    def only_admins(self) -> str:
        return _foreign([self.image])


class VolumeGrow(Request):
    """Grow to ``size``, or by ``increment``; exactly one is given."""

    size: Size | None = None
    increment: Size | None = None


class SnapshotCreate(Request):
    """Make a snapshot of a volume: what it holds at one moment, also while its guest runs (as after a power cut)."""

    volume: Ref
    name: Name | None = None
    tags: list[Tag] = Field(default_factory=list)


# --- instances ---


class DiskSpec(Request):
    """A new disk of an instance: ``size``, an ``image`` to fill it from (and perhaps a larger size), or an image to ``adopt``;
    in ``pool`` (else the instance's ``template``)."""

    size: Size | None = None
    pool: Ref | None = None
    adopt: str | None = None
    image: ImageSource | None = None
    name: Name | None = None
    mode: Literal["rw", "ro"] = "rw"
    options: dict[str, str] = Field(default_factory=dict)


class NicSpec(Request):
    """A new network card; the MAC address is made up if none is given."""

    mode: Literal["user", "bridged"] = "user"
    link: str = ""
    mac: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")] | None = None


class InstanceAdd(Request):
    """Make an instance. ``template`` is Ganeti's disk template: ``DRIVER``, ``DRIVER:POOL`` or a pool."""

    name: Name
    template: Ref | None = None
    disks: list[DiskSpec] = Field(default_factory=list, max_length=8)
    nics: list[NicSpec] = Field(default_factory=list, max_length=4)
    memory: Annotated[int, Field(ge=16 * MIB, le=1 << 46)] = 128 * MIB
    vcpus: Annotated[int, Field(ge=1, le=512)] = 1
    node: Ref | None = None
    secondary: Ref | None = None
    group: Ref | None = None
    #: The OS definition whose scripts install it, as NAME or NAME+VARIANT.
    os: OsName = ""
    os_parameters: OsParameters = Field(default_factory=dict)
    os_timeout: OsTimeout = 3600.0
    #: ``os`` is only a note then.
    no_install: bool = False
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    #: A seed for cloud-init, as one more disk.
    cloud_init: CloudInit | None = None
    start: bool = True
    tags: list[Tag] = Field(default_factory=list)

    @property
    def only_admins(self) -> str:
        return _foreign([disk.image for disk in self.disks])


class InstanceReinstall(Request):
    """Let the scripts of an OS definition install it anew; all data on its disks may be lost. ``os`` None: the one it has."""

    os: OsName | None = None
    #: Those that are named are changed, the others stay; all of them go with another OS definition.
    os_parameters: OsParameters = Field(default_factory=dict)
    os_timeout: OsTimeout = 3600.0


class InstanceRename(Rename):
    """Give an instance a new name, and let the rename script of its OS definition tell the guest, if scripts have installed it."""

    run_script: bool = True
    os_timeout: OsTimeout = 600.0


class InstanceExport(Request):
    """Write a stopped instance into one file of ``node``, which reaches all its disks. ``shutdown`` stops a running one for that time."""

    node: Ref
    path: NodePath
    overwrite: bool = False
    shutdown: bool = False
    timeout: Annotated[float, Field(ge=0, le=3600)] = 120.0

    @property
    def only_admins(self) -> str:
        return _outside(self.path)


class InstanceImport(Request):
    """Make an instance from an export, a file of ``node``. ``template``: where its disks shall be; None: in pools of the same names."""

    name: Name
    node: Ref
    path: NodePath
    template: Ref | None = None
    start: bool = True

    @property
    def only_admins(self) -> str:
        return _outside(self.path)


class InstanceRemove(Request):
    """Stop and remove an instance with its disks; ``keep_disks`` leaves them as volumes."""

    keep_disks: bool = False
    timeout: Annotated[float, Field(ge=0, le=3600)] = 30.0


class InstanceStart(Request):
    """Start it; ``node`` may name another node than the last one where all disks can be reached."""

    node: Ref | None = None
    node_is_dead: bool = False


class InstanceStop(Request):
    """Stop by ACPI; after ``timeout`` seconds by force (0 = at once)."""

    timeout: Annotated[float, Field(ge=0, le=3600)] = 120.0


class InstanceReboot(Request):
    """``soft`` asks the guest, ``hard`` resets it, ``full`` stops and starts it with present parameters."""

    type: Literal["soft", "hard", "full"] = "hard"


class InstanceMigrate(Request):
    """Move it alive to ``node``, or where placement says."""

    node: Ref | None = None
    #: If it cannot be migrated because it does not run, or its node is dead: start it elsewhere instead.
    allow_failover: bool = False


class InstanceFailover(Request):
    """Stop it (if its node answers) and start it elsewhere."""

    node: Ref | None = None
    node_is_dead: bool = False
    timeout: Annotated[float, Field(ge=0, le=3600)] = 120.0


class InstanceMove(Request):
    """Copy its node-local disks to another node and let it run there; alive if it runs."""

    node: Ref
    #: Pool on the target for the disks; default: the same pool.
    pool: Ref | None = None


class GrowDisk(Request):
    """Grow disk ``index`` by ``increment`` or to ``size``; a running guest sees it at once."""

    index: Annotated[int, Field(ge=0, le=63)] = 0
    size: Size | None = None
    increment: Size | None = None


class AddDisk(Request):
    """Make a volume and plug it."""

    disk: DiskSpec
    template: Ref | None = None

    @property
    def only_admins(self) -> str:
        return _foreign([self.disk.image])


class AttachDisk(Request):
    """Plug an existing volume."""

    volume: Ref
    mode: Literal["rw", "ro"] = "rw"


class DetachDisk(Request):
    """Unplug a disk, by index or volume; the volume stays. Also the request of remove-disk, which deletes it."""

    index: Annotated[int, Field(ge=0, le=63)] | None = None
    volume: Ref | None = None
    #: Seconds that a running guest has to let go of it.
    timeout: Annotated[float, Field(gt=0, le=600)] = 20.0


class InstanceModify(Request):
    """Change parameters; they take effect at the next start."""

    memory: Annotated[int, Field(ge=16 * MIB, le=1 << 46)] | None = None
    vcpus: Annotated[int, Field(ge=1, le=512)] | None = None
    os: OsName | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    #: Replaces all network cards.
    nics: list[NicSpec] | None = None


class ActivateDisks(Request):
    """Make the disks usable on the node of a stopped instance, and show their paths; or end that."""

    node: Ref | None = None


class Recreate(Request):
    """Make missing images of the disks again, empty; those that exist are left alone. Only while it does not run."""

    disks: list[Annotated[int, Field(ge=0, le=63)]] = Field(default_factory=list)
