"""``python -m benchmarks.librbd``: librbd called bare, and the ``rbd`` command, in a node. Reads what to do as JSON, and prints
milliseconds (rates, CPU) as JSON. Nothing of Atoll is between, but in ``collector`` and ``blockdev``, which are measured themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import rados
import rbd

from atoll.model.messages import PoolRef
from atoll.storage import registry

GIB = 1 << 30
FEATURES = 61


class Bare:
    """A connection that is kept, as a program would that uses librbd by itself."""

    def __init__(self, options: dict[str, str]) -> None:
        settings = {"keyring": options["keyring"], "rbd_default_clone_format": "2"}
        self.cluster = rados.Rados(conffile=options["conf"], rados_id=options["user"], conf=settings)
        self.cluster.connect(timeout=30)
        self.ioctx = self.cluster.open_ioctx(options["pool"])
        self.rbd = rbd.RBD()

    def create(self, name: str, size: int = GIB) -> None:
        """As large and with the features that Atoll's have."""
        self.rbd.create(self.ioctx, name, size, old_format=False, features=FEATURES)

    def grow(self, name: str) -> None:
        """To twice its size."""
        with rbd.Image(self.ioctx, name) as image:
            image.resize(2 * GIB)

    def snapshot(self, name: str, snapshot: str) -> None:
        """A snapshot of it."""
        with rbd.Image(self.ioctx, name) as image:
            image.create_snap(snapshot)

    def clone(self, name: str, snapshot: str, new: str) -> None:
        """An image that begins with what the snapshot has."""
        self.rbd.clone(self.ioctx, name, snapshot, self.ioctx, new, features=FEATURES)

    def delete(self, name: str) -> None:
        """By way of the trash, where nobody opens it any more."""
        with rbd.Image(self.ioctx, name, read_only=True) as image:
            ident = image.id()
        self.rbd.trash_move(self.ioctx, name, 0)
        self.rbd.trash_remove(self.ioctx, ident)


def timed(call: Callable[..., object], *args: Any) -> float:
    """Its milliseconds."""
    began = time.perf_counter()
    call(*args)
    return (time.perf_counter() - began) * 1000


def operations(options: dict[str, str], rounds: int, prefix: str) -> dict[str, list[float]]:
    """Each operation so many times, in turns."""
    bare, found = Bare(options), {}  # type: Bare, dict[str, list[float]]
    bare.create(f"{prefix}base")
    for number in range(rounds):
        name, snapshot, copy = f"{prefix}{number}", f"{prefix}s{number}", f"{prefix}k{number}"
        found.setdefault("create", []).append(timed(bare.create, name))
        found.setdefault("grow", []).append(timed(bare.grow, name))
        found.setdefault("snapshot", []).append(timed(bare.snapshot, f"{prefix}base", snapshot))
        found.setdefault("clone", []).append(timed(bare.clone, f"{prefix}base", snapshot, copy))
        found.setdefault("delete", []).append(timed(bare.delete, name))
    return found


def commands(options: dict[str, str], rounds: int, prefix: str) -> dict[str, list[float]]:
    """The same by the command line of Ceph."""
    head = ["rbd", "-c", options["conf"], "-n", f"client.{options['user']}", "-k", options["keyring"]]
    found: dict[str, list[float]] = {}

    def run(*words: str) -> None:
        subprocess.run([*head, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)

    def image(name: str) -> str:
        return f"{options['pool']}/{prefix}{name}"

    run("create", "--size", "1G", image("base"))
    for number in range(rounds):
        snapshot = f"{image('base')}@s{number}"
        found.setdefault("create", []).append(timed(run, "create", "--size", "1G", image(str(number))))
        found.setdefault("grow", []).append(timed(run, "resize", "--no-progress", "--size", "2G", image(str(number))))
        found.setdefault("snapshot", []).append(timed(run, "snap", "create", "--no-progress", snapshot))
        found.setdefault("clone", []).append(timed(run, "clone", "--rbd-default-clone-format", "2", snapshot, image(f"k{number}")))
        found.setdefault("attach", []).append(timed(run, "status", image(str(number))))
        found.setdefault("delete", []).append(timed(run, "rm", "--no-progress", image(str(number))))
    return found


def together(options: dict[str, str], rounds: int, prefix: str, threads: int) -> list[float]:
    """Creations a second, all threads at once, over one connection."""
    bare, rates = Bare(options), []
    for number in range(rounds):
        barrier = threading.Barrier(threads + 1)

        def one(name: str, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(60)
            bare.create(name)

        workers = [threading.Thread(target=one, args=(f"{prefix}{number}-{index}",)) for index in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait(60)
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        rates.append(threads / (time.perf_counter() - began))
    return rates


def collector(ref: dict[str, Any], samples: int) -> float:
    """CPU milliseconds of one sample, all threads of the process counted."""
    pool: Any = registry.pool(PoolRef(**ref))
    pool.health()
    before = time.process_time()
    for _ in range(samples):
        pool.health()
    return (time.process_time() - before) / samples * 1000


def blockdev(ref: dict[str, Any], image: str) -> dict[str, Any]:
    """What the connector tells QEMU, word for word."""
    volume = "vol-" + "0" * 17
    connection = registry.pool(PoolRef(**ref)).connection(image, volume, GIB, ref["node"])
    return registry.connector(ref["driver"]).attach(connection, "userspace").model_dump(mode="json")


WHAT: dict[str, Callable[..., Any]] = {f.__name__: f for f in (operations, commands, together, collector, blockdev)}

if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps(WHAT[wanted.pop("what")](**wanted)))
