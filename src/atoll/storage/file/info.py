"""What the driver can: data only."""

from atoll.storage.contract import DriverInfo, Mirroring
from atoll.storage.files.options import OPTIONS

INFO = DriverInfo(
    name="file",
    description="images as regular files on one node's own file system",
    mirroring=Mirroring.NONE,
    access=frozenset({"userspace"}),
    space="per-node",
    adoption="may",
    rename="offline",
    options=OPTIONS,
)
