"""Where the master is and who we are: options, environment, and the node's configuration file.

Every command imports this: pathlib, which takes longer than all of the rest, only where it is used."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from atoll.model.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_CONFIG = "/etc/atoll/atoll.toml"
DEFAULT_RUN_DIR = "/run/atoll"

config_option = click.option(
    "--config", metavar="PATH", default=lambda: os.environ.get("ATOLL_CONFIG") or DEFAULT_CONFIG, help="This node's configuration file."
)


class Settings(NamedTuple):
    """Options of the outermost command."""

    socket: str | None = None


def local_config() -> dict[str, Any]:
    """This node's configuration as written, without defaults; empty where there is none."""
    path = os.environ.get("ATOLL_CONFIG") or DEFAULT_CONFIG
    if not os.path.isfile(path):
        return {}
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from None


def run_dir() -> Path:
    """Where sockets of this node's daemons are."""
    from pathlib import Path

    return Path(str(local_config().get("run_dir", DEFAULT_RUN_DIR)))


def current() -> Settings:
    """The settings of the running command."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context else None
    return found if isinstance(found, Settings) else Settings()


def socket_path() -> str:
    """The master's socket: ``--socket``, ATOLL_SOCKET, or the one of this node's configuration."""
    return current().socket or os.environ.get("ATOLL_SOCKET") or str(run_dir() / "api.sock")


def masters() -> list[str]:
    """Base URLs from ATOLL_MASTER (several with commas); empty means: use the socket."""
    if current().socket:
        return []
    return [url.strip().rstrip("/") for url in os.environ.get("ATOLL_MASTER", "").split(",") if url.strip()]


def followed() -> list[str]:
    """The masters that this node's agent reports to, if they are elsewhere; empty where nothing is known."""
    from pathlib import Path

    here = local_config()
    path = Path(str(here.get("state_dir", "/var/lib/atoll"))) / "masters.json"
    try:
        import json

        urls = json.loads(path.read_text())["masters"]
    except (OSError, ValueError, KeyError):
        urls = here.get("masters", [])
    return [str(url) for url in urls if f"//{here.get('address')}:{here.get('master_port', 7770)}" not in str(url)]


def ca_file() -> str | None:
    """The cluster's CA: ATOLL_CA, or this node's copy."""
    named = os.environ.get("ATOLL_CA")
    if named:
        return named
    from pathlib import Path

    here = Path(str(local_config().get("etc_dir", "/etc/atoll"))) / "tls" / "ca.pem"
    return str(here) if here.is_file() else None


def token() -> str | None:
    """The API token from the file that ATOLL_TOKEN_FILE names. Errors: InvalidInput when others can read the file."""
    named = os.environ.get("ATOLL_TOKEN_FILE")
    return read_secret(named) if named else None


def read_secret(name: str) -> str:
    """A secret from a file, or from stdin (``-``; a prompt on a terminal). Errors: InvalidInput."""
    from pathlib import Path

    if name == "-":
        text = click.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    else:
        path = Path(name)
        try:
            if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise InvalidInput(f"others may read {path}, which holds a token", hint=f"chmod 600 {path}")
            text = path.read_text()
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}", hint="name a file that holds the token") from None
    if not text.strip():
        raise InvalidInput("the token is empty", hint="give it on stdin (--token-file -) or in a file")
    return str(text).strip()
