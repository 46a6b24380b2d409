"""The steps of a Ceph cluster, as an agent carries them out on its node. Each is repeated safely, and each undo may find nothing.

Keys come in arguments and go into files (0600, or 0640) and to stdin; never into command lines, results or logs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.deploy.ceph import cluster, leaving, preflight
from atoll.deploy.ceph.admin import ask, command
from atoll.deploy.ceph.conf import keyring
from atoll.deploy.ceph.daemons import Daemons, directory, settle_in
from atoll.deploy.ceph.mons import make_mon
from atoll.deploy.ceph.osds import make_osd, number_of, unmake_osd
from atoll.deploy.contract import Step
from atoll.model.errors import Conflict, HostError
from atoll.model.messages import Progress
from atoll.runtime.files import write_durably

Report = Callable[[Progress], None]
ETC = Path("/etc/ceph")
_CAME_WITH = "# came with: "
ADMIN = ETC / "ceph.client.admin.keyring"
ALL = {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"}


def steps(state_dir: Path, etc_dir: Path) -> dict[str, Step]:
    """Step -> what carries it out."""
    return CephSteps(Daemons(state_dir), etc_dir).steps()


def check_fsid(fsid: str) -> None:
    """Errors: Conflict where the node belongs to another Ceph cluster."""
    found = preflight.fsid_of(preflight.CONF)
    if preflight.CONF.exists() and found != fsid:
        raise Conflict(f"{preflight.CONF} is of another Ceph cluster ({found or 'it does not say which'})")


def _marked(text: str, mark: str) -> str:
    """A configuration that says with what it came."""
    return f"{text}{_CAME_WITH}{mark}\n"


def _mark_of(path: Path) -> str:
    """With what it came; empty: there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix(_CAME_WITH) for line in lines if line.startswith(_CAME_WITH)), "")


