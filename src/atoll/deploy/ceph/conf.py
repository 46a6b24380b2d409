"""The texts of Ceph's files: configuration and keyrings."""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Mapping

from atoll.deploy.ceph.layout import Layout

_MARK = "# Made by Atoll. Changes by hand are lost when it makes the file again."
#: For labs: memory of a few hundred MiB per node, elections and map changes at once, and an OSD that is killed often is still welcome.
_SMALL = """\
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_election_timeout = 1
mon_probe_timeout = 1
mon_tick_interval = 1
mon_mgr_digest_period = 1
mgr_stats_period = 1
mgr_tick_period = 1
mon_client_hunt_interval = 0.5
mon_data_avail_warn = 5
mon_data_avail_crit = 2
mgr_initial_modules =
ms_async_op_threads = 2
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
bluestore_fsck_on_mkfs = false
osd_memory_target = 939524096
osd_max_markdown_count = 1000
"""


def new_key() -> str:
    """A key for cephx: AES, made now, 16 random bytes."""
    now = time.time()
    header = struct.pack("<hiih", 1, int(now), int(now % 1 * 1e9), 16)
    return base64.b64encode(header + os.urandom(16)).decode()


def keyring(entity: str, key: str, caps: Mapping[str, str] | None = None) -> str:
    """A keyring with one key."""
    lines = [f"[{entity}]", f"\tkey = {key}"]
    for part, cap in (caps or {}).items():
        quoted = cap.replace('"', '\\"')
        lines.append(f'\tcaps {part} = "{quoted}"')
    return "\n".join(lines) + "\n"


def client(layout: Layout, directory: str) -> str:
    """The configuration of clients: where the monitors are, and where each user's key is."""
    return "\n".join(
        [
            _MARK,
            "[global]",
            f"fsid = {layout.fsid}",
            f"mon_host = {layout.mon_host}",
            "auth_cluster_required = cephx",
            "auth_service_required = cephx",
            "auth_client_required = cephx",
            "rbd_default_features = 61",
            "[client]",
            f"keyring = {directory}/{layout.name}.$name.keyring",
            "",
        ]
    )


def node(layout: Layout, name: str) -> str:
    """The configuration of a node with daemons."""
    host = layout.hosts[name]
    v6 = ":" in host.public
    lines = [
        _MARK,
        "[global]",
        f"fsid = {layout.fsid}",
        f"mon_host = {layout.mon_host}",
        f"mon_initial_members = {','.join(layout.mons)}",
        f"public_addr = {host.public}",
        f"cluster_addr = {host.replica or host.public}",
        f"ms_bind_ipv6 = {str(v6).lower()}",
        f"ms_bind_ipv4 = {str(not v6).lower()}",
        "auth_cluster_required = cephx",
        "auth_service_required = cephx",
        "auth_client_required = cephx",
        "auth_allow_insecure_global_id_reclaim = false",
        "rbd_default_features = 61",
        f"osd_pool_default_size = {layout.size}",
        f"osd_pool_default_min_size = {layout.min_size}",
        f"osd_crush_chooseleaf_type = {0 if layout.domain == 'osd' else 1}",
        "osd_objectstore = bluestore",
        "pid_file = /run/ceph/$type.$id.pid",
        "admin_socket = /run/ceph/$cluster-$type.$id.asok",
    ]
    if layout.size == 1:
        lines += ["mon_allow_pool_size_one = true", "mon_warn_on_pool_no_redundancy = false"]
    if layout.public_network:
        lines.append(f"public_network = {layout.public_network}")
    if layout.cluster_network:
        lines.append(f"cluster_network = {layout.cluster_network}")
    text = "\n".join(lines) + "\n"
    if layout.profile == "small":
        text += _SMALL
    # Clients on this node have no pid file and no socket of their own there.
    return text + f"[osd]\ncrush_location = root=default host={name}\n[client]\npid_file =\nadmin_socket =\n"
