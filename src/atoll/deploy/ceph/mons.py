"""Making a monitor's store."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from atoll.deploy.ceph.conf import keyring
from atoll.deploy.ceph.daemons import RUN, directory, settle_in
from atoll.model.errors import HostError
from atoll.runtime import process
from atoll.runtime.files import write_durably

ALL = {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"}
MADE = "atoll-made"
#: One at a time: an earlier attempt, whose agent has died, may still be under way. A store that was begun and not finished is made anew.
_MKFS = """
place=$1 id=$2 map=$3 keys=$4
[ -e "$place/atoll-made" ] && exit 0
rm -rf "$place"
ceph-mon --mkfs -i "$id" --monmap "$map" --keyring "$keys" --mon-data "$place" --setuser ceph --setgroup ceph || exit
sync -f "$place" && touch "$place/atoll-made" && sync -f "$place"
"""


async def make_mon(args: dict[str, Any]) -> None:
    """The store of a monitor of a new cluster; made already is success. Errors: HostError."""
    settle_in()
    place = directory("mon", args["id"])
    if (place / MADE).exists():
        return
    with_key = keyring("mon.", args["key"], {"mon": "allow *"}) + keyring("client.admin", args["admin"], ALL)
    own = RUN / f"mon-{secrets.token_hex(6)}"
    own.mkdir(mode=0o755)
    try:
        await _make(args, place, own, with_key)
    finally:
        for path in (own / "map", own / "keys"):
            path.unlink(missing_ok=True)
        own.rmdir()


async def _make(args: dict[str, Any], place: Path, own: Path, keys: str) -> None:

    argv = ["monmaptool", "--create", "--clobber", "--fsid", args["fsid"]]
    for name, address in args["mons"].items():
        argv += ["--addv", name, address]
    await process.run([*argv, str(own / "map")], deadline=30)
    write_durably(own / "keys", keys, 0o600)
    for path in (own / "map", own / "keys"):
        shutil.chown(path, "ceph", "ceph")
    words = [str(place), args["id"], str(own / "map"), str(own / "keys")]
    done = await process.run(["flock", str(RUN / "mkfs-mon.lock"), "sh", "-c", _MKFS, "sh", *words], deadline=100, check=False)
    if done.rc:
        raise HostError(f"the monitor {args['id']} cannot be made: {done.stderr.strip()[-500:] or f'ceph-mon ended with {done.rc}'}")
