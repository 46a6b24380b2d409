"""One small real Ceph for all tests of a run, and pools in it."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.lab.smallceph import SmallCeph, missing
from atoll.model.messages import PoolRef

#: Cases for ``make faults``.
LONG = pytest.mark.skipif("ATOLL_FAULT_STEPS" not in os.environ, reason="make faults ONLY=ceph")
_MON = (
    "profile rbd, "
    + ", ".join(f'allow command "auth {what}" with entity prefix client.atoll-' for what in ("get-or-create", "caps", "del"))
    + ', allow command "osd blocklist" with blocklistop=rm'
)


class Ceph(SmallCeph):
    """The cluster with the users that docs/howto/adopt-a-ceph-cluster.md makes."""

    _first: PoolRef | None = None

    def pool_ref(self, name: str = "a", **options: str) -> PoolRef:
        """A Ceph pool of its own, its users' keyrings, and how Atoll calls it. ``node1`` works."""
        word = f"{name}{random.SystemRandom().randrange(1 << 32):08x}"
        self.pool(word)
        manager = self.user(f"client.{word}", mon=_MON, osd=f"profile rbd pool={word}")
        guests = self.user(f"client.{word}-guests", mon="allow r", osd=f"profile rbd pool={word}")
        options = self._node_users(options)
        known = {"pool": word, "conf": str(self.conf), "user": word, "keyring": str(manager)}
        known |= {"node_user": f"{word}-guests", "node_keyring": str(guests)}
        return PoolRef(id=f"pool-{word}", name=name, driver="rbd", options={**known, **options}, node="node1", cluster="c")

    def _node_users(self, options: dict[str, str]) -> dict[str, str]:
        """With isolation: users of nodes, which fetch the keys of their volumes and can do nothing else."""
        if options.get("isolation") != "volume":
            return options
        for node in ("node1", "node2", "node3"):
            right = f'allow command "auth get-key" with entity prefix client.atoll-{node}.vol-'
            self.user(f"client.atoll-{node}", mon=f"allow r, {right}")
        return {"node_user": "atoll-{node}", "node_keyring": f"{self.place}/client.atoll-{{node}}.keyring", **options}

    def namespace_ref(self, name: str = "a", **options: str) -> PoolRef:
        """The same in a namespace of its own of one Ceph pool: made in a tenth of the time."""
        if self._first is None:
            self._first = self.pool_ref("shared")
        word = f"{name}{random.SystemRandom().randrange(1 << 32):08x}"
        self.run("rbd", "namespace", "create", "--pool", self._first.options["pool"], "--namespace", word)
        known = {**self._first.options, "namespace": word, **self._node_users(options)}
        return PoolRef(id=f"pool-{word}", name=name, driver="rbd", options=known, node="node1", cluster="c")

    def client(self, ref: PoolRef, user: str = "admin", keyring: str = "") -> Any:
        """A connection of somebody else's, and the open pool."""
        import rados

        settings = {"keyring": keyring or str(self.place / f"client.{user}.keyring"), "client_mount_timeout": "10"}
        cluster = rados.Rados(conffile=str(self.conf), rados_id=user, conf=settings)
        cluster.connect(timeout=10)
        ioctx = cluster.open_ioctx(ref.options["pool"])
        ioctx.set_namespace(ref.options.get("namespace", ""))
        return cluster, ioctx


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """Up in about a second and a half."""
    if gone := missing():
        pytest.skip(f"not installed: {', '.join(gone)}")
    place = Path(tempfile.mkdtemp(prefix="atoll-c-", dir="/tmp"))
    made = Ceph(place)
    try:
        # Guests that run as another user read the configuration.
        place.chmod(0o755)
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(place, ignore_errors=True)
        assert not os.path.exists(place)
