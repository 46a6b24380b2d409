"""Options for cloud-init: the files that they name are read here and sent; nothing of them is ever in a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import click

from atoll.model.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Any])
_FILES = {
    "user_data": "User data: #cloud-config, a script, ...; - is stdin.",
    "meta_data": "Meta data; instance-id and local-hostname are added if it lacks them.",
    "network_config": "Network configuration, version 1 or 2.",
}


def seed_options(function: F) -> F:
    """``--cloud-init``, ``--user-data`` and so on; see ``seed_of``."""
    seed = [click.option("--cloud-init", is_flag=True, help="A seed for cloud-init with the instance's name; the following imply it.")]
    for name, about in _FILES.items():
        seed.append(click.option(f"--{name.replace('_', '-')}", type=click.File("r"), metavar="FILE", help=about))
    about = "Public SSH keys for the image's first user; may be repeated."
    seed.append(click.option("--ssh-key", "ssh_keys", type=click.File("r"), multiple=True, metavar="FILE", help=about))
    for option in reversed(seed):
        function = option(function)
    return function


def seed_of(options: dict[str, Any]) -> dict[str, Any] | None:
    """The seed that the options ask for; they are taken out of ``options``. Errors: InvalidInput."""
    wanted: bool = options.pop("cloud_init")
    found: dict[str, Any] = {}
    for name in _FILES:
        file = options.pop(name)
        if file is not None:
            found[name] = _text(file)
    lines = [line.strip() for file in options.pop("ssh_keys") for line in _text(file).splitlines()]
    if any("PRIVATE KEY" in line for line in lines):
        raise InvalidInput("--ssh-key: that is the private half of a key", hint="--ssh-key ~/.ssh/id_ed25519.pub")
    if keys := [line for line in lines if line and not line.startswith("#")]:
        found["ssh_keys"] = keys
    return found if found or wanted else None


def _text(file: TextIO) -> str:
    try:
        return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file.name} cannot be read as text: {error}") from None
