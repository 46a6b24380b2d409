"""Connections to Ceph, kept for the life of the worker process; and what Ceph's errors mean for a pool."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from atoll.model.errors import AtollError, HostError, InvalidInput, PoolFull, PoolUnavailable
from atoll.storage.rbd.options import RbdOptions

try:
    import rados
    import rbd
except ImportError:  # pragma: no cover
    rados = rbd = None

#: Seconds for the monitors to answer, at first and later. A call that hangs in an OSD ends with the worker, at the call's deadline:
#: then its outcome is unknown, and a time-out in here would only hide that.
_CONNECT, _COMMAND = 10, 15
_RECENT = 1.0
#: What users may do with a broken-off connection: make another one.
GONE = (errno.ESHUTDOWN, errno.ENOTCONN)
_abandoned: list[Any] = []
_kept: dict[tuple[str, str, str, str, str], Link] = {}


class Link:
    """An open pool (and namespace) of a Ceph cluster."""

    def __init__(self, cluster: Any, ioctx: Any) -> None:
        self.cluster, self.ioctx = cluster, ioctx
        self._told: dict[str, tuple[float, Any]] = {}

    def recent(self, key: str, ask: Callable[[], Any]) -> Any:
        """An answer of the monitors about the whole pool that may be a second old: Ceph itself renews it more seldom than that."""
        known = self._told.get(key)
        if known is None or time.monotonic() - known[0] > _RECENT:
            known = self._told[key] = time.monotonic(), ask()
        return known[1]

    @property
    def addresses(self) -> list[str]:
        """This connection's own addresses, as watchers and blocklists show them."""
        return [part.partition(":")[2] for part in str(self.cluster.get_addrs()).strip("[]").split(",")]


def available() -> None:
    """Errors: HostError where librbd's bindings are not installed."""
    if rbd is None:
        raise HostError("this node has no librbd for Python", hint="apt-get install python3-rbd python3-rados qemu-block-extra")


