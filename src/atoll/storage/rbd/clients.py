"""Who has an image open: watchers and lock owners, which of them are agents of ours, and how the others are shut out (PROTOCOLS 1).

No watcher is not no writer: a client that is cut off from Ceph loses its watch after 30 s and retries its writes for ever. So a guest's
address is remembered when it has started, and a lock owner is shut out before its lock is broken.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal

import rados
import rbd

from atoll.model.errors import DeadlineExceeded, NotFound
from atoll.storage.rbd.connections import Link, ask, check_name
from atoll.storage.rbd.marks import MARK

#: Whom ``fence`` shuts out: nobody, the guests that were noted (they are known to be gone), or everybody who has the image open.
Whom = Literal["none", "known", "all"]
_AGENT, _GUEST, _FENCED = "agent/", "guest/", "fenced/"
#: Seconds that a blocklist entry stands. A client that is shut out never comes back under its address: what is cut off now may try again
#: in weeks, but not in years.
_EXPIRE = 5 * 365 * 86400
#: Seconds to wait for a fenced client to go; after which an address of ours is told anew, and is no longer believed.
_GONE, _RENEW, _BELIEVED = 20.0, 3600.0, 86400.0
_ADDRESS = re.compile(r"(?:v[12]:|any:)?(\S+:\d+/\d+)\Z")
_told: dict[int, float] = {}


def plain(address: str) -> str:
    """An address without the version of its protocol: watchers and lock owners are shown differently. The number at its end is random."""
    first = address.strip().removeprefix("[").split(",")[0]
    match = _ADDRESS.match(first.removesuffix("]") if not first.startswith("[") and first.count("[") == 0 else first)
    return match[1] if match else first


def introduce(link: Link, node: str) -> None:
    """Tell the other nodes this connection's address, now and then: an agent that is killed leaves a watch for half a minute, and must not
    be taken for a guest."""
    now = time.time()
    if now - _told.get(id(link), 0.0) < _RENEW:
        return
    old = [key for key, value in remembered(link, _AGENT).items() if now - float(value.get("at", 0)) > _BELIEVED]
    remember(link, _AGENT + plain(str(link.cluster.get_addrs())), {"node": node, "at": now})
    drop(link, *old)
    _told[id(link)] = now


def remembered(link: Link, prefix: str) -> dict[str, Any]:
    """The entries beside the pool's mark whose keys begin so."""
    found: dict[str, Any] = {}
    with rados.ReadOpCtx() as operation:
        values, _ = link.ioctx.get_omap_vals(operation, "", prefix, 10000)
        try:
            link.ioctx.operate_read_op(operation, MARK)
        except rados.ObjectNotFound:
            return {}
        for key, value in values:
            found[key] = json.loads(value)
    return found


def remember(link: Link, key: str, value: Any) -> None:
    """Keep an entry beside the pool's mark, durably."""
    with rados.WriteOpCtx() as operation:
        link.ioctx.set_omap(operation, (key,), (json.dumps(value).encode(),))
        link.ioctx.operate_write_op(operation, MARK)


def drop(link: Link, *gone: str) -> None:
    """Forget entries."""
    if gone:
        with rados.WriteOpCtx() as operation:
            link.ioctx.remove_omap_keys(operation, gone)
            link.ioctx.operate_write_op(operation, MARK)


def opened(link: Link, name: str, *, read_only: bool = True) -> Any:
    """The image, open; a read-only one is watched by nobody. Errors: NotFound."""
    try:
        return rbd.Image(link.ioctx, check_name(name), read_only=read_only)
    except rbd.ImageNotFound:
        raise NotFound(f"there is no image {name}", hint="atoll cluster verify") from None


def watchers(image: Any) -> list[str]:
    """The addresses of all that have it open for writing."""
    return sorted({plain(watcher["addr"]) for watcher in image.watchers_list()})


def strangers(link: Link, image: Any) -> list[str]:
    """The watchers that are no agent's own connection."""
    found = watchers(image)
    if not found:
        return []
    ours = {key.removeprefix(_AGENT) for key in remembered(link, _AGENT)}
    return [address for address in found if address not in ours]


def _lockers(image: Any) -> list[tuple[str, str, str]]:
    """Client, cookie and address of each recorded lock owner."""
    found = image.list_lockers()
    return [(client, cookie, plain(address)) for client, cookie, address in found["lockers"]] if found else []


