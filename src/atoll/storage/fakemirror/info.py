"""What the driver can: data only."""

from atoll.storage.contract import DriverInfo, Mirroring
from atoll.storage.files.options import OPTIONS

INFO = DriverInfo(
    name="fakemirror",
    description="a stand-in for an internally mirrored driver: two copies in a directory that all nodes see; for tests",
    mirroring=Mirroring.INTERNAL,
    access=frozenset({"userspace"}),
    space="per-node",
    adoption="may",
    rename="offline",
    options=OPTIONS,
)
