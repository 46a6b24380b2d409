"""What the driver can: data only."""

from atoll.storage.contract import DriverInfo, Mirroring
from atoll.storage.files.options import OPTIONS

INFO = DriverInfo(
    name="sharedfile",
    description="images as regular files on a file system that all nodes mount under one path",
    mirroring=Mirroring.EXTERNAL,
    access=frozenset({"userspace"}),
    space="shared",
    adoption="may",
    rename="offline",
    options=OPTIONS,
)
