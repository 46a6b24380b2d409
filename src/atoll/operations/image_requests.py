"""The parts of requests that name images and files of nodes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from atoll.model.places import OPEN_DIRECTORY

#: Below it operators may name files for exports, to write and to read; elsewhere only admins may.
EXPORTS = "/var/lib/atoll/exports"


def _plain_path(path: str) -> str:
    if not path.startswith("/") or "\0" in path or any(part in ("..", ".") for part in path.split("/")):
        raise ValueError("the path must be absolute, without . and .. in it")
    return path


#: An absolute path of a node, without ``..``.
NodePath = Annotated[str, StringConstraints(min_length=2, max_length=4096), AfterValidator(_plain_path)]


class ImageSource(BaseModel):
    """An image file (or block device) of a node. ``format`` None: its header tells, of raw and qcow2."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    node: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    path: NodePath
    format: Literal["raw", "qcow2"] | None = None

    @property
    def open_to_operators(self) -> bool:
        """Whether it lies where operators may take images from."""
        return self.path.startswith(OPEN_DIRECTORY + "/")


def _os(text: str) -> str:
    if text and not _OS.fullmatch(text):
        raise ValueError("the name of an OS definition is NAME or NAME+VARIANT")
    return text


def _parameters(given: dict[str, str]) -> dict[str, str]:
    if len(given) > 64 or any(not _PARAMETER.fullmatch(name) for name in given):
        raise ValueError("names of OS parameters are letters, digits and _, and there are 64 at most")
    if any("\0" in value or len(value) > 4096 for value in given.values()):
        raise ValueError("values of OS parameters have 4096 characters at most, and no NUL")
    return given


_OS, _PARAMETER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(\+[A-Za-z0-9][A-Za-z0-9_.-]{0,99})?$"), re.compile(r"^[A-Za-z0-9_]{1,64}$")
#: An OS definition, and what its scripts get as ``OSP_NAME``.
OsName = Annotated[str, StringConstraints(max_length=201), AfterValidator(_os)]
OsParameters = Annotated[dict[str, str], AfterValidator(_parameters)]
#: Seconds that one script of an OS definition may take.
OsTimeout = Annotated[float, Field(gt=0, le=82800)]


_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")
#: What cloud-init recognises at the beginning of user data; anything else it would silently leave alone.
_USER_DATA = ("#", "Content-Type:", "MIME-Version:", "From ")


def _ssh_key(line: str) -> str:
    line = line.strip()
    words = line.split()
    # The key is not repeated in the error: it may be the private one.
    if len(words) < 2 or not words[0].startswith(_KEY_TYPES) or "\n" in line or not line.isprintable():
        raise ValueError("not the public half of an SSH key, one line as in a file ~/.ssh/id_ed25519.pub")
    return line


def _user_data(text: str) -> str:
    if text and not text.startswith(_USER_DATA):
        raise ValueError("user data begins with #cloud-config, #! or another header that cloud-init knows")
    return text


SshKey = Annotated[str, StringConstraints(max_length=16384), AfterValidator(_ssh_key)]
Document = Annotated[str, StringConstraints(max_length=512 << 10)]


class CloudInit(BaseModel):
    """What cloud-init in the guest shall find on its NoCloud seed, a small disk labelled ``cidata``. All of it may be secret, so a
    job keeps it ``sealed``."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    user_data: Annotated[Document, AfterValidator(_user_data)] = ""
    #: Lines that it lacks (instance-id, local-hostname) are added.
    meta_data: Document = ""
    network_config: Document = ""
    ssh_keys: list[SshKey] = Field(default_factory=list, max_length=64)
    #: Only Atoll's own: the other fields, encrypted under the master's key.
    sealed: str = ""
