"""The pool half: a Ceph pool (or an RBD namespace in it), by way of librbd."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from atoll.model.errors import AtollError, NotSupported, PoolUnavailable
from atoll.model.health import Health
from atoll.model.messages import Connection, ImageSeen, PoolRef, PoolStatus, Readiness, SnapshotStat, Space, VolumeStat, Waiting, Writer
from atoll.storage.contract import VolumeSpec
from atoll.storage.rbd import connections, options

connections.available()

import rbd  # noqa: E402

from atoll.storage.rbd import clients, health, images, marks, minting, snaps, space  # noqa: E402

_PROBE_SIZE = 1 << 20
#: Probes that this process holds open: pool -> connection and image.
_held: dict[str, tuple[connections.Link, Any]] = {}


class Pool:
    """See ``PoolDriver``."""

    def __init__(self, ref: PoolRef) -> None:
        self.ref = ref

    @property
    def _options(self) -> options.RbdOptions:
        return options.parse(self.ref)

    @contextlib.contextmanager
    def _using(self, what: str, *, unmarked: bool = False) -> Any:
        chosen = self._options
        with connections.using(chosen, what) as link:
            # Nothing is written to what is only looked at, and it may be anybody's.
            if not unmarked and not self.ref.observed:
                marks.check(link.ioctx, self.ref, chosen.where)
                clients.introduce(link, self.ref.node)
            yield link

    def prepare(self, *, create: bool) -> PoolStatus:
        """See ``PoolDriver``."""
        with self._using("preparing the pool", unmarked=create) as link:
            if create:
                marks.write(link.ioctx, self.ref, self._options.where)
            if not self.ref.observed:
                marks.make_trash(link.ioctx)
        return self.check()

    def mark(self, expected: list[str]) -> None:
        """See ``PoolDriver``."""
        where = self._options.where
        with self._using("marking the pool", unmarked=True) as link:
            present = set(rbd.RBD().list(link.ioctx))
            if expected and not present & set(expected):
                raise PoolUnavailable(
                    f"none of the {len(expected)} images of pool {self.ref.name} is in Ceph pool {where}: this is not its place",
                    hint=f"look at the option conf of the pool: atoll pool info {self.ref.name}",
                )
            marks.write(link.ioctx, self.ref, where)

    def forget(self) -> None:
        """See ``PoolDriver``."""
        with self._using("removing the mark", unmarked=True) as link:
            if marks.remove(link.ioctx, self.ref, self._options.where):
                with contextlib.suppress(rbd.ImageNotFound):
                    rbd.RBD().remove(link.ioctx, self._probe)

    def check(self) -> PoolStatus:
        """See ``PoolDriver``."""
        try:
            with self._using("looking at the pool") as link:
                details = space.details(link, self._options)
            try:
                room = self.space()
            except PoolUnavailable as error:
                return PoolStatus(ok=True, details={**details, "space": error.message})
            return PoolStatus(ok=True, space=room, details=details)
        except AtollError as error:
            return PoolStatus(ok=False, reason=error.message)

    def space(self) -> Space:
        """See ``PoolDriver``."""
        with self._using("asking for its space") as link:
            return space.space(link, self._options)

    def health(self) -> Health:
        """See ``WatchedPool``."""
        return health.take(self._options)

    def create(self, spec: VolumeSpec) -> str:
        """See ``PoolDriver``."""
        with self._using(f"making the image of {spec.volume}") as link:
            with contextlib.suppress(PoolUnavailable):
                images.refuse_full(space.space(link, self._options).free, self._options)
            return images.create(link, self._options, spec)

    def delete(self, logical_id: str) -> None:
        """See ``PoolDriver``."""
        with self._using(f"deleting image {logical_id}") as link:
            images.delete(link, logical_id, self.ref.id)

    def grow(self, logical_id: str, size: int) -> int:
        """See ``PoolDriver``."""
        with self._using(f"growing image {logical_id}") as link:
            return images.grow(link, logical_id, size)

    def rename(self, logical_id: str, volume: str, name: str) -> str:
        """See ``PoolDriver``."""
        with self._using(f"renaming image {logical_id}") as link:
            return images.rename(link, logical_id, volume, name)

    def stat(self, logical_id: str) -> VolumeStat | None:
        """See ``PoolDriver``."""
        with self._using(f"looking at image {logical_id}") as link:
            return images.describe(link, logical_id)

    def volumes(self) -> list[VolumeStat]:
        """See ``PoolDriver``."""
        with self._using("listing images") as link:
            return images.everything(link)

    def images(self) -> list[ImageSeen]:
        """See ``ObservingPool``."""
        with self._using("listing images") as link:
            return images.seen(link)

    def snapshot(self, logical_id: str, snapshot: str) -> SnapshotStat:
        """See ``SnapshotPool``."""
        with self._using(f"making a snapshot of image {logical_id}") as link:
            return snaps.take(link, logical_id, snapshot)

    def delete_snapshot(self, snapshot: str, logical_id: str = "", source: str = "") -> None:
        """See ``SnapshotPool``."""
        with self._using(f"deleting snapshot {snapshot}") as link:
            snaps.remove(link, snapshot, logical_id, source, self.ref.id)

    def snapshots(self) -> list[SnapshotStat]:
        """See ``SnapshotPool``."""
        with self._using("listing snapshots") as link:
            return snaps.everything(link)

    def clone(self, spec: VolumeSpec, snapshot: str) -> str:
        """See ``SnapshotPool``."""
        with self._using(f"making the image of {spec.volume} from a snapshot") as link:
            with contextlib.suppress(PoolUnavailable):
                images.refuse_full(space.space(link, self._options).free, self._options)
            return snaps.clone(link, self._options, spec, snapshot, self.ref.id)

    def flatten(self, logical_id: str) -> bool:
        """See ``SnapshotPool``."""
        with self._using(f"copying what image {logical_id} reads of others") as link:
            return snaps.flatten(link, self._options, logical_id, self.ref.id)

    def waiting(self) -> list[Waiting]:
        """See ``SnapshotPool``."""
        with self._using("looking at what was deleted") as link:
            return snaps.waiting(link, self.ref.id)

    def adopt(self, source: str, volume: str) -> VolumeStat:
        """See ``PoolDriver``. The image keeps its name."""
        with self._using(f"looking at image {source}") as link:
            return images.adopt(link, source)

    def writers(self, logical_id: str) -> list[Writer]:
        """See ``PoolDriver``. Connections of agents are none."""
        with self._using(f"asking who has image {logical_id} open") as link, clients.opened(link, logical_id) as image:
            return [Writer(who=f"the Ceph client at {address}") for address in clients.strangers(link, image)]

    def note(self, logical_id: str, node: str = "") -> list[str]:
        """See ``FencingPool``."""
        with self._using(f"asking who has image {logical_id} open") as link:
            return clients.note(link, logical_id, node)

    def readmit(self, node: str) -> list[str]:
        """See ``FencingPool``."""
        with self._using(f"letting clients of node {node} in again") as link:
            return clients.readmit(link, node)

    def fence(self, logical_id: str, whom: clients.Whom, volume: str = "") -> list[str]:
        """See ``FencingPool``."""
        with self._using(f"shutting out who may write image {logical_id}") as link:
            if volume and whom != "none":
                minting.revoke(link, self._options, volume)
            return clients.fence(link, logical_id, whom)

    def ready(self, logical_id: str, whom: clients.Whom, volume: str = "") -> Readiness:
        """See ``FencingPool``."""
        with self._using(f"making image {logical_id} ready") as link:
            if volume and whom != "none":
                minting.revoke(link, self._options, volume)
            stat, quiet = images.glance(link, logical_id, whom)
            if stat is None or quiet:
                return Readiness(stat=stat)
            out = clients.fence(link, logical_id, whom)
        return Readiness(stat=stat, out=out, writers=self.writers(logical_id))

    def revoke(self, volume: str, node: str = "") -> None:
        """See ``FencingPool``."""
        chosen = options.parse(self.ref.model_copy(update={"node": node or self.ref.node}))
        with self._using(f"ending rights for {volume}") as link:
            minting.revoke(link, chosen, volume, minting.user_of(chosen.node_user, volume) if node else "")

    @property
    def _probe(self) -> str:
        return f"{images.HIDDEN}{self.ref.id}"

    def probe_writers(self, action: Literal["hold", "look", "drop"]) -> bool:
        """See ``PoolDriver``. Here the agents' own connections count."""
        key = f"{self.ref.id} {self._options.where}"
        with self._using("measuring who is seen") as link:
            if action != "look" and key in _held:
                owner, image = _held.pop(key)
                if owner is link:
                    image.close()
                else:
                    connections.abandon(image)
            if action == "drop":
                return True
            if action == "hold":
                with contextlib.suppress(rbd.ImageExists):
                    features = options.LAYERING | options.EXCLUSIVE_LOCK
                    rbd.RBD().create(link.ioctx, self._probe, _PROBE_SIZE, old_format=False, features=features)
                image = clients.opened(link, self._probe, read_only=False)
                _held[key] = link, image
                image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
                return True
            try:
                image = rbd.Image(link.ioctx, self._probe, read_only=True)
            except rbd.ImageNotFound:
                return False
            with image:
                return bool(clients.watchers(image))

    def connection(self, logical_id: str, volume: str, size: int, node: str = "") -> Connection:
        """See ``PoolDriver``. The keyring is the one of the node that attaches: only its path is told."""
        chosen = options.parse(self.ref.model_copy(update={"node": node or self.ref.node}))
        image = connections.check_name(logical_id)
        data = {"conf": chosen.conf, "pool": chosen.pool, "namespace": chosen.namespace, "image": image, "user": chosen.node_user}
        with self._using(f"letting node {node} use image {image}") as link:
            space.refuse_full(link, chosen)
            if chosen.isolated:
                data |= {"user": minting.grant(link, chosen, image, volume), "node_user": chosen.node_user}
        secrets = {"keyring": f"file:{chosen.node_keyring}"}
        return Connection(driver=self.ref.driver, volume=volume, size=size, data=data, secrets=secrets)

    def sync(self, logical_id: str, primary: str, secondary: str) -> None:
        """See ``PoolDriver``."""
        raise NotSupported(f"driver {self.ref.driver} keeps no second copy")
