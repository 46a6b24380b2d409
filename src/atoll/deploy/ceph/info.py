"""What can be said of a Ceph cluster that Atoll makes: data only."""

from atoll.deploy.contract import KindInfo
from atoll.storage.contract import Option

INFO = KindInfo(
    name="ceph",
    description="Ceph: monitors, managers, and an OSD for each disk; with one pool for RBD images",
    options=(
        Option(name="disk", description="the disks of each node, with colons between them, such as `/dev/sdb:/dev/sdc`; they are erased"),
        Option(name="name", description="the storage cluster's name; clients find it as `/etc/atoll/ceph/NAME.conf`", default="ceph"),
        Option(name="pool", description="the Ceph pool that is made for images", default="rbd"),
        Option(name="size", description="copies of each object; empty: 3, or as many as there are nodes if those are fewer"),
        Option(
            name="public_network", description="the network of monitors and clients, such as `10.0.0.0/24`; empty: the nodes' addresses"
        ),
        Option(name="cluster_network", description="a network of its own for copies between OSDs; empty: the public one"),
        Option(name="monitors", description="how many monitors; an odd number; empty: 1, or 3 with three nodes, or 5 with five"),
        Option(
            name="profile",
            description="small: less memory, and quick elections, for labs and trying out",
            default="standard",
            choices=("standard", "small"),
        ),
    ),
)
