"""One small real Ceph for all tests of a run, and pools in it."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.lab.smallceph import SmallCeph, missing
from atoll.model.messages import PoolRef

_MON = "profile rbd, " + ", ".join(
    f'allow command "auth {what}" with entity prefix client.atoll-' for what in ("get-or-create", "caps", "del")
)


class Ceph(SmallCeph):
    """The cluster with the users that docs/howto/adopt-a-ceph-cluster.md makes."""

    def pool_ref(self, name: str = "a", **options: str) -> PoolRef:
        """A Ceph pool of its own, its users' keyrings, and how Atoll calls it. ``node1`` works."""
        word = f"{name}{random.SystemRandom().randrange(1 << 32):08x}"
        self.pool(word)
        manager = self.user(f"client.{word}", mon=_MON, osd=f"profile rbd pool={word}")
        guests = self.user(f"client.{word}-guests", mon="allow r", osd=f"profile rbd pool={word}")
        known = {"pool": word, "conf": str(self.conf), "user": word, "keyring": str(manager)}
        known |= {"node_user": f"{word}-guests", "node_keyring": str(guests)}
        return PoolRef(id=f"pool-{word}", name=name, driver="rbd", options={**known, **options}, node="node1", cluster="c")


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
