"""The node half. In user space QEMU opens the image by itself, and on the node there is nothing but a key in a file, while it is attached.
In kernel space, and for people and OS scripts, the image becomes a block device of the node."""

from __future__ import annotations

from typing import Any, Literal

from atoll.model.errors import HostError
from atoll.model.messages import Attached, Connection
from atoll.storage.rbd import keyring
from atoll.storage.rbd.mapping import here, loopback
from atoll.storage.rbd.mapping.way import Image
from atoll.storage.rbd.options import RbdOptions


class Connector:
    """See ``Connector``."""

    def attach(self, connection: Connection, access: Literal["kernelspace", "userspace"]) -> Attached:
        """See ``Connector``. Errors: PoolUnavailable (no configuration or key here), and those of mapping."""
        if access == "kernelspace":
            device, way = self._mapped(connection, read_only=False)
            node = here.give(connection.volume, device)
            return Attached(volume=connection.volume, path=node, way=way, warning=loopback.hazard(connection.data["conf"]))
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

    def _mapped(self, connection: Connection, *, read_only: bool) -> tuple[str, str]:
        data = connection.data
        path = keyring.lay_out(connection.volume, self._key(connection))
        image = Image(
            volume=connection.volume,
            conf=data["conf"],
            pool=data["pool"],
            namespace=data["namespace"],
            name=data["image"],
            user=data["user"],
            key_file=str(path),
            read_only=read_only,
        )
        return here.attach(image)

    def map(self, connection: Connection, *, read_only: bool) -> Attached:
        """See ``Connector``."""
        device, way = self._mapped(connection, read_only=read_only)
        return Attached(volume=connection.volume, path=device, way=way)

    def unmap(self, connection: Connection) -> None:
        """See ``Connector``. Errors: HostError, too, where it is unmapped and what was written last may be lost."""
        lost = here.detach(connection.volume)
        keyring.take_away(connection.volume)
        if lost:
            raise HostError(f"volume {connection.volume} is no longer mapped, but what was written last may be lost: {lost}")

    def unmap_others(self, keep: list[str]) -> list[str]:
        """See ``Connector``."""
        gone = sorted(set(here.volumes()) - set(keep))
        for volume in gone:
            here.detach(volume)
            keyring.take_away(volume)
        return gone

    def detach(self, connection: Connection) -> None:
        """See ``Connector``. What the guest's last writes came to, the guest has been told."""
        here.detach(connection.volume)
        keyring.take_away(connection.volume)

    def resized(self, connection: Connection) -> int:
        """See ``Connector``. In user space QEMU is told the new size, and asks Ceph by itself."""
        return here.resize(connection.volume, connection.size) or connection.size

    def attached(self) -> list[str]:
        """See ``Connector``."""
        return keyring.laid_out()
