"""The configuration of one node: ``/etc/atoll/atoll.toml``. What the cluster decides is in the store, not here."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.model.errors import InvalidInput

DEFAULT_PATH = "/etc/atoll/atoll.toml"
#: The guests' user has this number on every node, so that files on a share belong to the same user everywhere.
GUEST_UID = 64070


class Config(BaseModel):
    """Every setting of a node, with its default. Paths may be moved, so that several nodes can live on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The node's name in the cluster.
    node: str = ""
    #: The address by which other nodes reach this one.
    address: str = ""
    #: Certificates, keys and this file.
    etc_dir: Path = Path("/etc/atoll")
    #: What must survive a reboot: the store (master), the agent's memory.
    state_dir: Path = Path("/var/lib/atoll")
    #: Sockets and pid files; empty after a reboot.
    run_dir: Path = Path("/run/atoll")
    log_dir: Path = Path("/var/log/atoll")
    agent_port: int = 7771
    master_port: int = 7770
    #: Base URLs of the masters that this node's agent reports to.
    masters: tuple[str, ...] = ()
    hypervisor: Literal["qemu", "fake"] = "qemu"
    #: The unprivileged user that guests run as; empty = the user of the agent.
    guest_user: str = "atoll-guest"
    #: Bytes per second that a live migration away from this node sends at most; 0 = as fast as the network allows.
    migration_bandwidth: Annotated[int, Field(ge=0)] = 0
    #: Where OS definitions are looked for, in this order.
    os_dirs: tuple[Path, ...] = (
        Path("/srv/ganeti/os"),
        Path("/usr/local/lib/ganeti/os"),
        Path("/usr/lib/ganeti/os"),
        Path("/usr/share/ganeti/os"),
        Path("/etc/atoll/os"),
    )
    #: Seconds between heartbeats of an agent.
    heartbeat: float = 1.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def tls_dir(self) -> Path:
        """``ca.pem``, ``cert.pem``, ``key.pem`` of this node."""
        return self.etc_dir / "tls"

    @property
    def master_tls_dir(self) -> Path:
        """The same of a master, and the CA's key. Apart from the node's: guests' processes get a copy of that one."""
        return self.etc_dir / "master"

    @property
    def candidate_dir(self) -> Path:
        """What a master candidate needs besides the store to become the master: the CA's key and the master key (0600)."""
        return self.etc_dir / "candidate"

    @property
    def store_dir(self) -> Path:
        """The store, on a master."""
        return self.state_dir / "store"

    @property
    def replica_dir(self) -> Path:
        """The copy of the store, on a master candidate."""
        return self.state_dir / "replica"

    @property
    def api_socket(self) -> Path:
        """The master's Unix socket, for root on this machine."""
        return self.run_dir / "api.sock"


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read the configuration; ``ATOLL_CONFIG`` names another file than the default. A missing default file gives the defaults."""
    chosen = Path(path or os.environ.get("ATOLL_CONFIG") or DEFAULT_PATH)
    try:
        data = tomllib.loads(chosen.read_text())
    except FileNotFoundError:
        if path or "ATOLL_CONFIG" in os.environ:
            raise InvalidInput(f"there is no configuration file {chosen}", hint="atoll cluster init, or atoll node join") from None
        data = {}
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{chosen} is not TOML: {error}") from None
    try:
        return Config(**data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{chosen}: {where}: {first['msg']}", hint="docs/reference/configuration.md") from None


def dump(config: Config) -> str:
    """The configuration as TOML; only what differs from the defaults."""
    lines = []
    for name, value in config.model_dump(mode="json").items():
        if value == Config.model_fields[name].default or (isinstance(value, list) and not value):
            continue
        if str(value) == str(Config.model_fields[name].default):
            continue
        if isinstance(value, list):
            lines.append(f"{name} = [{', '.join(_quote(v) for v in value)}]")
        elif isinstance(value, (int, float)):
            lines.append(f"{name} = {value}")
        else:
            lines.append(f"{name} = {_quote(str(value))}")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