def quiet(link: Link, image: Any, whom: Whom) -> bool:
    """Whether ``fence`` has nothing to do: nobody has it open, no lock is left, and nobody who could come back is known."""
    if strangers(link, image) or _lockers(image):
        return False
    key = _GUEST + image.id()
    noted = _noted(link, key)
    if noted and whom != "all":
        drop(link, key)
    return not noted or whom != "all"


def _noted(link: Link, key: str) -> dict[str, str]:
    """Address -> the node (a name) whose guest it is; empty where nobody has said."""
    found = remembered(link, key).get(key, {})
    return found if isinstance(found, dict) else dict.fromkeys(found, "")


def note(link: Link, name: str, node: str) -> list[str]:
    """Remember who has the image open now: a guest that has just been started on the node, or both sides of a migration to it."""
    with opened(link, name) as image:
        found = strangers(link, image)
        key = _GUEST + image.id()
    known = _noted(link, key)
    remember(link, key, dict([*known.items(), *((address, node) for address in found if address not in known)][-32:]))
    return found


def forget(link: Link, ident: str) -> None:
    """The image with this id is gone."""
    drop(link, _GUEST + ident)


def fence(link: Link, name: str, whom: Whom) -> list[str]:
    """Shut out who may still write the image, until nobody of them is left, and break the locks that the dead have left; the addresses.

    Where somebody else has it open, he and his lock stay: ``writers`` tells of him. Errors: NotFound, DeadlineExceeded.
    """
    end = time.monotonic() + _GONE
    done: list[str] = []
    with opened(link, name) as image:
        key = _GUEST + image.id()
        known = _noted(link, key)
        if whom == "all":
            # Not only who is seen now: a client that is cut off has no watch any more, and may have no lock yet.
            done += _shut_out(link, [address for address in sorted(known) if address not in done], known)
        while True:
            present = strangers(link, image)
            wrong = [address for address in present if whom == "all" or (whom == "known" and address in known)]
            if not wrong:
                break
            done += _shut_out(link, [address for address in wrong if address not in done], known)
            if time.monotonic() >= end:
                raise DeadlineExceeded(
                    f"{', '.join(wrong)} still watch image {name}, although they are shut out", hint="ceph osd blocklist ls"
                )
            time.sleep(0.1)
        stale = [] if present else [locker for locker in _lockers(image) if locker[2] not in watchers(image)]
    if stale:
        done += _shut_out(link, [address for _, _, address in stale if address not in done], known)
        _break(link, name, stale)
    if not present and known:
        drop(link, key)
    return done


def _shut_out(link: Link, addresses: list[str], nodes: dict[str, str]) -> list[str]:
    for address in addresses:
        if node := nodes.get(address):
            # Before it is done: what is remembered and was not done does no harm.
            remember(link, f"{_FENCED}{node}/{address}", {"at": time.time()})
        command = {"prefix": "osd blocklist", "blocklistop": "add", "addr": address, "expire": float(_EXPIRE)}
        code, _, words = link.cluster.mon_command(json.dumps(command), b"")
        if code:
            raise rados.OSError(f"shutting out {address}: {words}", errno=abs(code))
    if addresses:
        link.cluster.wait_for_latest_osdmap()
    return addresses


def readmit(link: Link, node: str) -> list[str]:
    """Remove the entries that were made for guests of the node, which has said that none of them is left; the addresses. Who else was
    shut out stays so."""
    prefix = f"{_FENCED}{node}/"
    ours = {key: key.removeprefix(prefix) for key in remembered(link, prefix)}
    if not ours:
        return []
    # Not ``osd blocklist ls``, whose answer is no JSON in Ceph 16.
    present = {plain(address) for address in ask(link.cluster, "osd dump")["blocklist"]}
    gone = []
    for key, address in ours.items():
        if address in present:
            command = {"prefix": "osd blocklist", "blocklistop": "rm", "addr": address}
            code, _, words = link.cluster.mon_command(json.dumps(command), b"")
            if code:
                raise rados.OSError(f"letting {address} in again: {words}", errno=abs(code))
            gone.append(address)
        drop(link, key)
    return gone


def _break(link: Link, name: str, lockers: list[tuple[str, str, str]]) -> None:
    """Break the locks of those who are shut out: nodes may not do that with what they may do."""
    with opened(link, name, read_only=False) as image:
        for client, cookie, _ in lockers:
            try:
                image.break_lock(client, cookie)
            except rbd.ImageNotFound:
                continue