class CephSteps:
    """One node's half."""

    def __init__(self, daemons: Daemons, etc_dir: Path) -> None:
        self._daemons, self._clients = daemons, etc_dir / "ceph"

    def steps(self) -> dict[str, Step]:
        """Step -> what carries it out; ``keep`` runs for ever."""
        return {
            "preflight": self.preflight,
            "config": self.config,
            "unconfig": self.unconfig,
            "client": self.client,
            "unclient": self.unclient,
            "mon": self.mon,
            "unmon": self.unmon,
            "leavemon": self.leavemon,
            "reclient": self.reclient,
            "mgr": self.mgr,
            "unmgr": self.unmgr,
            "osd": self.osd,
            "unosd": self.unosd,
            "admit": cluster.admit,
            "dismiss": cluster.dismiss,
            "quorum": cluster.quorum,
            "settled": cluster.settled,
            "pool": cluster.make_pool,
            "health": cluster.wait_health,
            "status": cluster.status,
            "stops": cluster.stops,
            "hold": cluster.hold,
            "release": cluster.release,
            "away": cluster.away,
            "spare": leaving.spare,
            "out": leaving.out,
            "in": leaving.back,
            "emptied": leaving.emptied,
            "unneeded": leaving.unneeded,
            "dropmon": leaving.drop_mon,
            "stop": self.stop,
            "start": self.start,
            "keep": self.keep,
        }

    async def keep(self, args: dict[str, Any], report: Report) -> Any:
        """Keep the daemons running."""
        await self._daemons.keep()

    async def preflight(self, args: dict[str, Any], report: Report) -> Any:
        """Facts, and what stands against it; changes nothing."""
        return (await preflight.look(args)).model_dump(mode="json")

    # --- files ---

    async def config(self, args: dict[str, Any], report: Report) -> Any:
        """Ceph's configuration, and the administrator's key on monitors' nodes. Errors: Conflict."""
        check_fsid(args["fsid"])
        ETC.mkdir(mode=0o755, exist_ok=True)
        settle_in()
        write_durably(preflight.CONF, args["conf"], 0o644)
        if args.get("admin"):
            write_durably(ADMIN, keyring("client.admin", args["admin"], ALL), 0o600)
        elif "admin" in args:
            ADMIN.unlink(missing_ok=True)

    async def unconfig(self, args: dict[str, Any], report: Report) -> Any:
        """Remove them if they are this cluster's."""
        if preflight.fsid_of(preflight.CONF) == args["fsid"]:
            # The file that tells whose it is goes last.
            ADMIN.unlink(missing_ok=True)
            preflight.CONF.unlink(missing_ok=True)

    async def client(self, args: dict[str, Any], report: Report) -> Any:
        """Configuration and keyrings of clients. Errors: Conflict (another cluster with the same name)."""
        path = self._clients / f"{args['name']}.conf"
        if path.exists() and preflight.fsid_of(path) != args["fsid"]:
            raise Conflict(f"{path} is of another Ceph cluster", hint=f"move {path} away if it is nothing to you")
        self._clients.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_durably(path, _marked(args["conf"], _mark_of(path) or args["mark"]), 0o644)
        for entity, key in args["users"].items():
            write_durably(self._clients / f"{args['name']}.{entity}.keyring", keyring(entity, key), 0o640)

    async def reclient(self, args: dict[str, Any], report: Report) -> Any:
        """Another configuration for clients that have one already."""
        path = self._clients / f"{args['name']}.conf"
        if preflight.fsid_of(path) == args["fsid"]:
            write_durably(path, _marked(args["conf"], _mark_of(path)), 0o644)

    async def unclient(self, args: dict[str, Any], report: Report) -> Any:
        """Remove them if this very step has brought them."""
        path = self._clients / f"{args['name']}.conf"
        if preflight.fsid_of(path) == args["fsid"] and _mark_of(path) == args["mark"]:
            for found in self._clients.glob(f"{args['name']}.client.*.keyring"):
                found.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    # --- daemons ---

    async def mon(self, args: dict[str, Any], report: Report) -> Any:
        """A monitor, made and started."""
        check_fsid(args["fsid"])
        await make_mon(args)
        await self._daemons.start("mon", args["id"])

    async def unmon(self, args: dict[str, Any], report: Report) -> Any:
        """Stopped, and its data removed."""
        await self._gone("mon", args["id"], args["fsid"])

    async def leavemon(self, args: dict[str, Any], report: Report) -> Any:
        """The others go on without it; then stopped, and its data removed."""
        if preflight.fsid_of(preflight.CONF) == args["fsid"] and ADMIN.exists():
            await ask(command("mon rm", name=args["id"]), deadline=60.0)
        await self._gone("mon", args["id"], args["fsid"])

    async def mgr(self, args: dict[str, Any], report: Report) -> Any:
        """A manager, started."""
        check_fsid(args["fsid"])
        settle_in()
        place = directory("mgr", args["id"])
        place.mkdir(mode=0o750, exist_ok=True)
        write_durably(place / "keyring", keyring(f"mgr.{args['id']}", args["key"]), 0o600)
        for path in (place, place / "keyring"):
            shutil.chown(path, "ceph", "ceph")
        await self._daemons.start("mgr", args["id"])

    async def unmgr(self, args: dict[str, Any], report: Report) -> Any:
        """Stopped and removed."""
        await self._gone("mgr", args["id"], args["fsid"])

    async def osd(self, args: dict[str, Any], report: Report) -> Any:
        """An OSD on its disk, made and started. Errors: Conflict (something else is on the disk)."""
        check_fsid(args["fsid"])
        report(Progress(text=f"OSD {args['number']}: preparing {args['disk']}"))
        await make_osd(args)
        await self._daemons.start("osd", str(args["number"]))

    async def unosd(self, args: dict[str, Any], report: Report) -> Any:
        """Stopped, its disk erased (``keep``: it has failed, and is left as it is). Nothing is done to a disk that is not this OSD's."""
        number = number_of(args["uuid"])
        if number is not None:
            await self._daemons.stop("osd", number)
        await unmake_osd(args["uuid"], args["disk"], number, erase=not args.get("keep"))

    async def stop(self, args: dict[str, Any], report: Report) -> Any:
        """Daemons stopped, until ``start``; what they have is kept."""
        for name in args["daemons"]:
            report(Progress(text=f"stopping {name}"))
            await self._daemons.stop(*name.split(".", 1))

    async def start(self, args: dict[str, Any], report: Report) -> Any:
        """Daemons started again. Errors: HostError, Conflict."""
        check_fsid(args["fsid"])
        for name in reversed(args["daemons"]):
            report(Progress(text=f"starting {name}"))
            await self._daemons.start(*name.split(".", 1))

    async def _gone(self, kind: str, ident: str, fsid: str) -> None:
        place = directory(kind, ident)
        if preflight.fsid_of(preflight.CONF) != fsid:
            return
        await self._daemons.stop(kind, ident)
        try:
            shutil.rmtree(place)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise HostError(f"cannot remove {place}: {error.strerror}") from None
