"""Options for cloud-init: what they name is read here and sent; nothing of it is ever in a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import click

from atoll.model.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Any])
_FILES = {
    "user_data": "User data: #cloud-config, a script, ...; - is stdin.",
    "meta_data": "Meta data; the host name and an instance-id are added if it lacks them.",
    "network_config": "Network configuration, version 1 or 2.",
}


def seed_options(function: F) -> F:
    """``--cloud-init``, ``--user-data`` and so on; see ``seed_of``."""
    seed = [click.option("--cloud-init", is_flag=True, help="A seed for cloud-init with the instance's name; the following imply it.")]
    for name, about in _FILES.items():
        seed.append(click.option(f"--{name.replace('_', '-')}", type=click.File("r"), metavar="FILE", help=about))
    seed.append(
        click.option("--ssh-key", "ssh_keys", type=click.File("r"), multiple=True, metavar="FILE", help="Public keys for the first user.")
    )
    for option in reversed(seed):
        function = option(function)
    return function


def seed_of(options: dict[str, Any]) -> dict[str, Any] | None:
    """The seed that the options ask for, taken out of them. Errors: InvalidInput."""
    wanted: bool = options.pop("cloud_init")
    found: dict[str, Any] = {}
    for name in _FILES:
        file = options.pop(name)
        if file is not None:
            found[name] = _text(file)
    lines = [line for file in options.pop("ssh_keys") for line in _text(file).splitlines()]
    if keys := [line for line in lines if line.strip() and not line.startswith("#")]:
        if any("PRIVATE KEY" in line for line in lines):
            raise InvalidInput("--ssh-key: that is the private half of a key", hint="--ssh-key ~/.ssh/id_ed25519.pub")
        found["ssh_keys"] = keys
    return found if found or wanted else None


def _text(file: TextIO) -> str:
    try:
        return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file.name} cannot be read as text: {error}") from None
