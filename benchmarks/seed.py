"""``python -m benchmarks.seed FIRST COUNT``, in the master's node while no master runs: stopped instances as if they had been added.

Each with a disk and its image on the pool ``shared``, a claim that was freed, and the job that made it, with its journal.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from atoll.master.setup import store_dir
from atoll.model.objects import (
    Claim,
    Disk,
    Group,
    IdempotencyKey,
    Instance,
    Job,
    JobState,
    Locks,
    Node,
    Pool,
    Step,
    StepState,
    Stored,
    Volume,
    VolumeState,
)
from atoll.runtime.config import load
from atoll.store.cache import LeaderStore
from atoll.store.sqlite import SqliteStore

GIB = 1 << 30
#: Steps in the journal of a real ``instance.add``.
STEPS = 13
TOGETHER = 50


async def seed(first: int, count: int) -> None:
    """Write them, many in each transaction."""
    store = await SqliteStore.open(store_dir(load()))
    leader = await LeaderStore.open(store)
    group, pool = leader.all(Group)[0].id, next(p for p in leader.all(Pool) if p.name == "shared")
    nodes = [node.id for node in leader.all(Node)]
    jobs = max((job.number for job in leader.all(Job)), default=0)
    images = os.open(Path(pool.options["path"]), os.O_RDONLY | os.O_DIRECTORY)
    batch: list[Stored] = []
    for number in range(first, first + count):
        batch += _one(number, jobs + number - first + 1, group, pool, nodes[number % len(nodes)], images)
        if (number + 1) % TOGETHER == 0:
            await leader.write(put=batch)
            batch = []
    await leader.write(put=batch)
    os.close(images)
    await store.close()


def _one(number: int, job: int, group: str, pool: Pool, node: str, images: int) -> list[Stored]:
    name, ident, disk = f"seed{number}", f"i-{number:017x}", f"vol-{number:017x}"
    logical = f"{name}-disk0.{disk}.raw"
    handle = os.open(logical, os.O_WRONLY | os.O_CREAT, 0o660, dir_fd=images)
    os.ftruncate(handle, GIB)
    os.close(handle)
    request = {
        "name": name, "template": "shared",
        "disks": [{"size": GIB, "pool": None, "adopt": None, "mode": "rw", "name": None, "options": {}}],
        "nics": [], "memory": 64 << 20, "vcpus": 1, "node": node, "secondary": None, "group": None, "os": "", "start": True,
        "kernel": "", "initrd": "", "append": "", "tags": [],
    }  # fmt: skip
    ref = {"id": pool.id, "name": pool.name, "driver": pool.driver, "options": pool.options, "node": "node1", "cluster": "0" * 64}
    steps = [
        Step(
            id=f"{job:010d}/{index:04d}", key=f"create image/{disk} {index}", what="call", node=node, method="volume.create",
            args_hash=f"{index:032x}", undo={"method": "volume.uncreate", "args": {"ref": ref, "volume": disk}, "node": node, "dies": False,
            "local": False, "deadline": 60.0}, state=StepState.DONE, result=logical, at=1.0,
        )
        for index in range(STEPS)
    ]  # fmt: skip
    ended = Job(
        id=f"{job:010d}", operation="instance.add", request=request, state=JobState.DONE, key=f"{number:064x}", who="root", created=1.0,
        started=1.0, ended=2.0, result={"instance": ident, "name": name, "node": "node1", "volumes": [disk]},
        locks=Locks(shared=(pool.resource, f"group:{group}", f"node:{node}"), exclusive=(f"name:instance:{name}",)),
        summary=f"add instance {name} (1G)",
    )  # fmt: skip
    volume = Volume(
        id=disk, name=f"{name}-disk0", pool=pool.id, size=GIB, logical_id=logical, state=VolumeState.IN_USE, instance=ident, created=1.0
    )  # fmt: skip
    disks = (Disk(volume=disk, slot=0),)
    return [
        volume,
        Instance(id=ident, name=name, group=group, memory=64 << 20, hypervisor="fake", disks=disks, home=node, created=1.0),
        Claim(id=ident, generation=1),
        IdempotencyKey(id=f"{number:064x}", job=job, digest=f"{number:032x}"),
        ended,
        *steps,
    ]


if __name__ == "__main__":
    asyncio.run(seed(int(sys.argv[1]), int(sys.argv[2])))
