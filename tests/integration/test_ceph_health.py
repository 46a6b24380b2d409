"""Samples of a real Ceph's health, by the driver in a pool's worker: full, a dead OSD, a lost manager, silent monitors."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from atoll.lab.smallceph import missing
from atoll.model.errors import AtollError, PoolFull
from atoll.model.health import Health
from atoll.model.messages import PoolRef
from atoll.storage.host import StorageHost
from ceph_support import LONG, Ceph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
#: Cases for ``make faults``: tests/integration/test_cluster_rbd.py has a short one.
#: Seconds that Ceph gets to notice something, on a busy machine.
NOTICES = 60.0


@pytest.fixture(scope="module")
def watched() -> Iterator[Ceph]:
    """A cluster with a manager, which is broken on purpose."""
    place = Path(tempfile.mkdtemp(prefix="atoll-c-", dir="/tmp"))
    made = Ceph(place, size=1 << 28)
    try:
        made.up(manager=True)
        # Else half a minute.
        made.run("ceph", "config", "set", "mon", "mon_mgr_beacon_grace", "6")
        yield made
    finally:
        made.down()
        shutil.rmtree(place, ignore_errors=True)


class Watcher:
    """Samples as an agent takes them."""

    def __init__(self, ceph: Ceph, ref: PoolRef, host: StorageHost) -> None:
        self.ceph, self.ref, self._host = ceph, ref, host

    async def sample(self, deadline: float = 30.0) -> Health:
        return Health(**await self._host.pool(self.ref, "health", deadline))

    async def until(self, what: Callable[[Health], object]) -> Health:
        """The first sample of which that is so."""
        end = time.monotonic() + NOTICES
        while not what(found := await self.sample()):
            assert time.monotonic() < end, found
            await asyncio.sleep(0.1)
        return found

    def ratios(self, nearfull: float, full: float) -> None:
        cluster, _ = self.ceph.client(self.ref)
        ratios = {"nearfull": nearfull, "backfillfull": (nearfull + full) / 2, "full": full}
        for name, ratio in ratios.items():
            code, _, words = cluster.mon_command(json.dumps({"prefix": f"osd set-{name}-ratio", "ratio": ratio}), b"")
            assert code == 0, words
        cluster.shutdown()


@pytest.fixture(scope="module")
def ref(watched: Ceph) -> PoolRef:
    return watched.pool_ref("health")


@pytest_asyncio.fixture
async def watcher(watched: Ceph, ref: PoolRef) -> AsyncIterator[Watcher]:
    host = StorageHost()
    yield Watcher(watched, ref, host)
    await host.close()


async def test_a_sample_of_what_is_well_is_cheap(watcher: Watcher) -> None:
    user = watcher.ref.options["user"]
    found = await watcher.until(lambda s: s.status == "ok" and s.total and not s.pgs_inactive)
    assert (found.osds, found.osds_up, found.osds_in, found.monitors, found.quorum) == (1, 1, 1, 1, ("a",))
    assert found.manager
    assert found.pgs_inactive == 0
    assert sum(found.pgs.values()) >= 8
    assert not found.refusals
    # Its user may not ask the manager, and the sample says what to type.
    assert found.client is None
    assert f"client.{user} ask: ceph auth caps" in found.figures
    mon, osd = (watcher.ceph.ask("auth", "get", f"client.{user}")[0]["caps"][part] for part in ("mon", "osd"))
    mgr = f"profile rbd pool={watcher.ref.options['pool']}, allow r"
    watcher.ceph.run("ceph", "auth", "caps", f"client.{user}", "mon", mon, "osd", osd, "mgr", mgr)


async def test_the_manager_tells_latency_and_rates(watcher: Watcher) -> None:
    found = await watcher.until(lambda s: s.commit_latency is not None)
    assert found.figures == ""
    assert found.client is not None
    pool = watcher.ref.options["pool"]
    watcher.ceph.run("rbd", "create", f"{pool}/bench", "--size", "64M")
    watcher.ceph.run("rbd", "bench", f"{pool}/bench", "--io-type", "write", "--io-size", "64K", "--io-total", "48M")
    await watcher.until(lambda s: s.client and s.client.writes and s.client.write_bytes > 1 << 16)
    assert (await watcher.sample()).cpu_seconds > 0


@LONG
async def test_nearly_full_and_full_are_told_apart(watcher: Watcher) -> None:
    pool = watcher.ref.options["pool"]
    used = (await watcher.until(lambda s: s.used and s.total and s.used / s.total > 0.15)).used
    assert used is not None
    watcher.ratios(0.1, 0.9)
    found = await watcher.until(lambda s: s.refusals)
    assert [r.code for r in found.refusals] == ["POOL_NEARFULL"]
    assert found.refusals[0].reason == f"Ceph pool {pool} is nearly full: an OSD of it has reached 10%"
    assert (found.status, found.nearfull_ratio) == ("warning", 0.1)
    watcher.ratios(0.1, 0.12)
    found = await watcher.until(lambda s: s.status == "error")
    assert [r.code for r in found.refusals] == ["POOL_FULL", "OSD_FULL"]
    assert found.refusals[0].reason == f"Ceph pool {pool} is full: an OSD of it has reached 12%"
    assert found.refusals[1].reason == "Ceph is in HEALTH_ERR, OSD_FULL: 1 full osd(s)"
    watcher.ratios(0.85, 0.95)
    await watcher.until(lambda s: s.status == "ok" and not s.refusals)


async def test_a_manager_that_is_lost_costs_its_patience_and_nothing_else(watcher: Watcher) -> None:
    await watcher.until(lambda s: s.manager and s.client)
    watcher.ceph.signal("mgr", signal.SIGSTOP)
    found = await watcher.until(lambda s: s.figures)
    assert found.figures.startswith("Ceph's manager gives no answer"), "the monitors have not noticed yet: a question to it hangs"
    assert (found.client, found.commit_latency) == (None, None)
    assert found.osds_up == 1
    found = await watcher.until(lambda s: not s.manager)
    assert found.figures.startswith("Ceph has no active manager")
    assert not found.refusals
    # It comes back while a question of ours still hangs: the late answer harms nobody.
    watcher.ceph.signal("mgr", signal.SIGCONT)
    await watcher.until(lambda s: s.manager and s.client)


@LONG
async def test_monitors_that_are_silent_end_the_sample_not_the_worker(watcher: Watcher) -> None:
    await watcher.sample()
    watcher.ceph.signal("mon", signal.SIGSTOP)
    try:
        with pytest.raises(AtollError, match="no answer"):
            await watcher.sample()
    finally:
        watcher.ceph.signal("mon", signal.SIGCONT)
    await watcher.until(lambda s: s.status == "ok")


async def test_on_a_full_ceph_what_makes_room_is_done_and_what_takes_room_is_refused_at_once(watcher: Watcher) -> None:
    """Ceph's own way is to let either wait until there is room."""
    ref, host = watcher.ref, watcher._host
    names = []
    await host.pool(ref, "prepare", 60.0, create=True)
    others = await host.pool(ref, "volumes", 60.0)
    for number in range(3):
        spec = {"volume": f"vol-{number:017x}", "name": "full", "size": 8 << 20, "options": {}}
        names.append(await host.pool(ref, "create", 60.0, spec=spec))
    snapshot = await host.pool(ref, "snapshot", 60.0, logical_id=names[1], snapshot="snap-" + "1" * 17)
    before = await host.pool(ref, "volumes", 60.0)
    assert len(before) == len(others) + 3
    watcher.ratios(0.000001, 0.000002)
    await watcher.until(lambda health: any(refusal.code == "POOL_FULL" for refusal in health.refusals))
    spec = {"volume": f"vol-{9:017x}", "name": "full", "size": 8 << 20, "options": {}}
    with pytest.raises(PoolFull, match=r"full|no space left"):
        await host.pool(ref, "create", 60.0, spec=spec)
    with pytest.raises(PoolFull, match="no space left"):
        await host.pool(ref, "rename", 60.0, logical_id=names[0], volume=f"vol-{0:017x}", name="other")
    await host.pool(ref, "delete_snapshot", 60.0, snapshot=snapshot["snapshot"], logical_id=snapshot["logical_id"])
    for name in names:
        await host.pool(ref, "delete", 60.0, logical_id=name)
    assert await host.pool(ref, "volumes", 60.0) == others
    assert await host.pool(ref, "waiting", 60.0) == []
    watcher.ratios(0.85, 0.95)
    await watcher.until(lambda health: not health.refusals)
    assert await host.pool(ref, "create", 60.0, spec=spec)
    await host.pool(ref, "delete", 60.0, logical_id=f"full.{spec['volume']}")


async def test_a_dead_osd_refuses_volumes_though_other_calls_hang(watcher: Watcher) -> None:
    watcher.ceph.end("osd")
    watcher.ceph.run("ceph", "osd", "down", "0")
    found = await watcher.until(lambda s: s.osds_up == 0 and s.refusals)
    refusal = next(r for r in found.refusals if r.code == "PG_AVAILABILITY")
    assert "placement groups do not work" in refusal.reason
    assert "stale" in refusal.reason
    assert refusal.grace > 0
    # Whatever needs an OSD hangs, and the pool is stalled: it is sampled all the same.
    with pytest.raises(AtollError):
        await watcher._host.pool(watcher.ref, "volumes", 5.5)
    assert watcher._host.stalled()
    assert (await watcher.sample()).osds_up == 0
