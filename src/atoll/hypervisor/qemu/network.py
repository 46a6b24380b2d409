"""Tap devices of bridged network cards. Their names follow from the guest, so that they are found again without being remembered."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from atoll.model.errors import HostError
from atoll.model.messages import GuestSpec
from atoll.runtime.process import run

_DEADLINE = 10.0
_TUN = "/dev/net/tun"
#: linux/if_tun.h
_TUNSETIFF = 0x400454CA
_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR


def tap_name(node: str, guest: str, index: int) -> str:
    """At most 15 characters, the kernel's limit."""
    return f"at{hashlib.sha256(f'{node} {guest}'.encode()).hexdigest()[:10]}.{index}"


def names(node: str, spec: GuestSpec) -> list[str | None]:
    """For each network card its tap; None for one that uses QEMU's own NAT."""
    return [tap_name(node, spec.instance, index) if nic.mode == "bridged" else None for index, nic in enumerate(spec.nics)]


async def make(node: str, spec: GuestSpec) -> list[str | None]:
    """Make the taps on their bridges. There already = success. Errors: HostError (no such bridge)."""
    taps = names(node, spec)
    for nic, tap in zip(spec.nics, taps, strict=True):
        if tap is None:
            continue
        if not _exists(tap):
            await _ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
        # High, so that the bridge does not take its own address from a guest that comes and goes.
        await _ip("link", "set", "dev", tap, "address", f"fe:{nic.mac[3:]}", "master", nic.link, "up")
    return taps


@contextmanager
def opened(taps: Sequence[str | None]) -> Iterator[list[int | None]]:
    """The taps as file descriptors that QEMU can inherit: the guests' user needs no right to make network devices.

    Errors: HostError (there is no such device, or another process has it).
    """
    with ExitStack() as stack:
        yield [None if tap is None else _open(tap, stack) for tap in taps]


def _open(tap: str, stack: ExitStack) -> int:
    try:
        handle = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", tap.encode(), _FLAGS))
    except OSError as error:
        raise HostError(f"cannot open the network device {tap} by {_TUN}: {error.strerror}", hint="on that node: modprobe tun") from None
    return handle


async def remove(node: str, spec: GuestSpec) -> None:
    """Remove the taps; not there = success."""
    for tap in names(node, spec):
        if tap is not None and _exists(tap):
            await _ip("tuntap", "del", "dev", tap, "mode", "tap")


def _exists(tap: str) -> bool:
    # Of our own network namespace, while /sys may show another one.
    return any(line.split(":")[0].strip() == tap for line in Path("/proc/net/dev").read_text().splitlines())


async def _ip(*words: str) -> None:
    await run(("ip", *words), deadline=_DEADLINE)