def explain(error: Any, options: RbdOptions, what: str) -> AtollError:
    """What an error of librados or librbd means for a pool."""
    number = getattr(error, "errno", None) or 0
    words = f"Ceph pool {options.where}: {what}"
    if number in (errno.EPERM, errno.EACCES):
        return PoolUnavailable(
            f"{words}: Ceph does not let user client.{options.user} do that",
            hint=f"ceph auth get client.{options.user}; see docs/howto/adopt-a-ceph-cluster.md",
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return PoolFull(f"{words}: no space left", hint="ceph df; ceph health detail; delete what nobody needs: docs/howto/full-pool.md")
    if number == errno.ETIMEDOUT:
        return PoolUnavailable(f"{words}: Ceph gives no answer", hint="ceph -s", silent=True)
    if number in GONE:
        return PoolUnavailable(
            f"{words}: Ceph has cut off this agent's connection; the next call makes a new one", hint="ceph osd blocklist ls"
        )
    return HostError(f"{words}: {os.strerror(number) if number else error}")


def _connect(options: RbdOptions, user: str, keyring: str, more: dict[str, str] | None = None) -> Any:
    """A connection to the cluster. Errors: PoolUnavailable, InvalidInput."""
    available()
    for path, what in ((options.conf, "Ceph's configuration"), (keyring, f"the keyring of client.{user}")):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise PoolUnavailable(f"{what}, {path}, cannot be read: {error.strerror}", hint=f"bring {path} to this node") from None
    settings = {"keyring": keyring, "client_mount_timeout": str(_CONNECT), "rados_mon_op_timeout": str(_COMMAND)}
    # Its log and admin socket would lie about under /var and /run; clones of version 2 need no protected snapshots.
    settings |= {"log_file": "", "log_to_stderr": "false", "admin_socket": "", "rbd_default_clone_format": "2"}
    settings |= more or {}
    try:
        cluster = rados.Rados(conffile=options.conf, rados_id=user, conf=settings)
        cluster.connect(timeout=_CONNECT)
    except rados.Error as error:
        raise explain(error, options, f"connecting as client.{user}") from error
    return cluster


def connect(options: RbdOptions, **settings: str) -> Any:
    """A connection of the managing user, which the caller keeps. Errors: PoolUnavailable, InvalidInput."""
    return _connect(options, options.user, options.keyring, settings)


def forbidden(error: Any) -> bool:
    """Whether Ceph does not let this user do that."""
    return abs(getattr(error, "errno", None) or 0) in (errno.EPERM, errno.EACCES)


def ask(cluster: Any, prefix: str, **more: str) -> Any:
    """A question to the monitors. Raises rados.Error."""
    return _answer(prefix, cluster.mon_command(json.dumps({"prefix": prefix, "format": "json", **more}), b""))


def ask_manager(cluster: Any, prefix: str) -> Any:
    """A question to the manager, which hangs as long as there is none. Raises rados.Error."""
    return _answer(prefix, cluster.mgr_command(json.dumps({"prefix": prefix, "format": "json"}), b""))


def _answer(prefix: str, told: tuple[int, bytes, str]) -> Any:
    code, out, words = told
    if code:
        raise rados.OSError(f"{prefix}: {words or os.strerror(abs(code))}", errno=abs(code))
    return json.loads(out)


def link(options: RbdOptions) -> Link:
    """The kept connection of the managing user. Errors: PoolUnavailable (no such pool, no answer, not allowed)."""
    key = (options.conf, options.user, options.keyring, options.pool, options.namespace)
    found = _kept.get(key)
    if found is not None:
        return found
    cluster = _connect(options, options.user, options.keyring)
    try:
        ioctx = cluster.open_ioctx(options.pool)
        ioctx.set_namespace(options.namespace)
        # On a full Ceph what takes room is refused, and what makes room is done. Without this, either would wait until there is room.
        ioctx.set_osdmap_full_try()
        if options.namespace and not rbd.RBD().namespace_exists(ioctx, options.namespace):
            raise PoolUnavailable(
                f"Ceph pool {options.pool} has no namespace {options.namespace}", hint=f"rbd namespace create {options.where}"
            )
    except rados.ObjectNotFound:
        cluster.shutdown()
        raise PoolUnavailable(f"there is no Ceph pool {options.pool}", hint=f"ceph osd pool ls; rbd pool init {options.pool}") from None
    except (rados.Error, rbd.Error) as error:
        cluster.shutdown()
        raise explain(error, options, "opening the pool") from error
    except AtollError:
        cluster.shutdown()
        raise
    _kept[key] = Link(cluster, ioctx)
    return _kept[key]


@contextlib.contextmanager
def using(options: RbdOptions, what: str) -> Iterator[Link]:
    """The kept connection for one call; Ceph's errors come out as ours. One that was cut off is forgotten."""
    found = link(options)
    try:
        yield found
    except (rados.Error, rbd.Error) as error:
        if getattr(error, "errno", None) in GONE:
            _forget(found)
        raise explain(error, options, what) from error


@contextlib.contextmanager
def other_user(options: RbdOptions, user: str, keyring: str) -> Iterator[Any]:
    """A short connection as another user, to the monitors only. Errors: PoolUnavailable."""
    cluster = _connect(options, user, keyring)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _forget(gone: Link) -> None:
    for key in [key for key, kept in _kept.items() if kept is gone]:
        del _kept[key]
    abandon(gone)


def abandon(thing: Any) -> None:
    """Keep what belongs to a connection that was cut off as it is: closing it may hang for ever."""
    _abandoned.append(thing)


def check_name(name: str) -> str:
    """A logical id is the plain name of an image. Errors: InvalidInput."""
    if not name or name.startswith(".") or any(sign in name for sign in "/@\0"):
        raise InvalidInput(f"{name!r} is not the name of an image", hint="give the plain name of an image in the pool")
    return name
