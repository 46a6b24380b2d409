"""Options of the driver ``rbd``, and what is checked of them without asking Ceph."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from atoll.model.errors import InvalidInput
from atoll.model.messages import PoolRef
from atoll.storage.contract import Option

OPTIONS = (
    Option(name="pool", description="the Ceph pool that holds the images", required=True),
    Option(name="namespace", description="the RBD namespace in it; empty: the pool's default namespace"),
    Option(name="conf", description="Ceph's configuration file, the same path on every node", default="/etc/ceph/ceph.conf"),
    Option(name="user", description="the Ceph user that manages images, without `client.`", default="atoll"),
    Option(name="keyring", description="its keyring on nodes that manage storage; empty: /etc/ceph/ceph.client.USER.keyring"),
    Option(
        name="node_user", description="the Ceph user that guests use, without `client.`; `{node}` is the node's name", default="atoll-node"
    ),
    Option(name="node_keyring", description="its keyring on every node; empty: /etc/ceph/ceph.client.USER.keyring"),
    Option(
        name="isolation",
        description="volume: each attached volume has a Ceph user of its own, which can do nothing else, and node_user only fetches "
        "its key; none: guests use node_user itself",
        default="none",
        choices=("none", "volume"),
    ),
    Option(
        name="mint_user",
        description="with isolation=volume: the Ceph user that makes the users of volumes and can do nothing else, without `client.`; "
        "empty: the managing user does that, too",
    ),
    Option(name="mint_keyring", description="its keyring on nodes that manage storage; empty: /etc/ceph/ceph.client.USER.keyring"),
    Option(name="features", description="features of new images, as a number", default="61"),
    Option(name="data_pool", description="the Ceph pool for the data of new images, such as an erasure-coded one; empty: the same"),
)
PARAMETERS = (
    Option(
        name="access",
        description="how guests reach their disks. userspace: QEMU opens the image by itself; kernelspace: QEMU is given a block device, "
        "made with krbd, else with rbd-nbd, else with FUSE and a loop device, whichever the node can do first",
        default="userspace",
        choices=("userspace", "kernelspace"),
    ),
)
#: layering, exclusive-lock, object-map, fast-diff, deep-flatten; others are for mirroring and for the kernel.
_KNOWN_FEATURES = 0x1FF
LAYERING, EXCLUSIVE_LOCK, FAST_DIFF = 1, 4, 16
_WORD = re.compile(r"[A-Za-z0-9._-]+\Z")


@dataclass(frozen=True)
class RbdOptions:
    """A pool's options, checked."""

    pool: str
    namespace: str
    conf: str
    user: str
    keyring: str
    node_user: str
    node_keyring: str
    isolated: bool
    features: int
    data_pool: str
    #: Who makes users of volumes; empty: the managing user.
    mint_user: str = ""
    mint_keyring: str = ""

    @property
    def where(self) -> str:
        """The pool in Ceph's own notation, for messages."""
        return f"{self.pool}/{self.namespace}" if self.namespace else self.pool


def parse(ref: PoolRef) -> RbdOptions:
    """The options of a pool with their defaults. Errors: InvalidInput names the option and what it takes."""
    values = {option.name: ref.options.get(option.name) or option.default for option in OPTIONS}
    if not values["pool"]:
        raise InvalidInput(f"pool {ref.name} names no Ceph pool", hint="pool=vms")
    for option in OPTIONS:
        if option.choices and values[option.name] not in option.choices:
            raise InvalidInput(f"option {option.name} is one of {', '.join(option.choices)}, not {values[option.name]!r}")
    for name in ("pool", "namespace", "data_pool", "user", "mint_user"):
        if values[name] and not _WORD.match(values[name]):
            raise InvalidInput(f"option {name} of pool {ref.name} is a name of Ceph's, not {values[name]!r}")
    for name in ("node_user", "node_keyring"):
        values[name] = values[name].replace("{node}", ref.node or "node")
    if not _WORD.match(values["node_user"]):
        raise InvalidInput(f"option node_user of pool {ref.name} is a name of Ceph's, not {values['node_user']!r}")
    for name, user in (("keyring", "user"), ("node_keyring", "node_user"), ("mint_keyring", "mint_user")):
        values[name] = values[name] or f"/etc/ceph/ceph.client.{values[user]}.keyring"
    for name in ("conf", "keyring", "node_keyring", "mint_keyring"):
        if not os.path.isabs(values[name]):
            raise InvalidInput(f"option {name} of pool {ref.name} is not an absolute path: {values[name]!r}")
    try:
        features = int(values["features"], 0)
    except ValueError:
        raise InvalidInput(f"option features is a number, not {values['features']!r}", hint="features=61") from None
    if features & ~_KNOWN_FEATURES or not features & EXCLUSIVE_LOCK:
        raise InvalidInput(
            f"images with the features {features} cannot be used: exclusive-lock (4) must be there, and nothing above {_KNOWN_FEATURES}",
            hint="features=61",
        )
    return RbdOptions(
        pool=values["pool"],
        namespace=values["namespace"],
        conf=values["conf"],
        user=values["user"],
        keyring=values["keyring"],
        node_user=values["node_user"],
        node_keyring=values["node_keyring"],
        isolated=values["isolation"] == "volume",
        features=features,
        data_pool=values["data_pool"],
        mint_user=values["mint_user"],
        mint_keyring=values["mint_keyring"],
    )
