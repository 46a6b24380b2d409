"""An image mapped by the kernel's own client."""

from __future__ import annotations

from atoll.model.errors import NotSupported
from atoll.storage.rbd.mapping.way import Image


class Way:
    """See ``way.Way``."""

    name = "krbd"

    def available(self) -> str:
        """See ``way.Way``."""
        return "this version of Atoll does not use it"

    def map(self, image: Image) -> str:
        """See ``way.Way``. Errors: NotSupported."""
        raise NotSupported(f"{image.spec} cannot be mapped with {self.name}: this version of Atoll does not use it")

    def unmap(self, image: Image) -> str:
        """See ``way.Way``. Nothing is mapped."""
        return ""

    def device(self, image: Image) -> str:
        """See ``way.Way``. Nothing is mapped."""
        return ""

    def resize(self, image: Image, size: int) -> int:
        """See ``way.Way``. Errors: NotSupported."""
        raise NotSupported(f"{image.spec} is not mapped with {self.name}")
