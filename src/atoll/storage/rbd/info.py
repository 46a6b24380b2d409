"""What the driver can: data only."""

from atoll.storage.contract import DriverInfo, Mirroring
from atoll.storage.rbd.options import OPTIONS, PARAMETERS

INFO = DriverInfo(
    name="rbd",
    description="images in a Ceph cluster, which QEMU opens by itself (nothing is mapped or mounted on the node), or as block devices",
    mirroring=Mirroring.EXTERNAL,
    access=frozenset({"userspace", "kernelspace"}),
    space="shared",
    adoption="may",
    rename="offline",
    snapshots=True,
    clones=True,
    exclusive_lock=True,
    files=False,
    runs_on="controllers",
    fencing=True,
    health=True,
    observe=True,
    quick=True,
    options=OPTIONS,
    parameters=PARAMETERS,
    data_roles=frozenset({"osd"}),
)
