"""A Ceph pool that is only looked at: what is seen of it, with rights that allow no more, and that nothing is ever written there."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from atoll.lab.smallceph import missing
from atoll.model.errors import PoolObserved
from atoll.model.messages import PoolRef
from atoll.storage import calls, registry
from atoll.storage.contract import LOOKS, ObservingPool
from atoll.storage.host import StorageHost
from ceph_support import Ceph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
MIB = 1 << 20
VOLUME = "vol-" + "1" * 17


def everything(ceph: Ceph, ref: PoolRef) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Every object of the Ceph pool: its version, which grows with each write, size, and what hangs on it; and who watches images."""
    import rados
    import rbd

    cluster, ioctx = ceph.client(ref)
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    try:
        ioctx.set_namespace(rados.LIBRADOS_ALL_NSPACES)
        names = [(entry.nspace, entry.key) for entry in ioctx.list_objects()]
        for namespace, name in names:
            ioctx.set_namespace(namespace)
            size, _ = ioctx.stat(name)
            version = ioctx.get_last_version()
            with rados.ReadOpCtx() as operation:
                values, _ = ioctx.get_omap_vals(operation, "", "", 1000)
                ioctx.operate_read_op(operation, name)
                omap = hashlib.sha256(repr(sorted(values)).encode()).hexdigest()
            found[namespace, name] = (size, version, omap, sorted(ioctx.get_xattrs(name)))
        ioctx.set_namespace("")
        for name in rbd.RBD().list(ioctx):
            with rbd.Image(ioctx, name, read_only=True) as image:
                found["watchers of", name] = tuple(sorted(watcher["addr"] for watcher in image.watchers_list()))
    finally:
        ioctx.close()
        cluster.shutdown()
    return found


class Strange:
    """Somebody's pool with images, one of which he has open, and our look at it."""

    def __init__(self, ceph: Ceph, name: str, mon: str, osd: str) -> None:
        import rbd

        given = ceph.pool_ref("theirs")
        word = given.options["pool"]
        keyring = ceph.user(f"client.{word}-{name}", mon=mon, osd=osd.format(pool=word))
        options = {"pool": word, "conf": given.options["conf"], "user": f"{word}-{name}", "keyring": str(keyring)}
        self.ceph = ceph
        self.ref = PoolRef(id=f"pool-{word}", name="theirs", driver="rbd", options=options, node="node1", cluster="c", observed=True)
        self.cluster, self.ioctx = ceph.client(given)
        rbd.RBD().create(self.ioctx, "alone", 4 * MIB, old_format=False, features=61)
        rbd.RBD().create(self.ioctx, f"web.{VOLUME}", 8 * MIB, old_format=False, features=61)
        self.busy = rbd.Image(self.ioctx, "alone")
        self.busy.write(b"x" * 512, 0)
        self.busy.create_snap("byhand")
        self.cluster.conf_set("rbd_default_clone_format", "2")
        rbd.RBD().clone(self.ioctx, "alone", "byhand", self.ioctx, "copy", features=61)

    def close(self) -> None:
        self.busy.close()
        self.ioctx.close()
        self.cluster.shutdown()


@pytest.fixture(params=["may only read", "may write"], scope="module")
def strange(ceph: Ceph, request: pytest.FixtureRequest) -> Any:
    """Rights to write change nothing: it is we who do not."""
    if request.param == "may only read":
        made = Strange(ceph, "looker", "profile rbd-read-only", "profile rbd-read-only pool={pool}")
    else:
        made = Strange(ceph, "writer", "profile rbd", "profile rbd pool={pool}")
    yield made
    made.close()


@pytest_asyncio.fixture
async def host() -> AsyncIterator[StorageHost]:
    """Workers, as an agent has them."""
    made = StorageHost()
    yield made
    await made.close()


async def test_what_is_there_is_seen_and_nothing_is_written(host: StorageHost, strange: Strange) -> None:
    before = everything(strange.ceph, strange.ref)
    assert len(before) > 8
    ref = strange.ref
    assert (await host.pool(ref, "check", 30.0))["ok"]
    images = await host.pool(ref, "images", 30.0)
    assert [(image["name"], image["size"], image["volume"]) for image in images] == [
        ("alone", 4 * MIB, None),
        ("copy", 4 * MIB, None),
        (f"web.{VOLUME}", 8 * MIB, VOLUME),
    ]
    alone, copy, web = images
    assert len(alone["writers"]) == 1
    assert alone["writers"][0].startswith("the Ceph client at 127.0.0.1:")
    assert (alone["snapshots"], alone["parent"], copy["parent"], web["writers"]) == (["byhand"], "", "alone@byhand", [])
    assert [image["logical_id"] for image in await host.pool(ref, "volumes", 30.0)] == ["alone", "copy", f"web.{VOLUME}"]
    stat = await host.pool(ref, "stat", 30.0, logical_id="alone")
    assert stat["size"] == 4 * MIB
    assert len(await host.pool(ref, "writers", 30.0, logical_id="alone")) == 1
    assert (await host.pool(ref, "health", 30.0))["osds_up"] == 1
    assert await host.pool(ref, "snapshots", 30.0) == []
    assert await host.pool(ref, "waiting", 30.0) == []
    with pytest.raises(PoolObserved):
        await host.pool(ref, "prepare", 30.0, create=True)
    assert everything(strange.ceph, ref) == before


def test_whatever_might_write_is_refused_before_it_begins(strange: Strange) -> None:
    """Every method of the pool half, asked as an agent's worker asks it, is one that only looks, or refused."""
    before = everything(strange.ceph, strange.ref)
    pool = registry.pool(strange.ref)
    assert isinstance(pool, ObservingPool)
    methods = [name for name in dir(pool) if not name.startswith("_") and callable(getattr(pool, name))]
    writing = sorted(set(methods) - LOOKS)
    assert {"create", "delete", "grow", "prepare", "mark", "forget", "fence", "note", "probe_writers", "connection", "flatten"} <= set(
        writing
    )
    for method in writing:
        with pytest.raises(PoolObserved, match="only observed"):
            calls.pool_call(strange.ref.model_dump(mode="json"), method, {})
    assert everything(strange.ceph, strange.ref) == before


def test_the_comparison_sees_the_smallest_write(strange: Strange) -> None:
    """Also somebody who opens an image for writing, and writes nothing."""
    import rbd

    before = everything(strange.ceph, strange.ref)
    with rbd.Image(strange.ioctx, "copy") as image:
        assert everything(strange.ceph, strange.ref) != before
        image.metadata_set("key", "value")
    changed = everything(strange.ceph, strange.ref)
    assert changed != before
    assert {key for key in before if key[0] == "watchers of" and changed[key] != before[key]} == set()
