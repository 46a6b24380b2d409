"""The contract of ways to make an image in Ceph a block device of this node: by the kernel (krbd, rbd-nbd), or by a process and a loop.

A way is a plain synchronous class in a module of its own, made without arguments; it keeps nothing in memory. Which images are mapped here,
and by which way, is in ``records.py``, written before a way is asked to map: what an agent that was killed had begun is found there.
Its caller holds the volume's lock (``records.locked``) around every ``map``, ``unmap`` and ``resize``. Programs are run by ``tool.run``:
one that outlives a killed worker keeps the lock, so that nobody unmaps before it has ended.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict


class Image(BaseModel):
    """What shall be mapped, and as whom. It holds no key: ``key_file`` is the path of a file (the guests' user's, in memory, there as
    long as the volume is attached) with nothing in it but the key of ``client.USER`` in base64, as ``rbd --keyfile`` and QEMU's
    ``secret,format=base64`` take it."""

    model_config = ConfigDict(frozen=True)
    volume: str
    conf: str
    pool: str
    namespace: str = ""
    name: str
    user: str
    key_file: str
    read_only: bool = False

    @property
    def spec(self) -> str:
        """POOL/IMAGE or POOL/NAMESPACE/IMAGE, as ``rbd`` takes it."""
        return "/".join(part for part in (self.pool, self.namespace, self.name) if part)


@runtime_checkable
class Way(Protocol):
    """One way. All calls are idempotent, and each ends within about 25 seconds or raises DeadlineExceeded (its outcome is then unknown)."""

    #: How it is called in ``instance info`` and in messages: krbd, rbd-nbd, fuse+loop.
    name: str

    def available(self) -> str:
        """Why this node cannot do it, in words for an administrator (a module or a program that is missing); empty: it can. It changes
        nothing but may load a kernel module."""

    def map(self, image: Image) -> str:
        """Make it a block device of the node's, and give the device's path (/dev/...); mapped already is success.

        Another node, too, may have it mapped: during a migration both sides do, and write one after the other. So no exclusive mapping.
        Writes that Ceph refuses must come out as errors of the device, as those of a client that was shut out (a blocklist) do.
        Errors: NotSupported (this image cannot be mapped so, but perhaps another way: a feature that the kernel does not know; nothing is
        left then), NotFound, PoolUnavailable, Conflict (mapped with the other mode), HostError, DeadlineExceeded.
        """

    def unmap(self, image: Image) -> str:
        """End it, when everything written through the device is in Ceph; not mapped, or mapped half, is success. Afterwards no device, no
        process and no watch on the image is left here. It works also after the client was shut out, and when the image is gone: then it
        ends all the same, and why what was written last may be lost is what this gives; empty: nothing is.

        Errors: DiskInUse (somebody has the device open: say how he is found), HostError, DeadlineExceeded (Ceph does not answer: it is
        mapped still).
        """

    def device(self, image: Image) -> str:
        """The path of the device that this image has here now, as the node itself tells; empty: none."""

    def resize(self, image: Image, size: int) -> int:
        """The image has grown to ``size`` bytes: let the device be as large, while it is in use; its size in bytes, which is at least that
        when this returns. Errors: HostError (not mapped, too), DeadlineExceeded."""
