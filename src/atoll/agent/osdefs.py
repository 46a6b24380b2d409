"""OS definitions as Ganeti's (OS API 15 and 20, man ganeti-os-interface): directories of this node with scripts that install a guest."""

from __future__ import annotations

import os
import re
import stat as modes
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from atoll.model.errors import InvalidInput, NotFound

VERSIONS = (20, 15)
SCRIPTS = ("create", "import", "export", "rename")
#: Bytes of a definition's text files that are read.
_LIMIT = 1 << 16
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class Definition(BaseModel):
    """One definition. ``problems`` empty: it can be used."""

    model_config = ConfigDict(frozen=True)
    name: str
    path: str
    versions: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    #: Name -> what it is for.
    parameters: dict[str, str] = Field(default_factory=dict)
    scripts: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """The newest version of the interface that both know."""
        return max(v for v in self.versions if v in VERSIONS)


def split(text: str) -> tuple[str, str]:
    """Name and variant of ``NAME[+VARIANT]``. Errors: InvalidInput."""
    name, plus, variant = text.partition("+")
    if not _NAME.fullmatch(name) or (plus and not _NAME.fullmatch(variant)):
        raise InvalidInput(f"{text!r} is not the name of an OS definition", hint="NAME or NAME+VARIANT, as atoll os list shows them")
    return name, variant


def find_all(directories: tuple[Path, ...]) -> list[Definition]:
    """All definitions, the first of each name in the order of the directories."""
    found: dict[str, Definition] = {}
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            if _NAME.fullmatch(name) and name not in found and (directory / name).is_dir():
                found[name] = read(directory / name)
    return [found[name] for name in sorted(found)]


def find(directories: tuple[Path, ...], name: str) -> Definition:
    """The definition with this name. Errors: NotFound."""
    for directory in directories:
        if (directory / name).is_dir():
            return read(directory / name)
    places = ", ".join(map(str, directories))
    raise NotFound(f"there is no OS definition {name} on this node (in {places})", hint="atoll os diagnose")


def read(path: Path) -> Definition:
    """A directory as a definition, with what is wrong with it."""
    problems: list[str] = []
    versions = tuple(int(line) for line in _lines(path, "ganeti_api_version", problems) if line.isdigit())
    if not any(v in VERSIONS for v in versions) and not problems:
        problems.append(f"its ganeti_api_version is {', '.join(map(str, versions)) or 'empty'}; known are {', '.join(map(str, VERSIONS))}")
    variants = tuple(_lines(path, "variants.list", problems, optional=True))
    parameters = {}
    for line in _lines(path, "parameters.list", problems, optional=20 not in versions):
        name, _, about = line.partition(" ")
        parameters[name.lower()] = about.strip()
    scripts = [name for name in SCRIPTS if _script(path / name, problems)]
    if 20 in versions and _script(path / "verify", problems):
        scripts.append("verify")
    return Definition(
        name=path.name,
        path=str(path),
        versions=versions,
        variants=variants,
        parameters=parameters,
        scripts=tuple(scripts),
        problems=tuple(problems),
    )


def _lines(path: Path, name: str, problems: list[str], *, optional: bool = False) -> list[str]:
    try:
        with open(path / name, "rb") as file:
            text = file.read(_LIMIT).decode(errors="replace")
    except FileNotFoundError:
        if not optional:
            problems.append(f"its file {name} is missing")
        return []
    except OSError as error:
        problems.append(f"its file {name} cannot be read: {error.strerror}")
        return []
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _script(path: Path, problems: list[str]) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        problems.append(f"its script {path.name} is not there: {error.strerror}")
        return False
    if not modes.S_ISREG(mode) or not mode & 0o100:
        problems.append(f"its script {path.name} is not an executable file")
        return False
    return True


def check(found: Definition, variant: str, parameters: dict[str, str]) -> None:
    """Refuse what the definition does not offer. Errors: InvalidInput."""
    if found.problems:
        raise InvalidInput(f"OS definition {found.name} cannot be used: {'; '.join(found.problems)}", hint="atoll os diagnose")
    if found.variants and not variant:
        raise InvalidInput(f"OS definition {found.name} needs a variant", hint=f"-o {found.name}+{found.variants[0]}")
    if variant and variant not in found.variants:
        known = ", ".join(found.variants) or "it has none"
        raise InvalidInput(f"OS definition {found.name} has no variant {variant}; variants: {known}", hint=f"atoll os info {found.name}")
    if unknown := sorted(name for name in parameters if name.lower() not in found.parameters):
        known = ", ".join(sorted(found.parameters)) or "it has none"
        raise InvalidInput(
            f"OS definition {found.name} has no parameter {', '.join(unknown)}; parameters: {known}", hint=f"atoll os info {found.name}"
        )


def environment(found: Definition, variant: str, parameters: dict[str, str]) -> dict[str, str]:
    """What every script is told."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "OS_API_VERSION": str(found.version),
        "OS_NAME": found.name,
        "OS_VARIANT": variant,
        "DEBUG_LEVEL": "0",
        **{f"OSP_{name.upper()}": value for name, value in parameters.items()},
    }


def instance_environment(spec: dict[str, Any]) -> dict[str, str]:
    """What a script is told of the instance and its disks (``DISK_%N_*``, ``NIC_%N_*``)."""
    told = {
        "INSTANCE_NAME": spec["name"],
        "INSTANCE_OS": spec["os"],
        "INSTANCE_UUID": spec["instance"],
        "INSTANCE_PRIMARY_NODE": spec["node"],
        "INSTANCE_SECONDARY_NODES": "",
        "INSTANCE_BE_MEMORY": str(spec["memory"] >> 20),
        "INSTANCE_BE_MAXMEM": str(spec["memory"] >> 20),
        "INSTANCE_BE_MINMEM": str(spec["memory"] >> 20),
        "INSTANCE_BE_VCPUS": str(spec["vcpus"]),
        # Guests here always have one, on ttyS0.
        "INSTANCE_HV_serial_console": "True",
        "HYPERVISOR": "kvm" if spec["hypervisor"] == "qemu" else spec["hypervisor"],
        "DISK_COUNT": str(len(spec["disks"])),
        "NIC_COUNT": str(len(spec["nics"])),
    }
    for number, disk in enumerate(spec["disks"]):
        told |= {
            f"DISK_{number}_PATH": disk["path"],
            f"DISK_{number}_ACCESS": disk["mode"],
            f"DISK_{number}_UUID": disk["volume"],
            f"DISK_{number}_NAME": disk["name"],
            f"DISK_{number}_SIZE": str(disk["size"] >> 20),
            f"DISK_{number}_FRONTEND_TYPE": "paravirtual",
            # Always mapped, so always a block device.
            f"DISK_{number}_BACKEND_TYPE": "block",
        }
    for number, nic in enumerate(spec["nics"]):
        told |= {
            f"NIC_{number}_MAC": nic["mac"],
            f"NIC_{number}_MODE": nic["mode"],
            f"NIC_{number}_LINK": nic["link"],
            f"NIC_{number}_FRONTEND_TYPE": "paravirtual",
        }
        if nic["mode"] == "bridged":
            told[f"NIC_{number}_BRIDGE"] = nic["link"]
    if spec.get("old_name"):
        told["OLD_INSTANCE_NAME"] = spec["old_name"]
    if spec.get("reinstall"):
        told["INSTANCE_REINSTALL"] = "1"
    return told
