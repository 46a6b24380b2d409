"""What the driver can: data only."""

from atoll.storage.contract import DriverInfo, Mirroring, Option

INFO = DriverInfo(
    name="fakemirror",
    description="a stand-in for an internally mirrored driver: two copies in a directory that all nodes see; for tests",
    mirroring=Mirroring.INTERNAL,
    access=frozenset({"userspace"}),
    space="per-node",
    adoption="may",
    rename="offline",
    options=(
        Option(name="path", description="directory that holds the images", required=True),
        Option(
            name="mount",
            description="mount point that the directory must lie on; nothing is ever written while it is not mounted",
            default="auto",
        ),
        Option(name="preallocation", description="reserve the space of new images", default="off", choices=("off", "falloc", "full")),
        Option(
            name="locking",
            description="take file locks on open images; 'off' for file systems that cannot (writers becomes none)",
            default="on",
            choices=("on", "off"),
        ),
    ),
)
