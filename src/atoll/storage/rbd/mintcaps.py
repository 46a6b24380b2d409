"""What the Ceph user may do that makes the users of volumes: that, and nothing else (PROTOCOLS 3).

Whoever may choose the rights of other users may give himself all of them. So the monitors are told, word for word, which users these are
and which rights they may have: for single images of these pools, never for a whole pool, the monitors, a manager or a file system.
Pure; docs/howto/adopt-a-ceph-cluster.md shows what comes out, and a test compares them.
"""

from __future__ import annotations

import re

#: Of a volume's user. Every part of Ceph is named: a part that is left out could be filled with anything. What Ceph calls a service, a path
#: and so on, there is none of these.
MON, MGR, MDS = "allow r", "allow service atoll r", "allow r path=/atoll"
#: How their names end; what comes before it is the node's user.
_VOLUME = r"[.]vol-[0-9a-f]{17}"


def entities(prefix: str = "atoll-") -> str:
    """Their names, as an extended regular expression. ``prefix``: how the users of nodes begin."""
    return f"client[.]{re.escape(prefix)}[A-Za-z0-9._-]*{_VOLUME}".replace("\\-", "-")


def images(pools: tuple[str, ...]) -> str:
    """What they may be allowed by the OSDs, as an extended regular expression: objects of single images."""
    where = f'pool=({"|".join(re.escape(pool) for pool in pools)}) namespace="[A-Za-z0-9._-]*" object_prefix'.replace("\\-", "-")
    own = r"(id[.][A-Za-z0-9._-]+|info|(header|object_map|data)[.][0-9a-f.]+)"
    listed = "(dir_state_assert|dir_get_name|trash_get)"
    one = f"allow (r|rw)x {where} rbd_{own}|allow class rbd {listed} {where} rbd_(directory|trash)"
    return f"({one})(, ({one}))*"


def mon_caps(pools: tuple[str, ...], prefix: str = "atoll-") -> str:
    """The minter's whole right: it makes, changes and removes users of volumes."""
    who = f'entity regex "{entities(prefix)}"'
    rights = f'caps_mon="{MON}" caps_mgr="{MGR}" caps_mds="{MDS}" caps_osd regex \'{images(pools)}\''
    making = [f'allow command "auth {what}" with {who} {rights}' for what in ("get-or-create", "caps")]
    return ", ".join([*making, f'allow command "auth del" with {who}'])
