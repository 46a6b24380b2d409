"""The parts of requests that name images and files of nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

#: Below it everybody who may make instances may name files; elsewhere only admins may, for a file's bytes end up on a disk that they read.
OPEN_DIRECTORY = "/var/lib/atoll/images"


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
