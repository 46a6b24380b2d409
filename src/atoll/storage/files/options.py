"""Options that all drivers of image files share."""

from __future__ import annotations

import os
from dataclasses import dataclass

from atoll.model.errors import InvalidInput
from atoll.model.messages import PoolRef
from atoll.storage.contract import Option

PREALLOCATIONS = ("off", "falloc", "full")
OPTIONS = (
    Option(name="path", description="directory that holds the images", required=True),
    Option(
        name="mount",
        description="mount point that the directory must lie on (auto: any but / for shared pools; none: not checked)",
        default="auto",
    ),
    Option(name="preallocation", description="reserve the space of new images", default="off", choices=PREALLOCATIONS),
    Option(
        name="locking",
        description="take file locks on open images; off for file systems that cannot (writers becomes none)",
        default="on",
        choices=("on", "off"),
    ),
)


@dataclass(frozen=True)
class FileOptions:
    """A pool's options, checked."""

    path: str
    mount: str
    preallocation: str
    locking: bool


def parse(ref: PoolRef) -> FileOptions:
    """The options of a pool with their defaults. Errors: InvalidInput names the option and what it takes."""
    values = {option.name: ref.options.get(option.name) or option.default for option in OPTIONS}
    for option in OPTIONS:
        if option.choices and values[option.name] not in option.choices:
            raise InvalidInput(f"option {option.name} is one of {', '.join(option.choices)}, not {values[option.name]!r}")
    if not os.path.isabs(values["path"]):
        raise InvalidInput(f"the path of pool {ref.name} is not absolute: {values['path']!r}", hint="path=/srv/shared/images")
    mount = values["mount"]
    if mount not in ("auto", "none") and not os.path.isabs(mount):
        raise InvalidInput(f"option mount of pool {ref.name} is auto, none or an absolute path, not {mount!r}", hint="mount=/srv/shared")
    return FileOptions(values["path"], mount, values["preallocation"], values["locking"] == "on")


def preallocation_of(options: dict[str, str], default: str) -> str:
    """What a volume's own options say of preallocation. Errors: InvalidInput for any other option."""
    unknown = sorted(set(options) - {"preallocation"})
    if unknown:
        raise InvalidInput(f"volumes have no option {unknown[0]!r}", hint="options of a volume: preallocation")
    chosen = options.get("preallocation") or default
    if chosen not in PREALLOCATIONS:
        raise InvalidInput(f"preallocation is one of {', '.join(PREALLOCATIONS)}, not {chosen!r}")
    return chosen
