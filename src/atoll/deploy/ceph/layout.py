"""What a Ceph cluster consists of, as the store keeps it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Host(BaseModel):
    """A node with daemons: its addresses, the networks' first free choice. ``replica``: for copies; empty: the public one."""

    model_config = ConfigDict(frozen=True)
    id: str
    public: str
    replica: str = ""


class Osd(BaseModel):
    """An OSD: on which node (name), on which disk. ``number`` is Ceph's own; None until it has given one."""

    model_config = ConfigDict(frozen=True)
    uuid: str
    node: str
    disk: str
    number: int | None = None


class Layout(BaseModel):
    """The cluster. ``domain``: copies are kept on different ``host`` or, with one node, different ``osd``."""

    model_config = ConfigDict(frozen=True)
    fsid: str
    name: str
    pool: str
    size: int
    min_size: int
    pg_num: int
    domain: str
    profile: str = "standard"
    public_network: str = ""
    cluster_network: str = ""
    hosts: dict[str, Host] = Field(default_factory=dict)
    mons: list[str] = Field(default_factory=list)
    mgrs: list[str] = Field(default_factory=list)
    osds: list[Osd] = Field(default_factory=list)

    @property
    def mon_host(self) -> str:
        """The monitors' addresses, as configuration files want them."""
        return ",".join(mon_address(self.hosts[name].public) for name in self.mons)

    @property
    def places(self) -> int:
        """On how many different nodes (or, with one node, disks) copies can be."""
        return len({osd.node for osd in self.osds}) if self.domain == "host" else len(self.osds)


def mon_address(address: str) -> str:
    """Both ports of a monitor, as Ceph writes them."""
    host = f"[{address}]" if ":" in address else address
    return f"[v2:{host}:3300,v1:{host}:6789]"
