"""A Ceph user for each attached volume, which can use that image and nothing else (PROTOCOLS 3).

A user of its own makes and removes them, which can do nothing else (``mintcaps``), or the managing user. Keys do not travel: the node's own
user may do one thing, fetch the keys of its own volumes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import rados
import rbd

from atoll.model.errors import Conflict, PoolUnavailable
from atoll.storage.rbd import clients, connections, mintcaps
from atoll.storage.rbd.connections import Link
from atoll.storage.rbd.options import RbdOptions

_GRANTED = "granted/"


def user_of(node_user: str, volume: str) -> str:
    """The user of a volume on a node; the node's user may fetch the keys of all that begin so."""
    return f"{node_user}.{volume}"


def _objects(pool: str, namespace: str, ident: str, data_pool: str, pool_id: int) -> list[str]:
    """What using an image takes, object by object. A prefix of the bare id would match longer ids, too: header and object map have no
    end of their own, so that theirs are matched with what else could come after them."""
    where = f'pool={pool} namespace="{namespace}"'
    granted = [f"allow rwx {where} object_prefix rbd_header.{ident}", f"allow rwx {where} object_prefix rbd_object_map.{ident}"]
    if data_pool:
        # The data of such an image is named after the pool of its header.
        return [*granted, f'allow rwx pool={data_pool} namespace="{namespace}" object_prefix rbd_data.{pool_id}.{ident}.']
    return [*granted, f"allow rwx {where} object_prefix rbd_data.{ident}."]


def caps(link: Link, options: RbdOptions, name: str) -> str:
    """What the OSDs allow to the user of an image. A clone may read what it was made from. Errors: NotFound."""
    where = f'pool={options.pool} namespace="{options.namespace}"'
    # Settings of the pool are read in the default namespace, whatever the image's own.
    granted = [f"allow rx {where} object_prefix rbd_id.{name}"]
    granted += [f'allow rx pool={options.pool} namespace="{space}" object_prefix rbd_info' for space in sorted({"", options.namespace})]
    if options.namespace:
        # QEMU asks whether it exists.
        granted.append(f"allow class rbd dir_state_assert {where} object_prefix rbd_directory")
    with clients.opened(link, name) as image:
        granted += _objects(options.pool, options.namespace, image.id(), _data_pool(link, image), link.ioctx.get_pool_id())
        parent = _parent(image)
    while parent is not None:
        pool, namespace, ident, _ = parent
        # It is opened by its id: librbd asks how that is called, which tells no other names.
        where = f'pool={pool} namespace="{namespace}"'
        granted.append(f"allow class rbd dir_get_name {where} object_prefix rbd_directory")
        granted.append(f"allow class rbd trash_get {where} object_prefix rbd_trash")
        with link.cluster.open_ioctx(pool) as ioctx:
            ioctx.set_namespace(namespace)
            with rbd.Image(ioctx, image_id=ident, read_only=True) as image:
                data = _data_pool(Link(link.cluster, ioctx), image)
                granted += [right.replace("allow rwx", "allow rx") for right in _objects(pool, namespace, ident, data, ioctx.get_pool_id())]
                parent = _parent(image)
    return ", ".join(dict.fromkeys(granted))


def _data_pool(link: Link, image: Any) -> str:
    number = image.data_pool_id()
    return "" if number == link.ioctx.get_pool_id() else str(link.cluster.pool_reverse_lookup(number))


def _parent(image: Any) -> tuple[str, str, str, str] | None:
    try:
        found = image.get_parent_image_spec()
    except rbd.ImageNotFound:
        return None
    return found["pool_name"], found["pool_namespace"], image.parent_id(), found["snap_name"]


def _command(cluster: Any, prefix: str, **arguments: Any) -> tuple[int, bytes, str]:
    code, out, words = cluster.mon_command(json.dumps({"prefix": prefix, **arguments}), b"", timeout=15)
    return code, out, words


@contextlib.contextmanager
def _minter(link: Link, options: RbdOptions) -> Iterator[tuple[Any, str]]:
    """The connection that may make users, and whose it is. It is not kept: nobody else in this process shall come by it."""
    if not options.mint_user:
        yield link.cluster, options.user
        return
    with connections.other_user(options, options.mint_user, options.mint_keyring) as cluster:
        yield cluster, options.mint_user


def grant(link: Link, options: RbdOptions, name: str, volume: str) -> str:
    """Let the node use the image, by a user of its own; the user's name. Errors: NotFound, PoolUnavailable."""
    user = user_of(options.node_user, volume)
    _check_alone(link, name)
    wanted = ["mon", mintcaps.MON, "osd", caps(link, options, name), "mgr", mintcaps.MGR, "mds", mintcaps.MDS]
    clients.remember(link, f"{_GRANTED}{volume}/{user}", {"image": name})
    with _minter(link, options) as (cluster, minter):
        code, _, words = _command(cluster, "auth get-or-create", entity=f"client.{user}", caps=wanted)
        if code == -22:
            # It is there with other rights: the image has been renamed, or was cloned from somewhere else.
            code, _, words = _command(cluster, "auth caps", entity=f"client.{user}", caps=wanted)
    if code:
        raise PoolUnavailable(
            f"client.{minter} cannot make the Ceph user client.{user}: {words or code}", hint="see docs/howto/adopt-a-ceph-cluster.md"
        )
    return user


def _check_alone(link: Link, name: str) -> None:
    """Refuse an image whose id begins another's: the rights for its header would be rights for the other's. Ids are random, so that this
    happens once in many millions of images. Errors: Conflict."""
    ids = {entry["name"]: entry["id"] for entry in rbd.RBD().list2(link.ioctx)}
    other = next((n for n, ident in ids.items() if n != name and name in ids and ident.startswith(ids[name])), None)
    if other is not None:
        raise Conflict(
            f"image {name} cannot have a user of its own: what it may do would include image {other}",
            hint=f"rbd deep cp POOL/{name} POOL/NEW, and rename NEW to {name}",
        )


def revoke(link: Link, options: RbdOptions, volume: str, only: str = "") -> None:
    """Remove the users of a volume (or only this one); none is success. Who is connected stays so until he is shut out: ``fence``."""
    granted = {key: key.rpartition("/")[2] for key in clients.remembered(link, f"{_GRANTED}{volume}/")}
    granted = {key: user for key, user in granted.items() if only in ("", user)}
    if not granted:
        return
    with _minter(link, options) as (cluster, minter):
        for key, user in granted.items():
            code, _, words = _command(cluster, "auth del", entity=f"client.{user}")
            if code:
                raise PoolUnavailable(f"client.{minter} cannot remove the Ceph user client.{user}: {words or code}")
            clients.drop(link, key)


def fetch(options: RbdOptions, user: str, node_user: str, keyring: str) -> str:
    """The key of a volume's user, by the right of the node's. Errors: PoolUnavailable."""
    with connections.other_user(options, node_user, keyring) as cluster:
        try:
            code, out, words = _command(cluster, "auth get-key", entity=f"client.{user}")
        except rados.Error as error:
            raise connections.explain(error, options, f"fetching the key of client.{user}") from error
    if code:
        raise PoolUnavailable(
            f"client.{node_user} cannot fetch the key of client.{user}: {words or code}", hint="see docs/howto/adopt-a-ceph-cluster.md"
        )
    return out.decode().strip()
