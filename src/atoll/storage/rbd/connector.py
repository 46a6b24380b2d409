"""The node half: QEMU opens the image by itself; on the node there is nothing but a key in a file, while it is attached."""

from __future__ import annotations

from typing import Any, Literal

from atoll.model.errors import NotSupported
from atoll.model.messages import Attached, Connection
from atoll.storage.rbd import keyring
from atoll.storage.rbd.options import RbdOptions


class Connector:
    """See ``Connector``."""

    def attach(self, connection: Connection, access: Literal["kernelspace", "userspace"]) -> Attached:
        """See ``Connector``. Errors: PoolUnavailable (no configuration or key here), NotSupported (no device can be made)."""
        if access != "userspace":
            raise self._no_device()
        data = connection.data
        path = keyring.lay_out(connection.volume, self._key(connection))
        secret = f"key-{connection.volume}"
        blockdev: dict[str, Any] = {
            "driver": "rbd",
            "pool": data["pool"],
            "image": data["image"],
            "conf": data["conf"],
            "user": data["user"],
            "key-secret": secret,
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": False},
        }
        if data["namespace"]:
            blockdev["namespace"] = data["namespace"]
        return Attached(volume=connection.volume, blockdev=blockdev, secrets={secret: str(path)})

    def _key(self, connection: Connection) -> str:
        """The key of the user that guests use: from the keyring of this node, or from Ceph, by the right that the node's user has."""
        data = connection.data
        path = connection.secrets["keyring"].removeprefix("file:")
        if "node_user" not in data:
            return keyring.key_of(path, data["user"])
        from atoll.storage.rbd import minting

        return minting.fetch(self._options(connection), data["user"], data["node_user"], path)

    def _options(self, connection: Connection) -> RbdOptions:
        data = connection.data
        path = connection.secrets["keyring"].removeprefix("file:")
        return RbdOptions(data["pool"], data["namespace"], data["conf"], data["user"], path, data["user"], path, False, 61, "")

    def _no_device(self) -> NotSupported:
        return NotSupported(
            "images in Ceph are opened by QEMU itself; this version maps none to a device",
            hint="stop the instance, then use rbd map or rbd export on a host with Ceph's client",
        )

    def map(self, connection: Connection, *, read_only: bool) -> Attached:
        """See ``Connector``. Errors: NotSupported."""
        raise self._no_device()

    def unmap(self, connection: Connection) -> None:
        """See ``Connector``. Nothing is mapped."""

    def unmap_others(self, keep: list[str]) -> list[str]:
        """See ``Connector``. Nothing is mapped."""
        return []

    def detach(self, connection: Connection) -> None:
        """See ``Connector``."""
        keyring.take_away(connection.volume)

    def resized(self, connection: Connection) -> int:
        """See ``Connector``. QEMU is told the new size, and asks Ceph by itself."""
        return connection.size

    def attached(self) -> list[str]:
        """See ``Connector``."""
        return keyring.laid_out()
