"""A client that writes numbered records into an image of a Ceph cluster, and says which were acknowledged. Run by ``ceph_trial``.

``write IMAGE LOG``: for ever; a line ``NUMBER SECONDS`` in LOG for each record that is durable. ``read IMAGE``: the record in each slot.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
import time
import zlib
from typing import Any

BLOCK, SLOTS = 4096, 2048
CONF, USER = "/etc/atoll/ceph/ceph.conf", "atoll"


def record(number: int) -> bytes:
    """A block that tells its number, and whether it is whole."""
    body = struct.pack("<Q", number) * ((BLOCK - 8) // 8)
    return body + struct.pack("<Q", zlib.crc32(body))


def number_in(block: bytes) -> int:
    """0: never written; -1: broken."""
    if not any(block):
        return 0
    (number,) = struct.unpack_from("<Q", block)
    return int(number) if block == record(number) else -1


def _image(name: str) -> Any:
    import rados
    import rbd

    cluster = rados.Rados(conffile=CONF, rados_id=USER, conf={"rbd_cache": "false"})
    cluster.connect(timeout=60)
    ioctx = cluster.open_ioctx("rbd")
    if name not in rbd.RBD().list(ioctx):
        rbd.RBD().create(ioctx, name, BLOCK * SLOTS, old_format=False)
    return rbd.Image(ioctx, name)


def write(name: str, log: str) -> None:
    """One record after the other, each durable before the next."""
    image, going = _image(name), [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    number = 0
    with open(log, "w", buffering=1) as told:
        while going:
            number += 1
            image.write(record(number), number % SLOTS * BLOCK)
            image.flush()
            told.write(f"{number} {time.monotonic()}\n")
    image.close()


def read(name: str) -> None:
    """Print the record of each slot."""
    image = _image(name)
    print(json.dumps([number_in(image.read(slot * BLOCK, BLOCK)) for slot in range(SLOTS)]))
    image.close()


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
